"""The deltas of a down projection whose experts read activations of their own (see `ffn_mix`):

    y[t] += Σ_e B[e] (gates[t, e] scale[e] low[j(t, e), t, e])         low[j, t, e] = A[e] x[j, t]

j(t, e) is the place of expert e among the chosen ones of token t. Parts that are always on read the
mixture, x[0].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.expand import expand_torch, expand_triton
from vllm_adafuse.kernels.launch import launch
from vllm_adafuse.kernels.layerwise.ffn_mix import slots_of
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.whole import power_of_2


def weigh_slots_torch(
    lora_a_out, gates, scales, tokens, rank, always, shared, dtype
) -> torch.Tensor:
    """s [T, 1, E' R] of low [(1 + k) T, EA R]: each expert's from its own place, weighted."""
    experts = gates.shape[-1]
    lora_a_out = lora_a_out.view(-1, tokens, lora_a_out.shape[1] // rank, rank)
    own = gates[:tokens, 0]
    place = slots_of(own, lora_a_out.shape[0] - 1)
    at = torch.arange(experts, device=lora_a_out.device)
    row = torch.arange(tokens, device=lora_a_out.device)[:, None]
    chosen = lora_a_out[place, row, torch.zeros_like(at) if shared else at]
    weights = (own * scales[:experts])[..., None]
    weighted = torch.where(weights != 0, weights * chosen, 0.0)
    if always:
        weighted = torch.cat([weighted, lora_a_out[0, :, -always:] * scales[experts:, None]], 1)
    return weighted.to(dtype).view(tokens, 1, -1)


@triton.jit(do_not_specialize=["n_tokens"])
def _slots_kernel(
    lora_a_out_ptr, gates_ptr, scales_ptr, weighted_ptr, n_tokens, lora_a_stride, slots,
    EXPERTS: tl.constexpr, NUM_ALL_EXPERTS: tl.constexpr, RANK: tl.constexpr,
    LORA_A_SIZE: tl.constexpr, SHARED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """s of one token."""
    token, experts = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_E)
    SIZE: tl.constexpr = NUM_ALL_EXPERTS * RANK
    gates = tl.load(gates_ptr + token * EXPERTS + experts, mask=experts < EXPERTS, other=0.0)
    chosen = (gates != 0.0).to(tl.int32)
    for start in range(0, SIZE, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        expert, col_mask = columns // RANK, columns < SIZE
        routed = col_mask & (expert < EXPERTS)
        before = experts[None, :] <= expert[:, None]
        place = tl.minimum(tl.sum(tl.where(before, chosen[None, :], 0), 1), slots)
        weight = tl.load(gates_ptr + token * EXPERTS + expert, mask=routed, other=1.0)
        weight *= tl.load(scales_ptr + expert, mask=col_mask, other=0.0)
        # Those always on stand at the end of a row of low, and read the mixture.
        at = tl.where(routed, columns % RANK if SHARED else columns, columns - (SIZE - LORA_A_SIZE))
        row = tl.where(routed, place, 0).to(tl.int64) * n_tokens + token
        a_at = lora_a_out_ptr + row * lora_a_stride + at
        lora_a_out = tl.load(a_at, mask=col_mask, other=0.0)
        weighted = tl.where(weight != 0.0, weight * lora_a_out, 0.0)
        weighted_at = weighted_ptr + token * SIZE + columns
        tl.store(weighted_at, weighted.to(weighted_ptr.dtype.element_ty), mask=col_mask)


def weigh_slots_triton(
    lora_a_out, gates, scales, tokens, rank, always, shared, dtype
) -> torch.Tensor:
    """One launch; see `weigh_slots_torch`."""
    experts, num_all_experts = gates.shape[-1], scales.shape[0]
    weighted = lora_a_out.new_empty(tokens, 1, num_all_experts * rank, dtype=dtype)
    launch(
        _slots_kernel, (tokens,),
        lora_a_out, gates, scales, weighted, tokens, lora_a_out.stride(0),
        lora_a_out.shape[0] // tokens - 1,
        EXPERTS=experts, NUM_ALL_EXPERTS=num_all_experts, RANK=rank,
        LORA_A_SIZE=lora_a_out.shape[1], SHARED=shared, BLOCK_E=max(2, power_of_2(experts)),
        BLOCK_C=min(128, power_of_2(num_all_experts * rank)), num_warps=4,
    )  # fmt: skip
    return weighted


def _run(y, lora_a_out, gates, scales, active, lora_b, always, shared) -> None:
    rank, width = lora_b.shape[2], y.shape[1]
    weigh_slots = weigh_slots_triton if y.is_cuda else weigh_slots_torch
    weighted = weigh_slots(lora_a_out, gates, scales, y.shape[0], rank, always, shared, y.dtype)
    if y.is_cuda:
        expand_triton(y, weighted, lora_b, active, [0], [width])
    else:
        expand_torch(y, weighted, lora_b, [0], [width])


def _fake(*arguments) -> None:
    return None


_op = register_op(
    "ffn_down(Tensor(a!) y, Tensor low, Tensor gates, Tensor scales, Tensor active, "
    "Tensor lora_b, int always, bool shared) -> ()",
    _run,
    _fake,
)


def ffn_down(
    y: torch.Tensor,
    lora_a_out: torch.Tensor,
    gates: torch.Tensor,
    scales: torch.Tensor,
    active: torch.Tensor,
    lora_b: torch.Tensor,
    always: int,
    shared: bool,
) -> None:
    """Adds the experts' deltas of T tokens to the down projection of their mixture, in place.

    Args:
        y: [T, out], changed; rows contiguous.
        low: [(1 + k) T, EA R] float32: all of `ffn_mix`'s result in rank space; EA is E' or, where
            A is shared, 1 + always.
        gates: [N, 1, E] float32, N >= T.
        scales: [E'] float32.
        active: [1] int64, see `route_layer`.
        lora_b: [out, E', R], dtype of y.
        always: experts past E that are always on.
        shared: one A serves all other experts.
    """
    _op(y, lora_a_out, gates, scales, active, lora_b, always, shared)
