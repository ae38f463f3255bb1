"""LoRA expand of the chosen experts, added to the projection's output, part by part:

    y[t, offset_p : offset_p + width_p] += Σ_j (Σ_split s[split, t, p, j]) B[expert_ids[t, j]][:, columns of p]

The second half of SGMM (AdaFuse, arXiv 2603.11873, section 3). The decode kernel gives a program a
tile of output columns; it reads B once for all tokens of its block, and only of experts that one of
them chose. Sums run over experts in rising order, whoever else is in the batch.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_BLOCK_OUT = 128


@triton.jit
def _expand_kernel(
    y_ptr, s_ptr, b_ptr, ids_ptr,
    n_tokens, y_stride, b_columns, offset, column, width,
    part, top_k, n_parts, n_experts, rank, n_splits,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    slots, ranks = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    columns = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    here = (rows < n_tokens)[:, None] & (slots < top_k)[None, :]
    ids = tl.load(ids_ptr + rows[:, None] * top_k + slots[None, :], mask=here, other=-1)
    sums = tl.zeros([BLOCK_T, BLOCK_OUT], dtype=tl.float32)
    for expert in range(n_experts):
        chosen = ids == expert
        if tl.max(chosen.to(tl.int32)) > 0:
            slot = tl.sum(tl.where(chosen, slots[None, :], 0), 1)
            mask = (tl.max(chosen.to(tl.int32), 1) > 0)[:, None] & (ranks < rank)[None, :]
            low = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
            for split in range(n_splits):
                source = ((split * n_tokens + rows) * n_parts + part) * top_k + slot
                low += tl.load(
                    s_ptr + source[:, None] * rank + ranks[None, :], mask=mask, other=0.0
                )
            b = tl.load(
                b_ptr + (expert * rank + ranks)[:, None].to(tl.int64) * b_columns
                + column + columns[None, :],
                mask=(ranks < rank)[:, None] & (columns < width)[None, :], other=0.0,
            )  # fmt: skip
            sums += tl.dot(low.to(b.dtype), b, input_precision="ieee")
    target = y_ptr + rows[:, None].to(tl.int64) * y_stride + offset + columns[None, :]
    inside = (rows < n_tokens)[:, None] & (columns < width)[None, :]
    y = tl.load(target, mask=inside, other=0.0)
    tl.store(target, (y.to(tl.float32) + sums).to(y.dtype), mask=inside)


def expand_triton(
    y: torch.Tensor,
    s: torch.Tensor,
    bank_b: torch.Tensor,
    expert_ids: torch.Tensor,
    offsets: Sequence[int],
    widths: Sequence[int],
) -> None:
    """Adds the deltas of T tokens to y in place, one launch per part.

    Args:
        y: [T, out], the projection's own output; rows contiguous.
        s: [S, T, P, k, R] float32, from `shrink_triton`.
        bank_b: [E, R, sum(widths)] contiguous, dtype of y; the parts side by side.
        expert_ids: [N, k] int32, N >= T.
        offsets: where each part begins in y.
        widths: columns of each part.
    """
    count, tokens, parts, top_k, rank = s.shape
    experts, _, b_columns = bank_b.shape
    block_t = min(max(16, triton.next_power_of_2(tokens)), 64)
    column = 0
    for part, (offset, width) in enumerate(zip(offsets, widths)):
        grid = (triton.cdiv(width, _BLOCK_OUT), triton.cdiv(tokens, block_t))
        _expand_kernel[grid](
            y, s, bank_b, expert_ids,
            tokens, y.stride(0), b_columns, offset, column, width,
            part, top_k, parts, experts, rank, count,
            BLOCK_T=block_t, BLOCK_K=triton.next_power_of_2(top_k),
            BLOCK_R=max(16, triton.next_power_of_2(rank)), BLOCK_OUT=_BLOCK_OUT,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        column += width


def expand_torch(
    y: torch.Tensor,
    s: torch.Tensor,
    bank_b: torch.Tensor,
    expert_ids: torch.Tensor,
    offsets: Sequence[int],
    widths: Sequence[int],
) -> None:
    """The reference and the path of long batches: see `expand_triton`."""
    s = s.sum(0) if s.shape[0] > 1 else s[0]
    tokens, parts, _, rank = s.shape
    experts = bank_b.shape[0]
    index = expert_ids[:tokens].long()[:, None, :, None].expand(-1, parts, -1, rank)
    spread = s.new_zeros(tokens, parts, experts, rank).scatter_(2, index, s)
    spread = spread.to(y.dtype).view(tokens, parts, experts * rank)
    b = bank_b.view(experts * rank, -1)
    column = 0
    for part, (offset, width) in enumerate(zip(offsets, widths)):
        target = y[:, offset : offset + width]
        target.addmm_(spread[:, part], b[:, column : column + width])
        column += width
