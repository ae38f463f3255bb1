"""LoRA on a backbone's own experts, in the form that vLLM's own LoRA has slots for: a pair on each
linear of each expert, all of one rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.functional import pad
from vllm.lora.layers import FusedMoEWithLoRA
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm_adafuse.serving import vllm_api

# Of a module, A [r, in], B [out, r] and the scale of B A.
Pair = tuple[torch.Tensor, torch.Tensor, float]
Sizes = Mapping[str, tuple[int, int]]


def takes_lora(module: torch.nn.Module) -> bool:
    """Whether these are experts whose kernel also computes LoRA; vLLM's wrapper of others fails."""
    if not isinstance(module, MoERunner):
        return False
    method = module.routed_experts.quant_method
    return not method.is_monolithic and vllm_api.kernel_takes_lora(method)


def sizes_of(experts: FusedMoEWithLoRA, linears: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(in, out) of every expert's linears, as the adapter's tensors have them.

    Args:
        experts: vLLM's wrapper.
        linears: their names, vLLM's, in its order: of each expert gate (or the only one), down, up.
    """
    config = experts.moe_config
    hidden = config.hidden_dim_unpadded or config.hidden_dim
    own = config.intermediate_size_per_partition_unpadded or config.intermediate_size_per_partition
    up, down = (hidden, own * experts.tp_size), (own * experts.tp_size, hidden)
    every = (up, down, up) if config.is_act_and_mul else (up, down)
    return {name: every[i % len(every)] for i, name in enumerate(linears)}


def completed(pairs: Mapping[str, Pair], sizes: Sizes) -> dict[str, Pair]:
    """An adapter's pairs on some linears of a block of experts, as pairs on all of them: vLLM stacks
    them. Those that it has none on get zeros, and so do ranks up to the largest.

    Args:
        pairs: of some of the linears, at least one.
        sizes: of all of them.
    """
    rank = max(len(a) for a, _, _ in pairs.values())
    dtype = next(iter(pairs.values()))[0].dtype
    every: dict[str, Pair] = {}
    for name, (size_in, size_out) in sizes.items():
        if name not in pairs:
            every[name] = _zeros(rank, size_in, dtype), _zeros(size_out, rank, dtype), 1.0
            continue
        a, b, scale = pairs[name]
        missing = rank - len(a)
        every[name] = pad(a, (0, 0, 0, missing)), pad(b, (0, missing)), scale
    return every


def _zeros(rows: int, columns: int, dtype: torch.dtype) -> Any:
    return torch.zeros(rows, columns, dtype=dtype)
