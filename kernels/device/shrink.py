"""The programs of a shrink: of a launch of its own (shrink.py), and in front of a product's tiles
(decode_gemm.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from vllm_adafuse.kernels.device.sync import last_sums, range_of_k


@triton.jit
def load_scale(a_ptr, n_ranks, places, mask):
    """The factors of some of an fp8 A's ranks, of all of which they stand right in front of it."""
    scale_ptr = (a_ptr - 4 * n_ranks).to(tl.pointer_type(tl.float32))
    return tl.load(scale_ptr + places, mask=mask, other=0.0)


@triton.jit
def _shrink_slice(
    slot, linear_idx, expert, block, pid_k, used, x_ptr, a_ptr, gates_ptr, lora_a_out_ptr,
    partial_ptr, split_k_semaphore_ptr, semaphore_ptr, n_tokens, x_stride, size_in, n_experts, rank,
    n_linears, split_k, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A slice of `in` for one block of ranks of one expert of one linear: s [T, BLOCK_R].

    When its s is stored, the semaphore rises by one.
    """
    rows = tl.arange(0, BLOCK_T)
    ranks = block * BLOCK_R + tl.arange(0, BLOCK_R)
    token_mask, real = rows < n_tokens, ranks < rank
    sums = tl.zeros([BLOCK_R, BLOCK_T], dtype=tl.float32)
    last = True
    if used:
        a_rows = ((linear_idx * n_experts + expert) * rank + ranks).to(tl.int64) * size_in
        begin, end = range_of_k(size_in, pid_k, split_k, BLOCK_IN)
        for start in tl.range(begin, end, BLOCK_IN, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_IN)
            k_mask = k < end
            a = tl.load(
                a_ptr + a_rows[:, None] + k[None, :],
                mask=real[:, None] & k_mask[None, :], other=0.0,
            )  # fmt: skip
            x = tl.load(
                x_ptr + rows[None, :] * x_stride + k[:, None],
                mask=token_mask[None, :] & k_mask[:, None], other=0.0,
            )  # fmt: skip
            sums = tl.dot(a.to(x.dtype), x, sums, input_precision="ieee")
        if split_k > 1:
            sums, last = last_sums(
                sums, partial_ptr, split_k_semaphore_ptr, slot, pid_k, split_k, BLOCK_R, BLOCK_T
            )
    if last:
        if a_ptr.dtype.element_ty == tl.float8e4nv:
            places = (linear_idx * n_experts + expert) * rank + ranks
            sums *= load_scale(a_ptr, n_linears * n_experts * rank, places, real)[:, None]
        gates = tl.load(gates_ptr + rows * n_experts + expert, mask=token_mask, other=0.0)
        at = ((rows * n_linears + linear_idx) * n_experts + expert)[None, :] * rank + ranks[:, None]
        # Not a bare product: what another token sees of this expert must not matter.
        lora_a_out = tl.where(gates[None, :] != 0, sums * gates[None, :], 0.0)
        lora_a_out = lora_a_out.to(lora_a_out_ptr.dtype.element_ty)
        tl.store(lora_a_out_ptr + at, lora_a_out, mask=token_mask[None, :] & real[:, None])
        tl.debug_barrier()
        tl.atomic_add(semaphore_ptr, 1, sem="release")


@triton.jit
def shrink_program(
    pid, x_ptr, a_ptr, gates_ptr, active_ptr, lora_a_out_ptr, partial_ptr, split_k_semaphore_ptr,
    semaphore_ptr, n_tokens, x_stride, size_in, n_experts, rank, n_linears, n_slots, split_k,
    LISTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The programs of a shrink: a slot for each linear, expert and block of ranks, or for those of
    the list of active experts, in turns if there are fewer slots."""
    slot, pid_k = pid // split_k, pid % split_k
    blocks = tl.cdiv(rank, BLOCK_R)
    if LISTED:
        of_expert = n_linears * blocks
        linear_idx, block = slot % of_expert // blocks, slot % blocks
        count = tl.load(active_ptr + 1).to(tl.int32)
        for i in range(slot // of_expert, count, n_slots // of_expert):
            expert = tl.load(active_ptr + 2 + i).to(tl.int32)
            _shrink_slice(
                i * of_expert + slot % of_expert, linear_idx, expert, block, pid_k, True,
                x_ptr, a_ptr, gates_ptr, lora_a_out_ptr, partial_ptr, split_k_semaphore_ptr,
                semaphore_ptr, n_tokens, x_stride, size_in, n_experts, rank, n_linears, split_k,
                BLOCK_T, BLOCK_R, BLOCK_IN, STAGES,
            )  # fmt: skip
    else:
        linear_idx, expert = slot // (n_experts * blocks), (slot // blocks) % n_experts
        used = (tl.load(active_ptr) >> expert) & 1 != 0
        # Of an expert that no token chose one program remains: it writes the zeros.
        if used | (pid_k == 0):
            _shrink_slice(
                slot, linear_idx, expert, slot % blocks, pid_k, used,
                x_ptr, a_ptr, gates_ptr, lora_a_out_ptr, partial_ptr, split_k_semaphore_ptr,
                semaphore_ptr, n_tokens, x_stride, size_in, n_experts, rank, n_linears, split_k,
                BLOCK_T, BLOCK_R, BLOCK_IN, STAGES,
            )  # fmt: skip
