"""A projection and its expert pages, in the steps that have adapters (`linear`); in the others what
vLLM would run: cuBLAS, and its own kernel for what follows.

Whether a step has any says a flag on the host, as for `page_sgmm`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from vllm_adafuse.kernels import linear
from vllm_adafuse.kernels.pairs import activate_torch, result_width
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.scratch import Scratch

# vLLM's kernels by the names of activations here.
_STOCK = {"silu": "silu_and_mul", "gelu_tanh": "gelu_tanh_and_mul"}


def stock(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """activation(x Wᵀ + bias) as vLLM computes it."""
    y = F.linear(x, weight, bias)
    if not activation:
        return y
    kernel = getattr(torch.ops._C, _STOCK[activation], None) if y.is_cuda else None
    if kernel is None:
        return activate_torch(y, activation)
    out = y.new_empty(y.shape[0], y.shape[1] // 2)
    kernel(out, y)
    return out


def _run(
    x, active, joint, bias, bank_b, gates, present, counters, index, low, partial, tickets, unread,
    parts, widths, activation,
):  # fmt: skip
    if not active.item():
        return stock(x, joint[: sum(widths)], bias, activation)
    return linear.run(
        x, joint, bias, bank_b, gates, present, counters, index, low, partial, tickets, unread,
        None, parts, widths, activation, "", False,
    )  # fmt: skip


def _fake(x, active, joint, bias, bank_b, *arguments):
    *_, widths, activation = arguments
    return x.new_empty(x.shape[0], result_width(widths, activation))


_op = register_op(
    "page_linear(Tensor x, Tensor active, Tensor joint, Tensor? bias, Tensor bank_b, "
    "Tensor gates, Tensor present, Tensor counters, int index, Tensor low, Tensor partial, "
    "Tensor tickets, Tensor unread, int[] parts, int[] widths, str activation) -> Tensor",
    _run,
    _fake,
)


def page_linear(
    x: torch.Tensor,
    active: torch.Tensor,
    joint: torch.Tensor,
    bias: torch.Tensor | None,
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
    """A projection of T tokens, with the deltas of the step's adapters if it has any.

    Args:
        active: [1] bool on the CPU: the step has adapters.
        x, joint, bias, bank_b, gates, present, counters, index, scratch, parts, widths: as `linear`
            takes them, a page for an expert.
        activation: "", or "silu" or "gelu_tanh" of gate_up.

    Returns:
        [T, out], or [T, out / 2] after an activation; contiguous.
    """
    return _op(
        x, active, joint, bias, bank_b, gates, present, counters, index,
        scratch.low, scratch.partial, scratch.tickets, scratch.unread, parts, widths, activation,
    )  # fmt: skip
