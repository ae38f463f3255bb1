"""A step's routes from the hidden states that enter a layer (`router.layer`), inside the model:

    u = hidden + residual                     what enters the layer, in the model's dtype
    expert_ids[t], weights[t] = gate(u[t])    see gate.py

The routes stand in the step's static buffers, as those of the passports do.
"""

from __future__ import annotations

import torch
from vllm_adafuse.kernels.gate import gate_torch
from vllm_adafuse.kernels.registry import register_op

# Rows routed at once: bounds the float64 copy of their hidden states.
CHUNK = 1024


def live_route_torch(
    hidden, residual, router_weight, router_bias, norm_weight, scales, expert_ids, weights,
    norm_eps, temperature, top_k, softmax_first,
) -> None:  # fmt: skip
    for start in range(0, hidden.shape[0], CHUNK):
        rows = slice(start, min(start + CHUNK, hidden.shape[0]))
        u = hidden[rows] if residual is None else hidden[rows] + residual[rows]
        ids, gates = gate_torch(
            u, router_weight, router_bias, norm_weight, scales,
            norm_eps, temperature, top_k, softmax_first,
        )  # fmt: skip
        expert_ids[rows].copy_(ids)
        weights[rows].copy_(gates)


def _fake(*arguments) -> None:
    return None


_op = register_op(
    "live_route(Tensor hidden, Tensor? residual, Tensor router_weight, Tensor? router_bias, "
    "Tensor? norm_weight, Tensor scales, Tensor(a!) expert_ids, Tensor(b!) weights, "
    "float norm_eps, float temperature, int top_k, bool softmax_first) -> ()",
    live_route_torch,
    _fake,
)


def live_route(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    router_weight: torch.Tensor,
    router_bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    scales: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    norm_eps: float,
    temperature: float,
    top_k: int,
    softmax_first: bool,
) -> None:
    """Writes the routes of T tokens into the first T rows of the step's static buffers.

    Args:
        hidden: [T, H], any float dtype.
        residual: [T, H], what is still to be added to it, or None.
        expert_ids: [N, k] int32, N >= T, written.
        weights: [N, k] float32, written.
        router_weight, router_bias, norm_weight, scales, norm_eps, temperature, top_k,
            softmax_first: as in `vllm_adafuse.kernels.gate.gate`.
    """
    _op(
        hidden, residual, router_weight, router_bias, norm_weight, scales, expert_ids, weights,
        norm_eps, temperature, top_k, softmax_first,
    )  # fmt: skip
