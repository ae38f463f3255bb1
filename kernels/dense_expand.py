"""LoRA expand of long batches and many ranks, by cuBLAS:

    y[t, n] += Σ_{e ≥ first} B[n, e] (gates[t, e] s[t, p(n), e])     p(n): the linear of column n

A product over the ranks of all experts, chosen or not, costs E R / in of the projection's own and a
pass over y. A kernel weighs s in place, then one product adds to each slice of y. What SGMM is
(AdaFuse, arXiv 2603.11873, section 3) where skipping experts would cost more than their zeros do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.device.gates import weigh
from vllm_adafuse.kernels.expand import expand_torch
from vllm_adafuse.kernels.launch import Bound, bind, overlap
from vllm_adafuse.kernels.plans import on_hopper
from vllm_adafuse.kernels.whole import cdiv, power_of_2

# Numbers of s that a program weighs; not tuned.
_BLOCK = 4096


@triton.jit(do_not_specialize=["n_tokens"])
def _weigh_kernel(
    lora_a_out_ptr, gates_ptr, n_tokens, lora_a_out_stride,
    EXPERTS: tl.constexpr, FIRST: tl.constexpr, RANK: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # launched while the kernel before it ends
        tl.extra.cuda.gdc_wait()
    # Experts of one token after the other, so that any number of them fills programs.
    places = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    tokens = places // (EXPERTS - FIRST)
    experts = FIRST + places % (EXPERTS - FIRST)
    token_mask = tokens < n_tokens
    wide = tokens.to(tl.int64)
    gates = tl.load(gates_ptr + wide * EXPERTS + experts, mask=token_mask, other=0.0)[:, None]
    ranks = tl.arange(0, BLOCK_R)[None, :]
    first_rank = (tl.program_id(1) * EXPERTS + experts) * RANK
    at = lora_a_out_ptr + (wide * lora_a_out_stride)[:, None] + first_rank[:, None] + ranks
    rank_mask = ranks < RANK
    lora_a_out = tl.load(at, mask=(gates != 0) & rank_mask, other=0.0)  # few are chosen: the others not read
    tl.store(at, weigh(lora_a_out, gates), mask=token_mask[:, None] & rank_mask)


def dense_expand_triton(
    y: torch.Tensor,
    lora_a_out: torch.Tensor,
    lora_b: torch.Tensor,
    gates: torch.Tensor,
    adapted: Sequence[int],
    widths: Sequence[int],
    first: int = 0,
) -> None:
    """Adds the deltas of the experts from `first` on to y in place: one launch, and a product for
    each slice.

    Args:
        y: [T, out], W x; rows contiguous.
        lora_a_out: [T, P E R], A x of all experts, not yet weighted; rows contiguous. Those of the experts
            from `first` on are weighted afterwards.
        lora_b: [sum of the adapted widths, E, R] contiguous, dtype of y.
        gates: [N, E] float32 contiguous, N >= T.
        adapted: for each of up to three slices of y the index of its linear, -1 for one without
            experts.
        widths: columns of each slice.
        first: < E.
    """
    tokens, (_, experts, rank) = y.shape[0], lora_b.shape
    of_linears = lora_a_out.unflatten(1, (-1, experts * rank))
    block, kernel = _plan(experts, first, rank, on_hopper(y))
    kernel(
        (cdiv(tokens * (experts - first), block), of_linears.shape[1]),
        lora_a_out, gates, tokens, lora_a_out.stride(0),
    )  # fmt: skip
    expand_torch(y, of_linears[..., first * rank :], lora_b[:, first:], adapted, widths)


@functools.cache
def _plan(experts: int, first: int, rank: int, hopper: bool) -> tuple[int, Bound]:
    """Experts of tokens to a program, and the kernel."""
    block_r = power_of_2(rank)
    block_e = max(1, _BLOCK // block_r)
    return block_e, bind(
        _weigh_kernel,
        EXPERTS=experts, FIRST=first, RANK=rank, BLOCK_E=block_e, BLOCK_R=block_r,
        num_warps=8, **overlap(hopper),
    )  # fmt: skip
