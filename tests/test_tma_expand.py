"""Expand of long batches, against float64."""

from dataclasses import replace

import pytest
import torch
from ops import (
    DEVICE,
    error,
    from_fused,
    hide_from_others,
    in_whole_numbers,
    leave_pages_to_tiles,
    linear_truth,
    make_problem,
    twice_from_fused,
    whole_turns,
)
from vllm_adafuse.kernels.configs import BLOCK_ER, ExpandConfig
from vllm_adafuse.kernels.dense_expand import dense_expand_triton
from vllm_adafuse.kernels.device.epilogues import is_gate_up, rotate_torch
from vllm_adafuse.kernels.dispatch import MIN_WIDE_TOKENS, cublas_plan, in_wide_ranks
from vllm_adafuse.kernels.plans import TMA_EXPAND, Device
from vllm_adafuse.kernels.projection import expand_long
from vllm_adafuse.kernels.tma_expand import tma_expand_triton

SHAPES = {  # tokens, in, widths, experts, k, rank
    "one-part": (70, 48, [128], 4, 2, 16, ""),
    "three-adapted": (33, 32, [192, 64, 64], 3, 2, 16, ""),
    "gate-up": (40, 48, [192, 192], 8, 2, 16, "silu"),
    "gelu": (16, 32, [64, 64], 2, 1, 32, "gelu_tanh"),
    "rotary": (37, 32, [128, 64, 64], 4, 2, 16, "rotary"),
    "one-expert": (17, 32, [128], 1, 1, 64, ""),
}
MANY = {  # more ranks than one product takes
    "sixteen": (70, 32, [128, 64], 16, 2, 16, ""),
    "five-of-32": (33, 32, [64], 5, 3, 32, ""),
    "twenty-gate-up": (37, 32, [128, 128], 20, 3, 16, "silu"),
    "twenty-rotary": (37, 32, [128, 64, 64], 20, 2, 16, "rotary"),
    "of-eight-ranks": (33, 32, [64], 20, 2, 8, ""),
    "sixty-four": (40, 32, [64, 64], 64, 2, 16, "gelu_tanh"),
}


def run(p, epilogue, cos_sin=None, config=None):
    x = p.x.double()
    y = (x @ p.weight.double().T).to(p.x.dtype)
    s = (x @ p.lora_a.flatten(0, 2).double().T).to(p.x.dtype)
    return tma_expand_triton(y, s, p.projection(epilogue, cos_sin), p.step(cos_sin), config)


