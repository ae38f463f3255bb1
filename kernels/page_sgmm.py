"""SGMM over expert pages, in the steps that have adapters; the others run what vLLM runs.

Whether a step has any says a flag on the host, read when the op runs: compiled models hold steps of
both kinds, and a CUDA graph holds what was true at its capture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm_adafuse.kernels import sgmm
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.scratch import Scratch


def _run(y, x, active, *arguments) -> None:
    if active.item():
        sgmm.run(y, x, *arguments)


def _fake(*arguments) -> None:
    return None


_op = register_op(
    "page_sgmm(Tensor(a!) y, Tensor x, Tensor active, Tensor bank_a, Tensor bank_b, Tensor gates, "
    "Tensor present, Tensor low, Tensor partial, Tensor tickets, Tensor unread, int[] parts, "
    "int[] widths) -> ()",
    _run,
    _fake,
)


def page_sgmm(
    y: torch.Tensor,
    x: torch.Tensor,
    active: torch.Tensor,
    bank_a: torch.Tensor,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    scratch: Scratch,
    parts: Sequence[int],
    widths: Sequence[int],
) -> None:
    """Adds the deltas of a step's adapters to a projection's output, in place.

    Args:
        active: [1] bool on the CPU: the step has adapters; else nothing happens.
        y, x, bank_a, bank_b, gates, present, scratch, parts, widths: as `sgmm` takes them, a page
            for an expert.
    """
    _op(
        y, x, active, bank_a, bank_b, gates, present,
        scratch.low, scratch.partial, scratch.tickets, scratch.unread, parts, widths,
    )  # fmt: skip
