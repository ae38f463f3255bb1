"""Tensors with room for whole tiles: how much there is, what has none, and that nobody sees it."""

import pytest
import torch
from ops import DEVICE, make_problem
from test_tma_gemm import GemmConfig, run
from vllm_adafuse.kernels import room
from vllm_adafuse.kernels.room import new_rows, tile_tokens, with_room


def test_tiles_have_64_tokens_or_the_next_power_of_two():
    assert [tile_tokens(t) for t in (9, 64, 65, 128)] == [64, 64, 128, 128]


@pytest.mark.parametrize("tokens, rows", [(8, 8), (9, 64), (64, 64), (72, 128), (129, 129)])
def test_results_of_steps_that_are_tiled_have_room(monkeypatch, tokens, rows):
    monkeypatch.setattr(room, "on_hopper", lambda tensor: True)
    like = torch.empty(1, dtype=torch.float16)
    for width, stride in ((48, None), (48, 80)):
        out = new_rows(like, tokens, width, stride)
        assert out.shape == (tokens, width) and out.stride() == (stride or width, 1)
        assert out.dtype == like.dtype
        elements = out.untyped_storage().nbytes() // 2
        assert elements == (rows - 1) * (stride or width) + width


def test_other_devices_leave_no_room():
    assert new_rows(torch.empty(1), 20, 48).untyped_storage().nbytes() == 20 * 48 * 4


def test_rows_that_are_in_memory_are_counted():
    whole = torch.zeros(70, 32)
    for x, there in ((whole[:20], 64), (whole[25:45], 45), (whole[10:50], 60), (whole[4:20, 8:], 64)):
        same, rows = with_room(x, 64)
        assert same is x and rows == there


def test_what_lacks_much_of_a_tile_is_copied():
    x = torch.randn(20, 32)[:, 8:]
    copy, rows = with_room(x, 64)
    assert torch.equal(copy, x) and rows == 64
    assert copy.untyped_storage().nbytes() == 64 * 24 * 4
    few = torch.randn(41, 32)
    assert with_room(few, 64) == (few, 41)


@pytest.mark.parametrize("activation", ["", "silu"])
def test_what_stands_behind_the_tokens_changes_no_bit(activation):
    config = GemmConfig(32, 32, shrink_split_k=2, tma=True)
    p = make_problem(20, 96, [64, 64], 8, 2, 8)
    alone = run(p, activation, config)
    whole = torch.full((64, 96), torch.nan, device=DEVICE, dtype=p.x.dtype)
    whole[:20] = p.x
    p.x = whole[:20]
    assert torch.equal(run(p, activation, config), alone)
