"""A step's routes from the hidden states that enter a layer (`router.layer`), inside the model:

    u = hidden + residual                     what enters the layer, in the model's dtype
    expert_ids[t], weights[t] = gate(u[t])    see gate.py

The routes stand in the step's static buffers, as those of the passports do.
"""

from __future__ import annotations

import torch
from vllm_adafuse.kernels.gate import Gate, gate_torch
from vllm_adafuse.kernels.registry import register_op

# Rows routed at once: bounds the float64 copy of their hidden states.
CHUNK = 1024


def _run(
    hidden, residual, router, expert_ids, weights, norm_eps, temperature, softmax_first
) -> None:
    made = Gate(*router, norm_eps, temperature, expert_ids.shape[1], softmax_first)
    for start in range(0, hidden.shape[0], CHUNK):
        rows = slice(start, min(start + CHUNK, hidden.shape[0]))
        u = hidden[rows] if residual is None else hidden[rows] + residual[rows]
        ids, gates = gate_torch(u, made)
        expert_ids[rows].copy_(ids)
        weights[rows].copy_(gates)


def _fake(*arguments) -> None:
    return None


_op = register_op(
    "live_route(Tensor hidden, Tensor? residual, Tensor?[] router, Tensor(a!) expert_ids, "
    "Tensor(b!) weights, float norm_eps, float temperature, bool softmax_first) -> ()",
    _run,
    _fake,
)


def live_route(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    router: Gate,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Writes the routes of T tokens into the first T rows of the step's static buffers.

    Args:
        hidden: [T, H], any float dtype.
        residual: [T, H], what is still to be added to it, or None.
        router: that decides; its k is that of the buffers.
        expert_ids: [N, k] int32, N >= T, written.
        weights: [N, k] float32, written.
    """
    _op(
        hidden, residual, router.tensors, expert_ids, weights,
        router.norm_eps, router.temperature, router.softmax_first,
    )  # fmt: skip
