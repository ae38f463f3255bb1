"""HydraLoRA (arXiv 2404.19245): as LoRAMoE, but the experts of a linear share one A.

    model.layers.{i}.{block}.{module}.lora_route.weight [E, in]
    ….lora_A.weight [r, in]   ….lora_B{e}.weight [out, r]
"""

from __future__ import annotations

from vllm_adafuse.convert.loramoe import ROUTER, read_routes
from vllm_adafuse.convert.mixture import Mixture
from vllm_adafuse.convert.options import Options
from vllm_adafuse.convert.peft_lora import LINEAR
from vllm_adafuse.convert.source import Source
from vllm_adafuse.format.backbone import Backbone

KIND = "HydraLoRA"
OPTIONS: tuple[str, ...] = ()


def recognises(source: Source) -> bool:
    """Numbered B's (or a route) beside one A."""
    numbered = source.has(LINEAR + r"\.lora_B\d+\.weight") or source.has(ROUTER)
    return numbered and source.has(LINEAR + r"\.lora_A\.weight")


def read(source: Source, backbone: Backbone, options: Options) -> Mixture:
    """A dense mixture in every linear, one A for all experts."""
    linears, experts = read_routes(source, backbone, r"\.lora_(?:A|B\d+)\.weight", "lora_A")
    return Mixture(KIND, linears, experts, options={"shared_A": True})
