"""Random problems for the kernels, a float64 truth, and the error that counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm_adafuse.config import AdapterConfig  # noqa: F401  (the package must be installed)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Problem:
    """One projection: see `vllm_adafuse.kernels.sgmm.sgmm`."""

    y: torch.Tensor
    x: torch.Tensor
    bank_a: torch.Tensor
    bank_b: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    offsets: list[int]
    widths: list[int]

    def arguments(self) -> tuple:
        return tuple(vars(self).values())


def make_problem(
    tokens, size_in, widths, experts, top_k, rank, dtype=torch.float32, gap=0, seed=0, one=None
) -> Problem:
    """Scaled normal data; `gap` columns of y before each part belong to no part.

    Args:
        one: put every token on this expert first (top_k 1 only makes all equal).
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(DEVICE)

    ids = torch.rand(tokens + 3, experts, generator=g).argsort(1)[:, :top_k].int()
    if one is not None:
        ids[:, 0] = one
        for row in ids:  # the others stay distinct
            row[1:] = torch.tensor([e for e in range(experts) if e != one][: top_k - 1])
    offsets, end = [], 0
    for width in widths:
        offsets.append(end + gap)
        end += gap + width
    return Problem(
        y=normal(tokens, end + gap),
        x=normal(tokens, size_in),
        bank_a=normal(len(widths), experts, rank, size_in, scale=size_in**-0.5),
        bank_b=normal(experts, rank, sum(widths), scale=rank**-0.5),
        expert_ids=ids.to(DEVICE),
        weights=torch.rand(tokens + 3, top_k, generator=g).to(DEVICE),
        offsets=offsets,
        widths=list(widths),
    )


def shrink_truth(p: Problem) -> torch.Tensor:
    """s [T, P, k, R] in float64, token by token."""
    tokens = p.x.shape[0]
    rows = []
    for t in range(tokens):
        chosen = p.expert_ids[t].long()
        s = torch.einsum("pjri,i->pjr", p.bank_a[:, chosen].double(), p.x[t].double())
        rows.append(s * p.weights[t].double()[None, :, None])
    return torch.stack(rows)


def delta_truth(p: Problem) -> torch.Tensor:
    """The deltas [T, out] in float64; zero where no part is."""
    s, delta = shrink_truth(p), torch.zeros_like(p.y, dtype=torch.float64)
    for t in range(p.x.shape[0]):
        b = p.bank_b[p.expert_ids[t].long()].double()
        column = 0
        for part, (offset, width) in enumerate(zip(p.offsets, p.widths)):
            columns = b[:, :, column : column + width]
            delta[t, offset : offset + width] = torch.einsum("jr,jro->o", s[t, part], columns)
            column += width
    return delta


def error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error ‖out − truth‖ / ‖truth‖; NaN never passes a comparison."""
    return ((out.double() - truth).norm() / truth.norm()).item()
