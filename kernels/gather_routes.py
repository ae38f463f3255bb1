"""A step's routes from the passports: expert_ids[t] = table_ids[token[t]], weights alike.

The passports are the routes of the whole vocabulary, computed once at load: before any context a
token's route is a function of its id alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.launch import launch
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.whole import cdiv, power_of_2


@triton.jit(do_not_specialize=["n_tokens"])
def _gather_routes_kernel(
    token_ptr, table_ids_ptr, table_weights_ptr, ids_ptr, weights_ptr,
    n_tokens, vocab_size, top_k,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_K)
    token = tl.load(token_ptr + rows, mask=rows < n_tokens, other=0).to(tl.int64)
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
    mask = (rows < n_tokens)[:, None] & (columns < top_k)[None, :]
    source = token[:, None] * top_k + columns[None, :]
    target = rows[:, None] * top_k + columns[None, :]
    tl.store(ids_ptr + target, tl.load(table_ids_ptr + source, mask=mask), mask=mask)
    tl.store(weights_ptr + target, tl.load(table_weights_ptr + source, mask=mask), mask=mask)


def gather_routes_triton(
    token_ids: torch.Tensor,
    table_ids: torch.Tensor,
    table_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """One launch; see `gather_routes`."""
    tokens, (vocab_size, top_k) = token_ids.shape[0], table_ids.shape
    block = 64
    launch(
        _gather_routes_kernel, (cdiv(tokens, block),),
        token_ids, table_ids, table_weights, expert_ids, weights,
        tokens, vocab_size, top_k,
        BLOCK_T=block, BLOCK_K=power_of_2(top_k),
    )  # fmt: skip


def gather_routes_torch(
    token_ids: torch.Tensor,
    table_ids: torch.Tensor,
    table_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """The reference; see `gather_routes`."""
    rows = token_ids.shape[0]
    # Padding rows of a captured graph may hold any id: their routes must still be valid experts.
    tokens = token_ids.clamp(0, table_ids.shape[0] - 1)
    torch.index_select(table_ids, 0, tokens, out=expert_ids[:rows])
    torch.index_select(table_weights, 0, tokens, out=weights[:rows])


def _run(token_ids, table_ids, table_weights, expert_ids, weights) -> None:
    run = gather_routes_triton if token_ids.is_cuda else gather_routes_torch
    run(token_ids, table_ids, table_weights, expert_ids, weights)


def _fake(token_ids, table_ids, table_weights, expert_ids, weights) -> None:
    return None


_op = register_op(
    "gather_routes(Tensor token_ids, Tensor table_ids, Tensor table_weights, "
    "Tensor(a!) expert_ids, Tensor(b!) weights) -> ()",
    _run,
    _fake,
)


def gather_routes(
    token_ids: torch.Tensor,
    table_ids: torch.Tensor,
    table_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Writes the routes of T tokens into the first T rows of the step's static buffers.

    Args:
        token_ids: [T] int32 or int64, contiguous; ids outside the vocabulary are clamped into it.
        table_ids: [V, k] int32 passports, contiguous like all tables and buffers.
        table_weights: [V, k] float32.
        expert_ids: [N, k] int32, N >= T, written.
        weights: [N, k] float32, written.
    """
    _op(token_ids, table_ids, table_weights, expert_ids, weights)
