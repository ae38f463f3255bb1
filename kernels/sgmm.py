"""SGMM, segmented gather matrix multiplication: the deltas of all chosen experts of one projection.

    y[t] += Σ_e gates[t, e] B[e] (A[e] x[t])

(AdaFuse, arXiv 2603.11873, section 3; for a packed projection every part has its own A.) It is
`shrink`, then `expand`, added to whatever the projection itself computed: the way over a quantised
backbone. Which kernels run depends on the number of tokens alone, so that one captured CUDA graph
per size is right for every routing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm_adafuse.kernels.dispatch import MAX_SHRINK_TOKENS
from vllm_adafuse.kernels.expand import expand_torch, expand_triton
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.scratch import Scratch
from vllm_adafuse.kernels.shrink import shrink_torch, shrink_triton


def sgmm_torch(y, x, bank_a, bank_b, gates, parts, widths) -> None:
    """The reference; see `sgmm`."""
    expand_torch(y, shrink_torch(x, bank_a, gates), bank_b, parts, widths)


def run(y, x, bank_a, bank_b, gates, present, low, partial, tickets, unread, parts, widths):
    """What the op does, for ops that do it at times."""
    if not x.is_cuda:
        return sgmm_torch(y, x, bank_a, bank_b, gates, parts, widths)
    if x.shape[0] <= MAX_SHRINK_TOKENS:
        scratch = Scratch(low, partial, tickets, unread)
        s = shrink_triton(x, bank_a, gates, present, scratch)
    else:
        s = shrink_torch(x, bank_a, gates)
    expand_triton(y, s, bank_b, present, parts, widths)
    return None


def _fake(*arguments) -> None:
    return None


# The scratch is changed and nothing of it is read by any other op: torch need not know.
_op = register_op(
    "sgmm(Tensor(a!) y, Tensor x, Tensor bank_a, Tensor bank_b, Tensor gates, Tensor present, "
    "Tensor low, Tensor partial, Tensor tickets, Tensor unread, int[] parts, int[] widths) "
    "-> ()",
    run,
    _fake,
)


def sgmm(
    y: torch.Tensor,
    x: torch.Tensor,
    bank_a: torch.Tensor,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    scratch: Scratch,
    parts: Sequence[int],
    widths: Sequence[int],
) -> None:
    """Adds the experts' deltas of T tokens to a projection's output, in place.

    Args:
        y: [T, out], the projection's own output, changed; rows contiguous.
        x: [T, in], its input, dtype of y; rows contiguous.
        bank_a: [P, E, R, in], dtype of x.
        bank_b: [sum of the adapted widths, E, R], dtype of x.
        gates: [N, E] float32, N >= T, LoRA's scale included; rows past T are not read.
        present: see `spread_routes`; its bits are read.
        scratch: of the device.
        parts: for each of up to three parts of y its index in the banks, -1 for none.
        widths: columns of each part.
    """
    _op(
        y, x, bank_a, bank_b, gates, present,
        scratch.low, scratch.partial, scratch.tickets, scratch.unread, parts, widths,
    )  # fmt: skip
