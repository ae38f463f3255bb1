"""LoRAMoE (arXiv 2312.09979): every adapted linear mixes all its experts, by a router of its own.

    model.layers.{i}.{block}.{module}.lora_route.weight [E, in]
    ….lora_A{e}.weight [r, in]   ….lora_B{e}.weight [out, r]

MoE-PEFT's dialect of it has the names of `moe_peft.py`, and a plain LoRA on attention.
"""

from __future__ import annotations

from vllm_adafuse.convert import moe_peft
from vllm_adafuse.convert.mixture import Linear, Mixture
from vllm_adafuse.convert.options import Options
from vllm_adafuse.convert.peft_config import check_complete, check_config
from vllm_adafuse.convert.peft_lora import LINEAR, take_pair
from vllm_adafuse.convert.source import Source
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import CONFIG_FILE, MAX_EXPERTS, MAX_RANK

KIND = "LoRAMoE"
OPTIONS: tuple[str, ...] = ()
ROUTER = LINEAR + r"\.lora_route\.weight"
_EXPERT = LINEAR + r"\.lora_A\d+\.weight"


def recognises(source: Source) -> bool:
    """By numbered A's, or MoE-PEFT's first word."""
    return source.has(_EXPERT) or source.has(r"loramoe\..*")


def read(source: Source, backbone: Backbone, options: Options) -> Mixture:
    """A dense mixture in every linear: k = E."""
    if source.has(r"loramoe\..*"):
        linears = moe_peft.read_routed_linears(source, backbone, "loramoe")
        experts = max((len(linear.experts) for linear in linears.values()), default=1)
        return Mixture(f"{KIND} (MoE-PEFT)", linears, experts)
    linears, experts = read_routes(source, backbone, r"\.lora_[AB]\d+\.weight", "lora_A{}")
    return Mixture(KIND, linears, experts)


def read_routes(
    source: Source, backbone: Backbone, ending: str, a_name: str
) -> tuple[dict[str, Linear], int]:
    """Linears of LoRAMoE's and HydraLoRA's fork of PEFT, and their number of experts.

    Args:
        source: where from.
        backbone: gives the shapes.
        ending: of the names of experts, a regular expression.
        a_name: of A, with {} for the expert; without it all experts share one A.
    """
    check_config(source, rslora=False)
    rank = source.integer("r", MAX_RANK)
    alpha = source.number("lora_alpha")
    routers = list(source.match(ROUTER))
    # Where the config does not say it, any router does.
    rows = source.tensors[routers[0][0]].shape[:1] if routers else ()
    count = source.integer("lora_nums", MAX_EXPERTS, default=rows[0] if rows else None)
    linears: dict[str, Linear] = {}
    for match in [*routers, *source.match(LINEAR + ending)]:
        if (name := match[1]) in linears:
            continue
        stem = match[0][: match[0].index(name) + len(name)]
        size_in = backbone.linears.get(name, ("in", "out"))[0]
        why = f"lora_nums is {count} in {CONFIG_FILE}; the backbone is {backbone.path}"
        linears[name] = Linear(
            router=source.take(f"{stem}.lora_route.weight", (count, size_in), why),
            experts=[
                take_pair(
                    source, backbone, name, f"{stem}.{a_name.format(e)}.weight",
                    f"{stem}.lora_B{e}.weight", rank, alpha,
                )
                for e in range(count)
            ],
        )  # fmt: skip
    check_complete(source, linears, backbone)
    return linears, count
