"""SGMM as it is added to a projection's output, against float64 over odd shapes."""

import pytest
import torch
from ops import SHAPES, delta_truth, error, make_problem, plain_delta
from vllm_adafuse.kernels.expand import expand_triton
from vllm_adafuse.kernels.sgmm import sgmm_torch
from vllm_adafuse.kernels.shrink import shrink_triton


def by_torch(y, p):
    sgmm_torch(y, p.x, p.projection(fused=False), p.step())


def by_triton(y, p):
    s = shrink_triton(p.x, p.lora_a, p.gates, p.active, p.workspace)
    expand_triton(y, s, p.lora_b, p.active, p.adapted, p.widths)


def outputs(p):
    torch.manual_seed(1)
    return torch.randn(p.x.shape[0], sum(p.widths)).to(p.x)


@pytest.mark.parametrize("run", [by_torch, by_triton])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name, run):
    p = make_problem(*SHAPES[name])
    y = outputs(p)
    before = y.double()
    run(y, p)
    assert error(y.double() - before, delta_truth(p)) <= 1e-5


@pytest.mark.parametrize("run", [by_torch, by_triton])
@pytest.mark.parametrize("adapted", [[0, -1, 1], [-1, 0, -1], [0, 0, 0], [-1, -1, 0]])
def test_parts_without_experts_keep_every_bit(adapted, run):
    p = make_problem(4, 64, [40, 50, 30], 4, 2, 4, adapted=adapted)
    y = outputs(p)
    before = y.clone()
    run(y, p)
    assert error(y.double() - before.double(), delta_truth(p)) <= 1e-5
    for column, width, part in ((0, 40, adapted[0]), (40, 50, adapted[1]), (90, 30, adapted[2])):
        same = torch.equal(y[:, column : column + width], before[:, column : column + width])
        assert same == (part < 0)


@pytest.mark.parametrize("tokens", [1, 3])
def test_more_experts_than_a_word_has_bits(tokens):
    p = make_problem(tokens, 64, [40], 100, 2, 4, one=99)
    y = outputs(p)
    before = y.double()
    by_triton(y, p)
    assert error(y.double() - before, delta_truth(p)) <= 1e-5


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("name", ["packed-qkv-gqa", "thirty-tokens", "rank-256", "slices"])
def test_half_precision_is_no_worse_than_plain_torch(name, dtype):
    p = make_problem(*SHAPES[name], dtype=dtype)
    y = outputs(p)
    truth, plain = y.double() + delta_truth(p), y + plain_delta(p)
    by_triton(y, p)
    assert error(y, truth) <= 1.2 * error(plain, truth)
