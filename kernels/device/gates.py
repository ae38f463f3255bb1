"""Parts of the expands: B, and s weighted by the gates, for a chunk of experts at a time."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_ranks(
    row_at, col_mask, first_rank, n_experts, chunk,
    RANK: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows of B or of s, [rows, BLOCK_E * BLOCK_R] of a chunk of experts."""
    k = tl.arange(0, BLOCK_E * BLOCK_R)
    if EVEN_K:  # as one row of memory
        at = row_at[:, None] + (chunk * BLOCK_E * RANK + first_rank + k)[None, :]
        if EVEN:
            return tl.load(at)
        return tl.load(at, mask=col_mask[:, None], other=0.0)
    expert, rank = chunk * BLOCK_E + k // BLOCK_R, first_rank + k % BLOCK_R
    mask = col_mask[:, None] & ((expert < n_experts) & (rank < RANK))[None, :]
    return tl.load(row_at[:, None] + (expert * RANK + rank)[None, :], mask=mask, other=0.0)


@triton.jit
def load_gates(
    gates_ptr, rows, token_mask, n_experts, chunk,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gates of a chunk of experts, for every rank: [BLOCK_T, BLOCK_E * BLOCK_R]."""
    experts = chunk * BLOCK_E + tl.arange(0, BLOCK_E)
    at = gates_ptr + rows[:, None] * n_experts + experts[None, :]
    chosen = token_mask[:, None] & (experts < n_experts)[None, :]
    gates = tl.load(at, mask=chosen, other=0.0)[:, :, None]
    gates = tl.broadcast_to(gates, (BLOCK_T, BLOCK_E, BLOCK_R))
    return tl.reshape(gates, (BLOCK_T, BLOCK_E * BLOCK_R))


@triton.jit
def weigh(lora_a_out, gates):
    """s times gates. Not a bare product: what other tokens see of an expert must not matter."""
    return tl.where(gates != 0, lora_a_out.to(tl.float32) * gates, 0.0).to(lora_a_out.dtype)


@triton.jit
def load_s(
    lora_a_out_at, gates_ptr, rows, first_rank, token_mask, n_experts, chunk,
    RANK: tl.constexpr, RAW: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s [BLOCK_T, BLOCK_E * BLOCK_R] of a chunk of experts, weighted by the gates if it is RAW."""
    lora_a_out = load_ranks(
        lora_a_out_at, token_mask, first_rank, n_experts, chunk, RANK, False, EVEN_K, BLOCK_E,
        BLOCK_R,
    )  # fmt: skip
    if RAW:
        gates = load_gates(gates_ptr, rows, token_mask, n_experts, chunk, BLOCK_T, BLOCK_E, BLOCK_R)
        lora_a_out = weigh(lora_a_out, gates)
    return lora_a_out


@triton.jit
def load_both(
    lora_a_out_at, lora_a_out_up_at, token_mask, up_mask, n_experts,
    EPILOGUE: tl.constexpr, RANK: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s of the first chunk of experts, and of up's where it has its own; not weighted."""
    lora_a_out = load_ranks(
        lora_a_out_at, token_mask, 0, n_experts, 0, RANK, False, EVEN_K, BLOCK_E, BLOCK_R
    )  # fmt: skip
    lora_a_out_up = lora_a_out
    if EPILOGUE == 1 or EPILOGUE == 2:
        lora_a_out_up = load_ranks(
            lora_a_out_up_at, up_mask, 0, n_experts, 0, RANK, False, EVEN_K, BLOCK_E, BLOCK_R
        )  # fmt: skip
    return lora_a_out, lora_a_out_up


@triton.jit
def add_deltas(
    y, first_b, first_s, lora_a_out_at, gates_ptr, active_bits, listed_ptr, b_at, rows, token_mask,
    col_mask, n_experts, RANK: tl.constexpr, RAW: tl.constexpr, SKIP: tl.constexpr,
    LISTED: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr, ONE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y + Σ_e s[rows, e] B[columns, e], [BLOCK_T, BLOCK_OUT] float32; ONE: one chunk is all;
    LISTED: which chunks these rows have stands in a list, behind their number."""
    if ONE:
        first_b = first_b.to(first_s.dtype)  # from fp8
        return tl.dot(first_s, tl.trans(first_b), y, input_precision="ieee")
    BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    count = tl.cdiv(n_experts, BLOCK_E)
    if LISTED:
        count = tl.load(listed_ptr)
    for i in range(count * BLOCKS):
        chunk, first_rank = i // BLOCKS, i % BLOCKS * BLOCK_R
        if LISTED:
            chunk = tl.load(listed_ptr + 1 + chunk)
        expert_mask = True
        if SKIP:  # BLOCK_E is 1: is this expert there?
            expert_mask = (active_bits >> chunk) & 1 != 0
        if expert_mask:
            b = load_ranks(
                b_at, col_mask, first_rank, n_experts, chunk, RANK, EVEN, EVEN_K, BLOCK_E, BLOCK_R
            )
            lora_a_out = load_s(
                lora_a_out_at, gates_ptr, rows, first_rank, token_mask, n_experts, chunk,
                RANK, RAW, EVEN_K, BLOCK_T, BLOCK_E, BLOCK_R,
            )  # fmt: skip
            b = b.to(lora_a_out.dtype)
            y = tl.dot(lora_a_out, tl.trans(b), y, input_precision="ieee")
    return y