@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name):
    *shape, epilogue = SHAPES[name]
    p = make_problem(*shape)
    cos_sin = None
    want = linear_truth(p, "" if epilogue == "rotary" else epilogue)
    if epilogue == "rotary":
        cos_sin = torch.randn(50, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        want = rotate_torch(want, cos_sin.double(), p.widths[0] + p.widths[1])
    found = run(p, epilogue, cos_sin, ExpandConfig(16, 32, 2, 4, 2))
    assert error(found, want) <= 1e-5


def test_a_head_comes_in_tiles_of_any_width():
    *shape, _ = SHAPES["rotary"]
    p, cos_sin = in_whole_numbers(make_problem(*shape)), whole_turns(50, 64)
    want = rotate_torch(linear_truth(p), cos_sin.double(), p.widths[0] + p.widths[1])
    for columns in (16, 32):  # quarters and halves of a head
        found = run(p, "rotary", cos_sin, ExpandConfig(16, columns, 2, 4, 2))
        assert torch.equal(found.double(), want)


@pytest.mark.parametrize("name", MANY)
def test_experts_beyond_one_product_are_added_before(name):
    *shape, epilogue = MANY[name]
    p = make_problem(*shape)
    cos_sin, want = None, linear_truth(p, "" if epilogue == "rotary" else epilogue)
    if epilogue == "rotary":
        cos_sin = torch.randn(50, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        want = rotate_torch(want, cos_sin.double(), p.widths[0] + p.widths[1])

    of = p.projection(epilogue, cos_sin).shape
    way = cublas_plan(replace(of, itemsize=2), MIN_WIDE_TOKENS, Device("a GPU", 9))
    assert way.expand == TMA_EXPAND and way.dense_from == BLOCK_ER // shape[5]

    def long(y, s, in_place):
        whole = replace(p.projection(epilogue, cos_sin), strided_out=in_place)
        return expand_long(y, s, None, whole, p.step(cos_sin), way)

    assert error(long(*from_fused(p), False), want) <= 1e-5
    if is_gate_up(epilogue):
        y, s = from_fused(p)
        out = long(y, s, True)
        assert out.data_ptr() == y.data_ptr() and error(out, want) <= 1e-5


@pytest.mark.parametrize("name", ["sixteen", "five-of-32", "twenty-gate-up"])
def test_one_product_has_the_first_experts_alone(name):
    """Of the others it sees neither gates nor s."""
    *shape, epilogue = MANY[name]
    p, first = make_problem(*shape), BLOCK_ER // shape[-1]
    y = (p.x.double() @ p.weight.double().T).to(p.x.dtype)
    s = (p.x.double() @ p.lora_a.flatten(0, 2).double().T).to(p.x.dtype)
    s.unflatten(1, p.lora_a.shape[:3])[:, :, first:] = float("nan")
    found = tma_expand_triton(y, s, p.projection(epilogue), p.step())
    p.gates[: len(y), first:] = 0
    assert error(found, linear_truth(p, epilogue)) <= 1e-5


@pytest.mark.parametrize("name", ["one-part", "gate-up"])
def test_what_others_see_of_an_expert_does_not_matter(name):
    *shape, epilogue = SHAPES[name]
    p = make_problem(*shape)
    y, s = from_fused(p)
    hide_from_others(p, s)
    found = tma_expand_triton(y, s, p.projection(epilogue), p.step())
    assert error(found, linear_truth(p, epilogue)) <= 1e-5


@pytest.mark.parametrize(
    "widths, pages, epilogue",
    [([64, 32], 20, ""), ([64, 64], 20, "silu"), ([64, 64, 64], 24, "rotary")],
    ids=["one-product", "gate-up", "rotary"],
)
@pytest.mark.parametrize("tokens_at_once", [32, 128])
def test_blocks_of_pages_that_tiles_of_tokens_list(widths, pages, epilogue, tokens_at_once):
    """One block, two, three, and none."""
    p = make_problem(400, 32, widths, pages, 3, 16)
    tile_blocks, cos_sin = leave_pages_to_tiles(p, [(2, 0), (2, 1), (2, 2)]), None
    assert tile_blocks[:, 0].tolist() == [1, 2, 3, 0]
    want = linear_truth(p, "" if epilogue == "rotary" else epilogue)
    if epilogue == "rotary":
        cos_sin = torch.randn(400, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        want = rotate_torch(want, cos_sin.double(), p.widths[0] + p.widths[1])
    y, s = from_fused(p)
    hide_from_others(p, s)
    of = p.projection(epilogue, cos_sin)
    of = replace(of, shape=replace(of.shape, tile_blocks=True))
    step, config = p.step(cos_sin, tile_blocks), ExpandConfig(tokens_at_once, 32, 2, 4, 2)
    assert error(tma_expand_triton(y, s, of, step, config), want) <= 1e-5


def test_which_ranks_it_takes():
    takes = in_wide_ranks
    assert takes(5, 16) and takes(8, 16) and takes(1, 128)
    assert takes(9, 16) and takes(20, 16) and takes(64, 32) and takes(8, 128) and takes(17, 8)
    assert not takes(65, 32) and not takes(129, 16) and not takes(1, 256)
    assert not takes(16, 8) and not takes(8, 24) and not takes(40, 4)


@pytest.mark.parametrize("epilogue", ["silu", "gelu_tanh"])
def test_gates_of_any_size(epilogue):
    p = make_problem(40, 48, [64, 64], 8, 2, 16)
    p.x *= 100
    found, want = run(p, epilogue), linear_truth(p, epilogue)
    assert error(found, want) <= 1e-5
    if epilogue == "silu":  # far down its tail, too; float64 loses the other's
        below = (want.abs() < 1e-30) & (want != 0)
        assert below.any() and found[below].abs().max() < 1e-30


@pytest.mark.parametrize("name", ["one-part", "gate-up", "rotary"])
def test_rows_of_a_joint_product_come_back_contiguous(name):
    *shape, epilogue = SHAPES[name]
    p = make_problem(*shape)
    cos_sin, want = None, linear_truth(p, "" if epilogue == "rotary" else epilogue)
    if epilogue == "rotary":
        cos_sin = torch.randn(50, 64, device=DEVICE)
        want = rotate_torch(want, cos_sin.double(), p.widths[0] + p.widths[1])
    y, s = from_fused(p)
    found = tma_expand_triton(y, s, p.projection(epilogue, cos_sin), p.step(cos_sin))
    assert found.is_contiguous() and error(found, want) <= 1e-5


@pytest.mark.parametrize("name", ["gate-up", "gelu"])
def test_an_activation_in_place(name):
    *shape, epilogue = SHAPES[name]
    p = make_problem(*shape)
    of, step, config = p.projection(epilogue), p.step(), ExpandConfig(16, 32, 2, 4, 2)
    out, apart, in_y = twice_from_fused(p, lambda y, s, in_place: tma_expand_triton(
        y, s, replace(of, strided_out=in_place), step, config
    ))  # fmt: skip
    want = linear_truth(p, epilogue)
    assert in_y and error(out, want) <= 1e-5 and error(apart, want) <= 1e-5


@pytest.mark.parametrize("widths", [[320, 128, 128], [256, 128], [192]])
def test_default_cuts_reach_every_column(widths):
    p = make_problem(70, 16, widths, 2, 1, 16)
    assert error(run(p, ""), linear_truth(p)) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, experts", [(600, 8), (5000, 8), (5000, 16), (5000, 20)])
@pytest.mark.parametrize("name", ["qkv", "gate_up", "o"])
def test_half_precision_is_no_worse_than_plain_torch(name, tokens, experts):
    widths, epilogue = {
        "qkv": ([1024, 512, 512], "rotary"), "gate_up": ([2752, 2752], "silu"), "o": ([1024], ""),
    }[name]  # fmt: skip
    p = make_problem(tokens, 256, widths, experts, 2, 16, dtype=torch.bfloat16)
    cos_sin = None
    gated = "" if epilogue == "rotary" else epilogue
    truth, plain = linear_truth(p, gated), linear_truth(p, gated, torch.bfloat16)
    if epilogue == "rotary":
        cos_sin = torch.randn(tokens, 128, device=DEVICE).bfloat16()
        truth = rotate_torch(truth, cos_sin.double(), 1536)
        plain = rotate_torch(plain, cos_sin, 1536)
    y, s = p.x @ p.weight.T, p.x @ p.lora_a.flatten(0, 2).T
    if experts > 8:
        dense_expand_triton(y, s, p.lora_b, p.gates, p.adapted, widths, 8)
    found = tma_expand_triton(y, s, p.projection(epilogue, cos_sin), p.step(cos_sin))
    assert error(found, truth) <= 1.2 * error(plain, truth)
