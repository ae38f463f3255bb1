"""An adapted projection, the residual's addition and the RMSNorm behind it:

    z[t] = residual[t] + W x[t] + Σ_e gates[t, e] B[:, e] A[e] x[t]
    out[t] = z[t] / sqrt(mean(z[t]²) + eps) * weight

for o_proj and down_proj, whose outputs go that way in most decoders. W and A stand in one tensor,
[W; A]. With few tokens one launch streams or tiles W, adds the deltas, and leaves sums of slices of
`in`, which the norm adds up: so a product with few rows gets programs enough, and none waits for
the last of them. Longer steps take products of the vendor's; up to some thousands of tokens an
expand adds the deltas before the norm, beyond that the norm does (residual_norm.py), or if they
have many ranks the vendor's product (dense_expand.py). SGMM (AdaFuse, arXiv 2603.11873, section 3)
for the deltas. Which, says `dispatch.plan`.
"""

from __future__ import annotations

import torch
from vllm_adafuse.kernels import linear
from vllm_adafuse.kernels.configs import MAX_SPLIT, Tiles
from vllm_adafuse.kernels.dense_expand import dense_expand_triton
from vllm_adafuse.kernels.dispatch import MAX_TILE_TOKENS, plan
from vllm_adafuse.kernels.linear import (
    expand_long,
    joint_product,
    linear_torch,
    one_launch,
    shape_of,
    sliced_product,
)
from vllm_adafuse.kernels.plans import ADD_NORM, NONE, Device
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.residual_norm import residual_norm_torch, residual_norm_triton
from vllm_adafuse.kernels.scratch import Scratch


def scratch_sizes(bank_a: torch.Tensor, rows: int) -> tuple[int, int, int]:
    """Bytes of s, floats of partial sums and tickets that a projection of `rows` rows may need."""
    low, floats, tickets = linear.scratch_sizes(bank_a, rows)
    return low, floats + MAX_SPLIT * MAX_TILE_TOKENS * rows, tickets


def slices_triton(
    x: torch.Tensor,
    joint: torch.Tensor,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    counter: torch.Tensor,
    scratch: Scratch,
    cut: Tiles,
) -> torch.Tensor:
    """The projection of few tokens in one launch, slices of `in` unadded.

    Args:
        counter: [>= 1] int32, zero; of this launch alone until the next step.
        cut: into `cut.split` slices.

    Returns:
        [split, T, out] float32 in the scratch, whose sum over slices is the projection.
    """
    out = bank_b.shape[0]
    slices = scratch.slices(cut.split, x.shape[0], out)
    return one_launch(
        x, joint, None, bank_b, gates, present, counter, scratch, [0], [out], "", cut, slices
    )


def linear_norm_torch(x, joint, residual, weight, eps, bank_b, gates):
    """The reference; see `linear_norm`."""
    y = linear_torch(x, joint, None, bank_b, gates, [0], [bank_b.shape[0]], "")
    return residual_norm_torch(y, residual, weight, eps)


def _run(
    x, joint, residual, weight, eps, bank_b, gates, present, counters, index,
    low, partial, tickets, unread,
):  # fmt: skip
    if not x.is_cuda:
        return linear_norm_torch(x, joint, residual, weight, eps, bank_b, gates)
    shape = shape_of(
        x.shape[1], *bank_b.shape[1:], x.element_size(), (0,), (bank_b.shape[0],), "norm", 0, False
    )
    way = plan(shape, x.shape[0], Device.of(x.device))
    return linear_norm_triton(
        x, joint, residual, weight, eps, bank_b, gates, present,
        counters[index] if way.config else None, Scratch(low, partial, tickets, unread), way,
    )  # fmt: skip


def linear_norm_triton(
    x, joint, residual, weight, eps, bank_b, gates, present, counter, scratch, way
):
    """`linear_norm` on a GPU, by a `Plan`."""
    out, behind = bank_b.shape[0], (residual, weight, eps, bank_b, gates)
    if way.config:
        y = slices_triton(x, joint, bank_b, gates, present, counter, scratch, way.config)
        return residual_norm_triton(y, None, *behind)
    if way.split_k > 1:
        y, s = sliced_product(x, joint, out, way.split_k)
    else:
        y, s, _ = joint_product(x, joint, None, out, way.one_gemm)
    if way.expand == ADD_NORM:
        return residual_norm_triton(y, s, *behind)
    if way.expand == NONE:
        dense_expand_triton(y, s, bank_b, gates, [0], [out], way.dense_from)
        return residual_norm_triton(y, None, *behind)
    y = expand_long(y, s, None, bank_b, gates, present, [0], [out], "", way)
    return residual_norm_triton(y, None, *behind, z=y)


def _fake(x, joint, residual, *arguments):
    return torch.empty_like(residual), torch.empty_like(residual)


# The scratch is changed and nothing of it is read by any other op: torch need not know.
_op = register_op(
    "linear_norm(Tensor x, Tensor joint, Tensor residual, Tensor weight, float eps, "
    "Tensor bank_b, Tensor gates, Tensor present, Tensor counters, int index, Tensor low, "
    "Tensor partial, Tensor tickets, Tensor unread) -> (Tensor, Tensor)",
    _run,
    _fake,
)


def linear_norm(
    x: torch.Tensor,
    joint: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    counters: torch.Tensor,
    index: int,
    scratch: Scratch,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An adapted projection of one part and no bias, and the norm behind it.

    Args:
        x: [T, in]; rows contiguous.
        joint: [H + E R, in] contiguous, dtype of x: W, then A [1, E, R, in].
        residual: [T, H], dtype of x; rows contiguous.
        weight: [H], factors of the norm.
        eps: its epsilon.
        bank_b: [H, E, R], dtype of x.
        gates, present, counters, index, scratch: as in `vllm_adafuse.kernels.linear.linear`.

    Returns:
        The normed hidden states and the new residual, [T, H] each.
    """
    return _op(
        x, joint, residual, weight, eps, bank_b, gates, present, counters, index,
        scratch.low, scratch.partial, scratch.tickets, scratch.unread,
    )  # fmt: skip
