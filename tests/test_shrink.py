"""Shrink alone: slices of `in` add up, absent experts are not read, rows of others are zero."""

import pytest
import torch
from ops import SHAPES, error, in_whole_numbers, make_problem, shrink_truth
from vllm_adafuse.kernels.shrink import ShrinkGrid, shrink_torch, shrink_triton


def by_torch(p):
    return shrink_torch(p.x, p.lora_a, p.gates)


def by_triton(p):
    return shrink_triton(p.x, p.lora_a, p.gates, p.active, p.workspace)


@pytest.mark.parametrize("run", [by_torch, by_triton])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64_and_is_zero_where_not_chosen(name, run):
    p = make_problem(*SHAPES[name])
    truth, s = shrink_truth(p), run(p)
    assert error(s, truth) <= 1e-5
    assert torch.equal(s == 0, truth == 0)


def test_a_second_launch_finds_its_tickets_at_zero():
    p = in_whole_numbers(make_problem(3, 8192, [32], 3, 1, 20))
    assert ShrinkGrid.of(p.lora_a).split_k == 8
    for _ in range(2):
        p.workspace.lora_a_out.fill_(255)
        assert torch.equal(by_triton(p).double(), shrink_truth(p))
    assert not p.workspace.split_k_semaphores.any()


def test_the_cut_depends_on_the_bank_alone():
    a = torch.empty(3, 8, 16, 11008, device="meta")
    assert ShrinkGrid.of(a) == ShrinkGrid(block_r=16, split_k=8, slots=24)
    assert ShrinkGrid.of(a, 2) == ShrinkGrid(block_r=16, split_k=2, slots=24)
    a = torch.empty(3, 64, 64, 4096, device="meta")
    assert ShrinkGrid.of(a) == ShrinkGrid(block_r=32, split_k=2, slots=384)
    a = torch.empty(1, 64, 100, 64, device="meta")
    assert ShrinkGrid.of(a) == ShrinkGrid(block_r=32, split_k=1, slots=256)


def test_experts_not_chosen_are_not_read():
    p = make_problem(2, 64, [32], 4, 1, 4, one=1)
    p.lora_a[:, [0, 2, 3]] = float("nan")
    assert torch.isfinite(by_triton(p)).all()
