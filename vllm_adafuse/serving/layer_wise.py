"""Layer-wise routing in a served model: which projections get which bank.

The decisions fall inside the layers, from their own inputs. Nothing travels between pipeline
stages, and there are no passports.
"""

from __future__ import annotations

import torch
from vllm.logger import init_logger
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import Adapter
from vllm_adafuse.serving import projections
from vllm_adafuse.serving.bank import place_banks
from vllm_adafuse.serving.layer_bank import Gates, LayerBank
from vllm_adafuse.serving.projections import Place
from vllm_adafuse.serving.wrap.layer_wise import wrap_layer
from vllm_adafuse.serving.wrap.linears import release_weights

logger = init_logger("vllm.adafuse")


def wrap_layers(
    model: torch.nn.Module,
    adapter: Adapter,
    packed: dict,
    rows: int,
    dtype: torch.dtype,
    alone: bool,
) -> list[LayerBank]:
    """Gives the projections of a decoder their banks and methods.

    Args:
        model: a `…ForCausalLM` of vLLM.
        adapter: a layer-wise adapter.
        packed: vLLM's `packed_modules_mapping`.
        rows: the most tokens of a step.
        dtype: of the model.
        alone: nothing else, such as vLLM's own LoRA, adds to the projections' outputs.

    Raises:
        AdapterError: an MLP is to be mixed at its output, but has an activation of another kind,
            or vLLM's own LoRA would add to what stands between its projections.
    """
    found: dict[tuple[int, int], Gates] = {}

    def gates_of(routers: int, experts: int) -> Gates:
        if (routers, experts) not in found:
            found[routers, experts] = Gates(rows, routers, experts)
        return found[routers, experts]

    here = list(projections.places(model, adapter, packed))
    if not alone and any(place.whole_ffn for place in here):
        raise AdapterError(
            "vLLM's options",
            [
                "--enable-lora adds LoRA to the output of gate_up_proj, but the adapter's `mix` is "
                f"ffn_output ({adapter.path}), which has no one output there; leave the option out"
            ],
        )
    fused = [alone and _can_fuse(place, adapter) for place in here]
    release_weights(place.layer for place, fuse in zip(here, fused) if fuse)
    banks = [
        LayerBank(place, adapter, dtype, gates_of, fuse) for place, fuse in zip(here, fused)
    ]
    place_banks(banks, dtype)
    for place, bank, fuse in zip(here, banks, fused):
        wrap_layer(place, bank, fuse, adapter)
    return banks


def _can_fuse(place: Place, adapter: Adapter) -> bool:
    """Whether a projection and its deltas are one product: no sum of logits over ranks and no
    mixture of whole MLPs stands between them."""
    adapted = {*adapter.projections, *adapter.always_on}.intersection(place.linears)
    sums = adapter.config.router_scope == "linear" and projections.is_row_sharded(place.layer)
    return bool(adapted) and projections.can_fuse(place.layer) and not place.whole_ffn and not sums


def log_loaded(adapter: Adapter, banks: list[LayerBank]) -> None:
    """Tells what a worker holds."""
    config = adapter.config
    logger.info(
        "AdaFuse: layer-wise routing per %s, up to %d experts, top-%d, mixed in %s; modules %s in "
        "%d projections; expert banks %d bytes on this device",
        config.router_scope,
        config.num_experts,
        config.top_k,
        "the MLP's output" if config.mix == "ffn_output" else "every linear",
        ",".join(config.target_modules),
        len(banks),
        sum(bank.nbytes for bank in banks),
    )
