"""A step's routes from the passports: expert_ids[t] = table_ids[token[t]], weights alike.

The passports are the routes of the whole vocabulary, computed once at load: before any context a
token's route is a function of its id alone.
"""

from __future__ import annotations

import torch

from vllm_adafuse.kernels.registry import register_op


def gather_routes_torch(
    token_ids: torch.Tensor,
    table_ids: torch.Tensor,
    table_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    rows = token_ids.shape[0]
    # Padding rows of a captured graph may hold any id: their routes must still be valid experts.
    tokens = token_ids.clamp(0, table_ids.shape[0] - 1)
    torch.index_select(table_ids, 0, tokens, out=expert_ids[:rows])
    torch.index_select(table_weights, 0, tokens, out=weights[:rows])


def _fake(token_ids, table_ids, table_weights, expert_ids, weights):
    return None


_op = register_op(
    "gather_routes(Tensor token_ids, Tensor table_ids, Tensor table_weights, "
    "Tensor(a!) expert_ids, Tensor(b!) weights) -> ()",
    gather_routes_torch,
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
        token_ids: [T] int32 or int64; ids outside the vocabulary are clamped into it.
        table_ids: [V, k] int32 passports.
        table_weights: [V, k] float32.
        expert_ids: [N, k] int32, N >= T, written.
        weights: [N, k] float32, written.
    """
    _op(token_ids, table_ids, table_weights, expert_ids, weights)
