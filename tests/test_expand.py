"""Expand alone: adds to y in place, or goes on to the epilogue of gate and up."""

from dataclasses import replace

import pytest
import torch
from ops import (
    delta_truth,
    error,
    from_fused,
    hide_from_others,
    leave_pages_to_tiles,
    linear_truth,
    make_problem,
    shrink_truth,
    twice_from_fused,
)
from vllm_adafuse.kernels.configs import ExpandConfig
from vllm_adafuse.kernels.device.epilogues import activate_torch, rotate_torch
from vllm_adafuse.kernels.expand import (
    expand_raw_triton,
    expand_torch,
    expand_triton,
)


def by_torch(y, s, p):
    expand_torch(y, s, p.lora_b, p.adapted, p.widths)


def by_triton(y, s, p):
    expand_triton(y, s, p.lora_b, p.active, p.adapted, p.widths)


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


@pytest.mark.parametrize("epilogue", ["", "silu", "gelu_tanh"])
@pytest.mark.parametrize("adapted", [[0, 1], [0, 0], [-1, 0], [0, -1]])
@pytest.mark.parametrize("tokens", [5, 70])
def test_from_raw_sums_equals_float64(tokens, adapted, epilogue):
    p = make_problem(tokens, 48, [140, 140], 3, 2, 4, adapted=adapted)
    y = 3 * torch.randn(tokens, 280, device=p.x.device)
    raw = torch.einsum("peri,ti->tper", p.lora_a.double(), p.x.double()).flatten(1).float()
    whole, bias = torch.cat([y, raw], 1), torch.randn(280, device=y.device)
    of = p.projection(epilogue)
    out = expand_raw_triton(whole[:, :280], whole[:, 280:], bias, of, p.step())
    truth = y.double() + bias.double() + delta_truth(p)
    assert error(out, activate_torch(truth, epilogue) if epilogue else truth) <= 1e-5


@pytest.mark.parametrize("epilogue", ["", "silu"])
def test_blocks_of_pages_that_tiles_of_tokens_list(epilogue):
    p = make_problem(290, 32, [48, 48], 20, 3, 16)
    tile_blocks = leave_pages_to_tiles(p)
    y, s = from_fused(p)
    hide_from_others(p, s)
    of = p.projection(epilogue)
    of = replace(of, shape=replace(of.shape, tile_blocks=True))
    out = expand_raw_triton(y, s, None, of, p.step(tile_blocks=tile_blocks))
    assert error(out, linear_truth(p, epilogue)) <= 1e-5


@pytest.mark.parametrize("shape", [(5, 48, [40, 40], 3, 1, 4), (70, 48, [64], 20, 2, 16)])
def test_what_others_see_of_an_expert_does_not_matter(shape):
    p = make_problem(*shape)
    y, s = from_fused(p)
    hide_from_others(p, s)
    out = expand_raw_triton(y, s, None, p.projection(), p.step())
    assert error(out, linear_truth(p)) <= 1e-5


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("tokens", [8, 70, 130])
def test_slices_are_added(tokens, split):
    p = make_problem(tokens, 48, [140], 3, 2, 4)
    y = torch.randn(split, tokens, 140, device=p.x.device)
    parts_of_x = torch.rand(split, tokens, 48, device=p.x.device)
    parts_of_x *= p.x / parts_of_x.sum(0)
    raw = torch.einsum("peri,kti->ktper", p.lora_a.double(), parts_of_x.double())
    whole = torch.cat([y, raw.flatten(2).float()], 2)
    before = whole.clone()
    out = expand_raw_triton(whole[..., :140], whole[..., 140:], None, p.projection(), p.step())
    assert error(out, y.double().sum(0) + delta_truth(p)) <= 1e-5
    assert out.is_contiguous() and torch.equal(whole, before)


@pytest.mark.parametrize("width", [140, 128])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapted", [[0, 1], [-1, 0]])
def test_an_activation_in_place(adapted, bias, width):
    p = make_problem(70, 48, [width, width], 3, 2, 4, adapted=adapted, bias=bias)
    of, step, blocks = p.projection("silu"), p.step(), ExpandConfig(32, 16, 4, 4, 2)
    out, apart, in_y = twice_from_fused(p, lambda y, s, in_place: expand_raw_triton(
        y, s, p.bias, replace(of, strided_out=in_place), step, blocks
    ))  # fmt: skip
    want = linear_truth(p, "silu")
    assert in_y and error(out, want) <= 1e-5 and error(apart, want) <= 1e-5


@pytest.mark.parametrize("shape", [(70, 48, [140, 66, 66], 8, 2, 16), (33, 48, [140], 3, 1, 200)])
@pytest.mark.parametrize("bias", [True, False])
def test_cuts_of_the_tile(shape, bias):
    p = make_problem(*shape, bias=bias)
    y = 3 * torch.randn(shape[0], sum(p.widths), device=p.x.device)
    raw = torch.einsum("peri,ti->tper", p.lora_a.double(), p.x.double()).flatten(1).float()
    truth = y.double() + delta_truth(p) + (p.bias.double() if bias else 0)
    blocks = ExpandConfig(32, 16, 4, 4, 2)
    out = expand_raw_triton(y, raw, p.bias, p.projection(), p.step(), blocks)
    assert error(out, truth) <= 1e-5
    assert (out is y) is not bias


@pytest.mark.parametrize("widths", [[64, 64, 64], [128, 32, 32], [96, 32, 64]])
@pytest.mark.parametrize("adapted", [[0, 1, 2], [0, -1, 1], [-1, -1, 0]])
def test_queries_and_keys_are_turned(adapted, widths):
    tokens, head_dim = 70, 32
    p = make_problem(tokens, 24, widths, 8, 2, 4, adapted=adapted, bias=True)
    y = 3 * torch.randn(tokens, sum(widths), device=p.x.device)
    raw = torch.einsum("peri,ti->tper", p.lora_a.double(), p.x.double()).flatten(1).float()
    cos_sin = torch.randn(tokens + 3, head_dim, device=p.x.device)
    of = p.projection("rotary", cos_sin)
    out = expand_raw_triton(y, raw, p.bias, of, p.step(cos_sin))
    truth = y.double() + p.bias.double() + delta_truth(p)
    assert error(out, rotate_torch(truth, cos_sin, widths[0] + widths[1])) <= 1e-5


def test_experts_not_chosen_are_not_read_where_one_product_has_not_all():
    p = make_problem(1, 32, [32], 40, 1, 4, one=2)
    p.lora_b[:, [e for e in range(40) if e != 2]] = float("nan")
    y = torch.zeros(1, 32, device=p.x.device)
    by_triton(y, shrink_truth(p).float(), p)
    assert torch.isfinite(y).all() and y.any()
