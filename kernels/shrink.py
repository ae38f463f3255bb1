"""LoRA shrink of the chosen experts: s[t, p, j] = weights[t, j] * A[p, expert_ids[t, j]] x[t].

p counts the parts of a packed projection (q, k, v), which have shrinks of their own. This is the
first half of SGMM (AdaFuse, arXiv 2603.11873, section 3). The decode kernel gives each expert to a
few programs, which read its A once for all tokens that chose it, each program a slice of `in`;
their partial sums are left to `expand`, which adds them in a fixed order, so that results do not
vary. An expert that no token chose is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_adafuse.kernels.registry import matmul_f32

# Programs to aim for: enough loads in flight for any current GPU.
_PROGRAMS = 256
_BLOCK_IN = 128


def splits(parts: int, experts: int, size_in: int) -> int:
    """How many slices of `in` are summed apart: a function of the bank alone, never of T."""
    return max(1, min(triton.cdiv(size_in, _BLOCK_IN), _PROGRAMS // (parts * experts), 16))


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, ids_ptr, weights_ptr, s_ptr,
    n_tokens, x_stride, size_in, slice_in,
    top_k, n_parts, n_experts, rank,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    part, expert = tl.program_id(0) // n_experts, tl.program_id(0) % n_experts
    split, block = tl.program_id(1), tl.program_id(2)
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    slots, ranks = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    here = (rows < n_tokens)[:, None] & (slots < top_k)[None, :]
    at = rows[:, None] * top_k + slots[None, :]
    chosen = tl.load(ids_ptr + at, mask=here, other=-1) == expert
    if tl.max(chosen.to(tl.int32)) > 0:
        weight = tl.sum(tl.where(chosen, tl.load(weights_ptr + at, mask=here, other=0.0), 0.0), 1)
        slot = tl.sum(tl.where(chosen, slots[None, :], 0), 1)
        used = tl.max(chosen.to(tl.int32), 1) > 0
        a_row = (part * n_experts + expert).to(tl.int64) * rank + ranks
        sums = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
        first = split * slice_in
        for start in range(first, tl.minimum(first + slice_in, size_in), BLOCK_IN):
            k = start + tl.arange(0, BLOCK_IN)
            x = tl.load(
                x_ptr + rows[:, None].to(tl.int64) * x_stride + k[None, :],
                mask=used[:, None] & (k < size_in)[None, :], other=0.0,
            )  # fmt: skip
            a = tl.load(
                a_ptr + a_row[None, :] * size_in + k[:, None],
                mask=(ranks < rank)[None, :] & (k < size_in)[:, None], other=0.0,
            )  # fmt: skip
            sums += tl.dot(x, a, input_precision="ieee")
        target = (split * n_tokens + rows) * n_parts + part
        target = (target * top_k + slot)[:, None] * rank + ranks[None, :]
        mask = used[:, None] & (ranks < rank)[None, :]
        tl.store(s_ptr + target, sums * weight[:, None], mask=mask)


def shrink_triton(
    x: torch.Tensor, bank_a: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Projects T tokens into the rank space of their experts, in one launch.

    Args:
        x: [T, in], the projection's input; rows contiguous.
        bank_a: [P, E, R, in] contiguous, dtype of x.
        expert_ids: [N, k] int32, N >= T; rows past T are not read.
        weights: [N, k] float32.

    Returns:
        s: [S, T, P, k, R] float32, weighted; the sum over S slices of `in` is meant.
    """
    tokens, top_k = x.shape[0], expert_ids.shape[1]
    parts, experts, rank, size_in = bank_a.shape
    count = splits(parts, experts, size_in)
    s = torch.empty(count, tokens, parts, top_k, rank, dtype=torch.float32, device=x.device)
    slice_in = triton.cdiv(triton.cdiv(size_in, count), _BLOCK_IN) * _BLOCK_IN
    block_t = min(max(16, triton.next_power_of_2(tokens)), 64)
    _shrink_kernel[(parts * experts, count, triton.cdiv(tokens, block_t))](
        x, bank_a, expert_ids, weights, s,
        tokens, x.stride(0), size_in, slice_in,
        top_k, parts, experts, rank,
        BLOCK_T=block_t, BLOCK_K=triton.next_power_of_2(top_k),
        BLOCK_R=max(16, triton.next_power_of_2(rank)), BLOCK_IN=_BLOCK_IN,
        num_warps=4, num_stages=3 if rank <= 64 else 2,
    )  # fmt: skip
    return s


def shrink_torch(
    x: torch.Tensor, bank_a: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The reference and the path of long batches: see `shrink_triton`, here with S = 1."""
    tokens = x.shape[0]
    parts, experts, rank, size_in = bank_a.shape
    every = matmul_f32(x, bank_a.view(-1, size_in).t()).view(tokens, parts, experts, rank)
    index = expert_ids[:tokens].long()[:, None, :, None].expand(-1, parts, -1, rank)
    return (every.gather(2, index) * weights[:tokens, None, :, None])[None]
