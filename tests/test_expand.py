"""Expand alone: sums the slices of s, adds to y in place, leaves other columns alone."""

import pytest
import torch
from ops import DEVICE, delta_truth, error, make_problem, shrink_truth
from vllm_adafuse.kernels.expand import expand_torch, expand_triton


@pytest.mark.parametrize("run", [expand_torch, expand_triton])
@pytest.mark.parametrize(
    "shape", [(3, 64, [130], 4, 2, 8), (4, 32, [64, 17, 17], 3, 3, 5), (65, 32, [40], 2, 1, 16)]
)
@pytest.mark.parametrize("slices", [1, 3])
def test_equals_float64(shape, slices, run):
    p = make_problem(*shape, gap=2)
    parts = torch.softmax(torch.randn(slices, 1, 1, 1, 1, device=DEVICE), 0)
    s = (shrink_truth(p).float()[None] * parts).contiguous()
    before = p.y.double()
    run(p.y, s, p.bank_b, p.expert_ids, p.offsets, p.widths)
    assert error(p.y.double() - before, delta_truth(p)) <= 1e-5


def test_experts_not_chosen_are_not_read():
    p = make_problem(2, 32, [32], 4, 1, 4, one=2)
    p.bank_b[[0, 1, 3]] = float("nan")
    s = shrink_truth(p).float()[None].contiguous()
    expand_triton(p.y, s, p.bank_b, p.expert_ids, p.offsets, p.widths)
    assert torch.isfinite(p.y).all()
