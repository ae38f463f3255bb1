"""Expand alone: adds to y in place, or goes on to the activation of gate and up."""

import pytest
import torch
from ops import delta_truth, error, make_problem, shrink_truth
from vllm_adafuse.kernels.expand import (
    activate_torch,
    expand_act_triton,
    expand_torch,
    expand_triton,
)


def by_torch(y, s, p):
    expand_torch(y, s, p.bank_b, p.parts, p.widths)


def by_triton(y, s, p):
    expand_triton(y, s, p.bank_b, p.present, p.parts, p.widths)


@pytest.mark.parametrize("run", [by_torch, by_triton])
@pytest.mark.parametrize(
    "shape", [(3, 64, [130], 4, 2, 8), (4, 32, [64, 17, 17], 3, 3, 5), (65, 32, [40], 20, 2, 16)]
)
def test_equals_float64(shape, run):
    p = make_problem(*shape)
    y = torch.randn(shape[0], sum(p.widths), device=p.x.device)
    before = y.double()
    run(y, shrink_truth(p).float(), p)
    assert error(y.double() - before, delta_truth(p)) <= 1e-5


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("parts", [[0, 1], [0, 0], [-1, 0], [0, -1]])
def test_the_activation_equals_float64(parts, activation):
    p = make_problem(5, 48, [140, 140], 3, 2, 4, parts=parts)
    y = 3 * torch.randn(5, 280, device=p.x.device)
    s = shrink_truth(p).float()
    out = expand_act_triton(y, s, p.bank_b, p.present, p.parts, p.widths, activation)
    assert error(out, activate_torch(y.double() + delta_truth(p), activation)) <= 1e-5


def test_experts_not_chosen_are_not_read():
    p = make_problem(2, 32, [32], 4, 1, 4, one=2)
    p.bank_b[:, [0, 1, 3]] = float("nan")
    y = torch.zeros(2, 32, device=p.x.device)
    by_triton(y, shrink_truth(p).float(), p)
    assert torch.isfinite(y).all() and y.any()
