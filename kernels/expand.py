"""LoRA expand of the chosen experts, added to the projection's output, part by part:

    y[t, offset_p : offset_p + width_p] += sum_j s[t, p, j] B[expert_ids[t, j]][:, columns of p]

SGMM's second half (AdaFuse, arXiv 2603.11873, section 3), here as one matrix product over all
experts with zeros where a token does not use one.
"""

from __future__ import annotations

import torch

from vllm_adafuse.kernels.registry import matmul_f32, register_op


def expand_torch(
    y: torch.Tensor,
    s: torch.Tensor,
    bank_b: torch.Tensor,
    expert_ids: torch.Tensor,
    offsets: list[int],
    widths: list[int],
) -> None:
    tokens, parts, _, rank = s.shape
    experts = bank_b.shape[0]
    index = expert_ids[:tokens].long()[:, None, :, None].expand(-1, parts, -1, rank)
    spread = s.new_zeros(tokens, parts, experts, rank).scatter_(2, index, s)
    spread = spread.to(y.dtype).view(tokens, parts, experts * rank)
    column = 0
    for part, (offset, width) in enumerate(zip(offsets, widths)):
        b = bank_b[:, :, column : column + width].reshape(experts * rank, width)
        y[:, offset : offset + width] += matmul_f32(spread[:, part], b)
        column += width


def _fake(y, s, bank_b, expert_ids, offsets, widths):
    return None


_op = register_op(
    "expand(Tensor(a!) y, Tensor s, Tensor bank_b, Tensor expert_ids, int[] offsets, "
    "int[] widths) -> ()",
    expand_torch,
    _fake,
)


def expand(
    y: torch.Tensor,
    s: torch.Tensor,
    bank_b: torch.Tensor,
    expert_ids: torch.Tensor,
    offsets: list[int],
    widths: list[int],
) -> None:
    """Adds the deltas of T tokens to y in place.

    Args:
        y: [T, out], the projection's own output, changed.
        s: [T, P, k, R] float32, from `shrink`.
        bank_b: [E, R, sum(widths)], dtype of y; the parts side by side.
        expert_ids: [N, k] int32, N >= T.
        offsets: where each part begins in y.
        widths: columns of each part.
    """
    _op(y, s, bank_b, expert_ids, offsets, widths)
