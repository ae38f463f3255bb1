"""Expand of long batches, against float64."""

import pytest
import torch
from ops import DEVICE, error, linear_truth, make_problem, twice_from_joint
from vllm_adafuse.kernels.blocks import ExpandBlocks
from vllm_adafuse.kernels.pairs import rotate_torch
from vllm_adafuse.kernels.wide_expand import wide_expand_triton

SHAPES = {  # tokens, in, widths, experts, k, rank
    "one-part": (70, 48, [128], 4, 2, 16, ""),
    "three-parts": (33, 32, [192, 64, 64], 3, 2, 16, ""),
    "gate-up": (40, 48, [192, 192], 8, 2, 16, "silu"),
    "gelu": (16, 32, [64, 64], 2, 1, 32, "gelu_tanh"),
    "rotary": (37, 32, [128, 64, 64], 4, 2, 16, "rotary"),
    "one-expert": (17, 32, [128], 1, 1, 64, ""),
}


def run(p, activation, cos_sin=None, blocks=None):
    x = p.x.double()
    y = (x @ p.weight.double().T).to(p.x.dtype)
    s = (x @ p.bank_a.flatten(0, 2).double().T).to(p.x.dtype)
    return wide_expand_triton(y, s, p.bank_b, p.gates, p.widths, activation, blocks, cos_sin)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name):
    *shape, activation = SHAPES[name]
    p = make_problem(*shape)
    cos_sin = None
    want = linear_truth(p, "" if activation == "rotary" else activation)
    if activation == "rotary":
        cos_sin = torch.randn(50, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        want = rotate_torch(want, cos_sin.double(), p.widths[0] + p.widths[1])
    found = run(p, activation, cos_sin, ExpandBlocks(16, 32, 2, 4, 2))
    assert error(found, want) <= 1e-5
    if activation == "rotary":  # by halves of halves of a head
        assert torch.equal(run(p, activation, cos_sin, ExpandBlocks(16, 16, 2, 4, 2)), found)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_of_any_size(activation):
    p = make_problem(40, 48, [64, 64], 8, 2, 16)
    p.x *= 100
    found, want = run(p, activation), linear_truth(p, activation)
    assert error(found, want) <= 1e-5
    if activation == "silu":  # far down its tail, too; float64 loses the other's
        below = (want.abs() < 1e-30) & (want != 0)
        assert below.any() and found[below].abs().max() < 1e-30


@pytest.mark.parametrize("name", ["one-part", "gate-up", "rotary"])
def test_rows_of_a_joint_product_come_back_contiguous(name):
    *shape, activation = SHAPES[name]
    p = make_problem(*shape)
    cos_sin = torch.randn(50, 64, device=DEVICE) if activation == "rotary" else None
    apart = run(p, activation, cos_sin)
    both = p.x.double() @ torch.cat([p.weight, p.bank_a.flatten(0, 2)]).double().T
    y, s = both.to(p.x.dtype).split([p.weight.shape[0], len(both[0]) - p.weight.shape[0]], 1)
    found = wide_expand_triton(y, s, p.bank_b, p.gates, p.widths, activation, None, cos_sin)
    assert found.is_contiguous() and torch.equal(found, apart)


@pytest.mark.parametrize("name", ["gate-up", "gelu"])
def test_an_activation_in_place(name):
    *shape, activation = SHAPES[name]
    p = make_problem(*shape)
    out, apart, in_y = twice_from_joint(p, lambda y, s, in_place: wide_expand_triton(
        y, s, p.bank_b, p.gates, p.widths, activation, ExpandBlocks(16, 32, 2, 4, 2),
        in_place=in_place,
    ))  # fmt: skip
    assert in_y and torch.equal(out, apart)


@pytest.mark.parametrize("widths", [[320, 128, 128], [256, 128], [192]])
def test_default_cuts_reach_every_column(widths):
    p = make_problem(70, 16, widths, 2, 1, 16)
    assert error(run(p, ""), linear_truth(p)) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [600, 5000])
@pytest.mark.parametrize("name", ["qkv", "gate_up", "o"])
def test_half_precision_is_no_worse_than_plain_torch(name, tokens):
    widths, activation = {
        "qkv": ([1024, 512, 512], "rotary"), "gate_up": ([2752, 2752], "silu"), "o": ([1024], ""),
    }[name]  # fmt: skip
    p = make_problem(tokens, 256, widths, 8, 2, 16, dtype=torch.bfloat16)
    cos_sin = None
    follows = "" if activation == "rotary" else activation
    truth, plain = linear_truth(p, follows), linear_truth(p, follows, torch.bfloat16)
    if activation == "rotary":
        cos_sin = torch.randn(tokens, 128, device=DEVICE).bfloat16()
        truth = rotate_torch(truth, cos_sin.double(), 1536)
        plain = rotate_torch(plain, cos_sin, 1536)
    y, s = p.x @ p.weight.T, p.x @ p.bank_a.flatten(0, 2).T
    found = wide_expand_triton(y, s, p.bank_b, p.gates, widths, activation, cos_sin=cos_sin)
    assert error(found, truth) <= 1.2 * error(plain, truth)
