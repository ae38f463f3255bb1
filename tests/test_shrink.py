"""Shrink alone: partial sums over slices of `in` add up; experts not chosen are not read."""

import pytest
import torch
from ops import error, make_problem, shrink_truth
from vllm_adafuse.kernels.shrink import shrink_torch, shrink_triton, splits

SHAPES = {
    "small": (3, 64, [32], 2, 1, 4),
    "split": (2, 700, [32, 32], 4, 2, 8),
    "odd": (5, 333, [32, 16, 16], 3, 3, 7),
    "rank-256": (2, 96, [32], 2, 1, 256),
}


@pytest.mark.parametrize("run", [shrink_torch, shrink_triton])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name, run):
    p = make_problem(*SHAPES[name])
    s = run(p.x, p.bank_a, p.expert_ids, p.weights)
    assert error(s.sum(0), shrink_truth(p)) <= 1e-5


def test_slices_depend_on_the_bank_alone():
    assert splits(3, 8, 4096) == 10
    assert splits(1, 64, 64) == 1
    assert splits(1, 1, 11008) == 16


def test_experts_not_chosen_are_not_read():
    p = make_problem(2, 64, [32], 4, 1, 4, one=1)
    p.bank_a[:, [0, 2, 3]] = float("nan")
    assert torch.isfinite(shrink_triton(p.x, p.bank_a, p.expert_ids, p.weights)).all()
