"""Expand of long batches by cuBLAS, against float64."""

import pytest
import torch
from ops import (
    delta_truth,
    error,
    from_fused,
    fused_weight_of,
    hide_from_others,
    in_whole_numbers,
    make_problem,
    plain_delta,
)
from vllm_adafuse.kernels.dense_expand import dense_expand_triton

SHAPES = {  # (tokens, in, widths, experts, k, rank), adapted, first
    "one-token": ((1, 40, [72], 16, 2, 16), None, 0),
    "odd-rank": ((37, 32, [66], 5, 2, 5), None, 0),
    "rank-40": ((37, 32, [48, 40], 20, 3, 40), None, 8),
    "three-adapted": ((130, 24, [64, 32, 32], 16, 2, 16), None, 8),
    "holes": ((37, 32, [24, 40, 32], 20, 2, 5), [0, -1, 1], 0),
    "first-has-none": ((37, 32, [24, 40], 5, 2, 16), [-1, 0], 3),
    "many-experts": ((130, 24, [64, 64], 64, 2, 16), None, 8),
    "every-expert": ((37, 32, [64], 5, 5, 16), None, 4),
    "a-large-rank": ((3, 24, [40], 2, 1, 300), None, 1),
}


def only_from(p, first):
    """The problem without the experts before."""
    p.gates[: len(p.x), :first] = 0
    return p


def make(name, dtype=torch.float32):
    shape, adapted, first = SHAPES[name]
    return make_problem(*shape, adapted=adapted, dtype=dtype), first


def run(p, y, s, first):
    dense_expand_triton(y, s, p.lora_b, p.gates, p.adapted, p.widths, first)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name):
    p, first = make(name)
    y, s = from_fused(p)
    before, raw = y.double(), s.clone().unflatten(1, (-1, *p.lora_b.shape[1:]))
    run(p, y, s, first)
    assert error(y, before + delta_truth(only_from(p, first))) <= 1e-5
    # Others are left to whoever follows, as they were.
    assert torch.equal(s.view_as(raw)[:, :, :first], raw[:, :, :first])


@pytest.mark.parametrize("name", ["odd-rank", "three-adapted", "holes"])
def test_what_others_see_of_an_expert_does_not_matter(name):
    p, first = make(name)
    p = in_whole_numbers(p)
    y, s = from_fused(p)
    apart, broken = y.clone(), s.clone()
    run(p, apart, s, first)
    hide_from_others(p, broken)
    run(p, y, broken, first)
    assert torch.equal(y, apart)
    of_first = broken.unflatten(1, (-1, *p.lora_b.shape[1:]))[:, :, first:]
    assert (of_first[(p.gates[: len(y), None, first:] == 0).expand(of_first.shape[:3])] == 0).all()


def test_parts_without_experts_stay():
    p, first = make("holes")
    y, s = from_fused(p)
    before = y.clone()
    run(p, y, s, first)
    assert torch.equal(y[:, 24:64], before[:, 24:64])
    assert not torch.equal(y[:, :24], before[:, :24])


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("name", ["three-adapted", "holes", "many-experts"])
def test_half_precision_is_no_worse_than_plain_torch(name, dtype):
    p, first = make(name, dtype)
    y, s = p.x @ p.weight.T, p.x @ p.lora_a.flatten(0, 2).T
    before = y.clone()
    run(p, y, s, first)
    p = only_from(p, first)
    truth = p.x.double() @ p.weight.double().T + delta_truth(p)
    assert error(y, truth) <= 1.2 * error(before + plain_delta(p), truth)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [16, 20, 64])
@pytest.mark.parametrize("first", [0, 8])
def test_a_long_batch_in_half_precision(experts, first):
    p = make_problem(2000, 512, [1024, 512, 512], experts, 2, 16, dtype=torch.bfloat16)
    both = p.x @ fused_weight_of(p).T
    y, s = both.split([2048, both.shape[1] - 2048], 1)
    before = y.clone()
    run(p, y, s, first)
    p = only_from(p, first)
    truth = p.x.double() @ p.weight.double().T + delta_truth(p)
    assert error(y, truth) <= 1.2 * error(before + plain_delta(p), truth)
