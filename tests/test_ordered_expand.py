"""Expand of long batches in the order of their experts, against float64."""

import pytest
import torch
from ops import DEVICE, error, linear_truth, make_order, make_problem, twice_from_joint
from vllm_adafuse.kernels.ordered_expand import OrderedBlocks, ordered_expand_triton
from vllm_adafuse.kernels.pairs import rotate_torch

SHAPES = {  # tokens, in, widths, experts, k, rank
    "one-part": (70, 48, [128], 4, 2, 16, ""),
    "three-parts": (133, 32, [192, 64, 64], 3, 2, 16, ""),
    "gate-up": (140, 48, [192, 192], 8, 2, 16, "silu"),
    "gelu": (16, 32, [64, 64], 2, 1, 32, "gelu_tanh"),
    "rotary": (67, 32, [128, 64, 64], 4, 2, 16, "rotary"),
    "many-experts": (150, 32, [64], 64, 3, 16, ""),
    "every-expert": (65, 32, [64, 64], 12, 12, 16, "silu"),
    "large-rank": (30, 32, [64], 2, 1, 128, ""),
    "one-expert": (17, 32, [128], 1, 1, 64, ""),
}


def run(p, top_k, activation, cos_sin=None, blocks=None):
    x, tokens = p.x.double(), p.x.shape[0]
    y = (x @ p.weight.double().T).to(p.x.dtype)
    s = (x @ p.bank_a.flatten(0, 2).double().T).to(p.x.dtype)
    order = make_order(p.gates, tokens, top_k)
    return ordered_expand_triton(
        y, s, p.bank_b, p.gates, order, p.widths, activation, blocks, cos_sin
    )


def turned(truth, p, cos_sin):
    return rotate_torch(truth, cos_sin, p.widths[0] + p.widths[1])


@pytest.mark.parametrize("ranks", [32, 64])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name, ranks):
    *shape, activation = SHAPES[name]
    p, cos_sin = make_problem(*shape), None
    want = linear_truth(p, "" if activation == "rotary" else activation)
    if activation == "rotary":
        cos_sin = torch.randn(80, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        want = turned(want, p, cos_sin.double())
    found = run(p, shape[4], activation, cos_sin, OrderedBlocks(32, 2, 4, 2, ranks))
    assert error(found, want) <= 1e-5


@pytest.mark.parametrize("name", ["gate-up", "gelu", "every-expert"])
def test_an_activation_in_place(name):
    *shape, activation = SHAPES[name]
    p = make_problem(*shape)
    order = make_order(p.gates, shape[0], shape[4])
    out, apart, in_y = twice_from_joint(p, lambda y, s, in_place: ordered_expand_triton(
        y, s, p.bank_b, p.gates, order, p.widths, activation, OrderedBlocks(32, 2, 4, 2, 32),
        in_place=in_place,
    ))  # fmt: skip
    want = linear_truth(p, activation)
    assert in_y and error(out, want) <= 1e-5 and error(apart, want) <= 1e-5


def test_a_token_does_not_see_its_company():
    p, other = (make_problem(70, 32, [64], 8, 2, 16, seed=seed) for seed in (0, 1))
    for name in ("weight", "bank_a", "bank_b"):
        setattr(other, name, getattr(p, name))
    for name in ("x", "gates"):
        getattr(other, name)[5] = getattr(p, name)[5]
    one, two = run(p, 2, ""), run(other, 2, "")
    assert not torch.equal(one[4], two[4])
    # Its experts may stand elsewhere in a product: the same terms, summed by the same tree or not.
    for found, whole in ((one, p), (two, other)):
        assert error(found[5], linear_truth(whole)[5]) <= 1e-6
