"""Shrink of long steps on pages, against float64."""

from dataclasses import replace

import pytest
import torch
from ops import error, leave_pages_to_tiles, linear_truth, make_problem
from vllm_adafuse.kernels.dispatch import MIN_WIDE_TOKENS, cublas_plan, plan
from vllm_adafuse.kernels.operands import Norm
from vllm_adafuse.kernels.page_shrink import page_shrink_triton
from vllm_adafuse.kernels.plans import CUBLAS, PAGE_SHRINK, Device, on_pages
from vllm_adafuse.kernels.projection import projection_triton
from vllm_adafuse.kernels.projection_norm import projection_norm_triton

HOPPER = Device("a GPU", 9)


@pytest.mark.parametrize("widths, pages", [([64], 20), ([64, 32], 17), ([64, 64, 64], 24)])
def test_equals_float64_where_tiles_list_blocks(widths, pages):
    p = make_problem(290, 48, widths, pages, 3, 16)
    tile_blocks = leave_pages_to_tiles(p)
    found = page_shrink_triton(p.x, p.lora_a, tile_blocks).unflatten(1, (len(widths), -1))
    want = torch.einsum("tk,prk->tpr", p.x.double(), p.lora_a.flatten(1, 2).double())
    for tile, listed in enumerate(tile_blocks.tolist()):
        rows = slice(128 * tile, 128 * tile + 128)
        for block in listed[1 : 1 + listed[0]]:
            columns = slice(128 * block, 128 * block + 128)
            assert error(found[rows, :, columns], want[rows, :, columns]) <= 1e-5
    assert any(listed[0] > 1 for listed in tile_blocks.tolist())


def of_long_step(p, epilogue, norm=None):
    """The projection on pages, and the plan of a long step in bf16."""
    of = p.projection(epilogue, norm=norm)
    of = replace(of, shape=on_pages(of.shape))
    return of, cublas_plan(replace(of.shape, itemsize=2), MIN_WIDE_TOKENS, HOPPER)


@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_takes_it(bias):
    p = make_problem(290, 48, [64, 64], 48, 3, 16, bias=bias)
    tile_blocks = leave_pages_to_tiles(p)
    of, way = of_long_step(p, "silu")
    assert way.kernel == PAGE_SHRINK and not way.one_gemm
    found = projection_triton(p.x, of, p.step(tile_blocks=tile_blocks), way)
    assert error(found, linear_truth(p, "silu")) <= 1e-5


def test_a_projection_before_a_norm_takes_it():
    p = make_problem(290, 48, [64], 96, 3, 16)
    tile_blocks, residual = leave_pages_to_tiles(p), torch.randn(290, 64).to(p.x)
    of, way = of_long_step(p, "norm", Norm(torch.ones(64).to(p.x), 1e-5))
    assert way.kernel == PAGE_SHRINK
    _, found = projection_norm_triton(p.x, residual, of, p.step(tile_blocks=tile_blocks), way)
    assert error(found, linear_truth(p) + residual.double()) <= 1e-5


def test_which_steps_take_it():
    p = make_problem(2, 64, [64, 64, 64], 32, 3, 16, dtype=torch.bfloat16)
    shape, most = on_pages(p.projection().shape), MIN_WIDE_TOKENS
    assert plan(shape, most - 1, HOPPER).kernel == CUBLAS and plan(shape, most - 1, HOPPER).one_gemm
    assert plan(shape, most, HOPPER).kernel == PAGE_SHRINK
    assert plan(shape, most, Device("an older GPU", 8)).kernel == CUBLAS
    # Of fewer rows of A, and of experts that all tokens may have.
    assert plan(on_pages(replace(shape, num_experts=31)), most, HOPPER).kernel == CUBLAS
    assert plan(replace(shape, tile_blocks=False), most, HOPPER).kernel == CUBLAS
    # Of rows of x that the tensor memory accelerator cannot read.
    assert plan(replace(shape, size_in=60), most, HOPPER).kernel == CUBLAS
