"""SGMM, segmented gather matrix multiplication: the deltas of all chosen experts of one projection.

    y[t] += Σ_j weights[t, j] B[expert_ids[t, j]] (A[expert_ids[t, j]] x[t])

(AdaFuse, arXiv 2603.11873, section 3; for a packed projection every part has its own A.) It is
`shrink`, then `expand`. Which kernels run depends on the number of tokens alone, so that one
captured CUDA graph per size is right for every routing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vllm_adafuse.kernels.expand import expand_torch, expand_triton
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.shrink import shrink_torch, shrink_triton

# Up to this many tokens the gathering kernels run, beyond it dense products over all experts.
MAX_DECODE_TOKENS = 256


def sgmm_torch(y, x, bank_a, bank_b, expert_ids, weights, offsets, widths) -> None:
    """The reference; see `sgmm`."""
    s = shrink_torch(x, bank_a, expert_ids, weights)
    expand_torch(y, s, bank_b, expert_ids, offsets, widths)


def sgmm_triton(y, x, bank_a, bank_b, expert_ids, weights, offsets, widths) -> None:
    """The decode kernels; see `sgmm`."""
    s = shrink_triton(x, bank_a, expert_ids, weights)
    expand_triton(y, s, bank_b, expert_ids, offsets, widths)


def _run(y, x, bank_a, bank_b, expert_ids, weights, offsets, widths) -> None:
    run = sgmm_triton if x.is_cuda and x.shape[0] <= MAX_DECODE_TOKENS else sgmm_torch
    run(y, x, bank_a, bank_b, expert_ids, weights, offsets, widths)


def _fake(y, x, bank_a, bank_b, expert_ids, weights, offsets, widths) -> None:
    return None


_op = register_op(
    "sgmm(Tensor(a!) y, Tensor x, Tensor bank_a, Tensor bank_b, Tensor expert_ids, "
    "Tensor weights, int[] offsets, int[] widths) -> ()",
    _run,
    _fake,
)


def sgmm(
    y: torch.Tensor,
    x: torch.Tensor,
    bank_a: torch.Tensor,
    bank_b: torch.Tensor,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    offsets: Sequence[int],
    widths: Sequence[int],
) -> None:
    """Adds the experts' deltas of T tokens to a projection's output, in place.

    Args:
        y: [T, out], the projection's own output, changed; rows contiguous.
        x: [T, in], its input, dtype of y; rows contiguous.
        bank_a: [P, E, R, in], dtype of x.
        bank_b: [E, R, sum(widths)], dtype of x; the parts side by side.
        expert_ids: [N, k] int32, N >= T, the step's routes; rows past T are not read.
        weights: [N, k] float32, LoRA's scale included.
        offsets: where each of the P parts begins in y.
        widths: columns of each part.
    """
    _op(y, x, bank_a, bank_b, expert_ids, weights, offsets, widths)
