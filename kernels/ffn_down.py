"""The deltas of a down projection whose experts read activations of their own (see `ffn_mix`):

    y[t] += Σ_e B[e] (gates[t, e] scale[e] low[j(t, e), t, e])         low[j, t, e] = A[e] x[j, t]

j(t, e) is the place of expert e among the chosen ones of token t. Parts that are always on read the
mixture, x[0].
"""

from __future__ import annotations

import torch
from vllm_adafuse.kernels.expand import expand_torch, expand_triton
from vllm_adafuse.kernels.ffn_mix import slots_of
from vllm_adafuse.kernels.registry import register_op


def s_of_slots(low, gates, scales, tokens, rank, always, shared, dtype) -> torch.Tensor:
    """s [T, 1, E' R] of low [(1 + k) T, EA R]: each expert's from its own place, weighted."""
    experts = gates.shape[-1]
    low = low.view(-1, tokens, low.shape[1] // rank, rank)
    own = gates[:tokens, 0]
    place = slots_of(own, low.shape[0] - 1)
    at = torch.arange(experts, device=low.device)
    row = torch.arange(tokens, device=low.device)[:, None]
    chosen = low[place, row, torch.zeros_like(at) if shared else at]
    weights = (own * scales[:experts])[..., None]
    s = torch.where(weights != 0, weights * chosen, 0.0)
    if always:
        s = torch.cat([s, low[0, :, -always:] * scales[experts:, None]], 1)
    return s.to(dtype).view(tokens, 1, -1)


def _run(y, low, gates, scales, present, bank_b, always, shared) -> None:
    rank, width = bank_b.shape[2], y.shape[1]
    s = s_of_slots(low, gates, scales, y.shape[0], rank, always, shared, y.dtype)
    if y.is_cuda:
        expand_triton(y, s, bank_b, present, [0], [width])
    else:
        expand_torch(y, s, bank_b, [0], [width])


def _fake(*arguments) -> None:
    return None


_op = register_op(
    "ffn_down(Tensor(a!) y, Tensor low, Tensor gates, Tensor scales, Tensor present, "
    "Tensor bank_b, int always, bool shared) -> ()",
    _run,
    _fake,
)


def ffn_down(
    y: torch.Tensor,
    low: torch.Tensor,
    gates: torch.Tensor,
    scales: torch.Tensor,
    present: torch.Tensor,
    bank_b: torch.Tensor,
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
        present: [1] int64, see `route_layer`.
        bank_b: [out, E', R], dtype of y.
        always: experts past E that are always on.
        shared: one A serves all other experts.
    """
    _op(y, low, gates, scales, present, bank_b, always, shared)
