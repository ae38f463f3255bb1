"""An adapted projection whose own weight is not quantised, with what follows it:

    y = x Wᵀ + bias + Σ_e gates[:, e] B[e] A[e] x          (SGMM, see sgmm.py)
    out = y, or act(y_gate) * y_up for gate_up

Few tokens take one launch that streams W (stream_linear.py). Beyond them the vendor's product does
the base, and the experts ride on the pass of the activation where there is one. The choice falls
by the number of tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vllm_adafuse.kernels.expand import (
    activate_torch,
    expand_act_triton,
    expand_torch,
    expand_triton,
)
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.scratch import Scratch
from vllm_adafuse.kernels.sgmm import shrink
from vllm_adafuse.kernels.shrink import shrink_torch
from vllm_adafuse.kernels.stream_linear import MAX_STREAM_TOKENS, stream_linear_triton


def linear_torch(x, weight, bias, bank_a, bank_b, gates, parts, widths, activation):
    """The reference; see `linear`."""
    y = F.linear(x, weight, bias)
    expand_torch(y, shrink_torch(x, bank_a, gates), bank_b, parts, widths)
    return activate_torch(y, activation) if activation else y


def _run(
    x, weight, bias, bank_a, bank_b, gates, present, counters, index, low, partial, tickets, unread,
    parts, widths, activation,
):  # fmt: skip
    if not x.is_cuda:
        return linear_torch(x, weight, bias, bank_a, bank_b, gates, parts, widths, activation)
    scratch = Scratch(low, partial, tickets, unread)
    if x.shape[0] <= MAX_STREAM_TOKENS:
        return stream_linear_triton(
            x, weight, bias, bank_a, bank_b, gates, present, counters[index], scratch,
            parts, widths, activation,
        )  # fmt: skip
    y = F.linear(x, weight, bias)
    s = shrink(x, bank_a, gates, present, scratch)
    if activation:
        return expand_act_triton(y, s, bank_b, present, parts, widths, activation)
    expand_triton(y, s, bank_b, present, parts, widths)
    return y


def _fake(x, weight, *arguments):
    return x.new_empty(x.shape[0], weight.shape[0] // (2 if arguments[-1] else 1))


# The scratch is changed and nothing of it is read by any other op: torch need not know.
_op = register_op(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor bank_a, Tensor bank_b, Tensor gates, "
    "Tensor present, Tensor counters, int index, Tensor low, Tensor partial, Tensor tickets, "
    "Tensor unread, int[] parts, int[] widths, str activation) -> Tensor",
    _run,
    _fake,
)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    bank_a: torch.Tensor,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    counters: torch.Tensor,
    index: int,
    scratch: Scratch,
    parts: Sequence[int],
    widths: Sequence[int],
    activation: str = "",
) -> torch.Tensor:
    """An adapted projection of T tokens.

    Args:
        x: [T, in]; rows contiguous.
        weight: [out, in] contiguous, dtype of x.
        bias: [out] or None.
        bank_a: [P, E, R, in], dtype of x.
        bank_b: [sum of the adapted widths, E, R], dtype of x.
        gates: [N, E] float32, N >= T, LoRA's scale included; rows past T are not read.
        present: [E] int32, see `spread_routes`, which also zeroes the next.
        counters: [C, 4] int32, a row for each projection.
        index: of this projection's row.
        scratch: of the device.
        parts: for each of up to three parts of the output its index in the banks, -1 for none.
        widths: columns of each part.
        activation: "", or "silu" or "gelu_tanh" of gate_up, whose two parts are equally wide.

    Returns:
        [T, out], or [T, out / 2] after an activation.
    """
    return _op(
        x, weight, bias, bank_a, bank_b, gates, present, counters, index,
        scratch.low, scratch.partial, scratch.tickets, scratch.unread,
        parts, widths, activation,
    )  # fmt: skip
