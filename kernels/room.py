"""Tensors of tokens with room behind them for a whole tile.

The tensor memory accelerator gives zeros for rows of a block that lie outside of a tensor, and is slow
at it: some 4 ns for each such row of each block, in every program (H200, dc5dc15: qkv of Llama-3-8B in
tiles of 64 tokens takes 25.7 us with 20 tokens, 22.2 with 32, 18.3 with 64, and 17.9 with 20 whose
tensor goes on). So what our ops leave for the next ones has room to the end of its tile, and what has
none is copied. What stands there is read, and what comes of it is dropped: no token's sums hang on
another's row.
"""

from __future__ import annotations

import torch
from vllm_adafuse.kernels.configs import MIN_TILE_TOKENS
from vllm_adafuse.kernels.dispatch import MAX_TILE_TOKENS, MAX_UNTILED_TOKENS, MIN_MISSING_ROWS
from vllm_adafuse.kernels.plans import on_hopper
from vllm_adafuse.kernels.whole import power_of_2


def tile_tokens(tokens: int) -> int:
    """Tokens of the tile that has so many, and is as tall as `tma_gemm` takes them."""
    return max(MIN_TILE_TOKENS, power_of_2(tokens))


def new_rows(like: torch.Tensor, tokens: int, width: int, stride: int | None = None) -> torch.Tensor:
    """[T, width] with rows `stride` elements apart, default `width`; dtype and device of `like`.
    In steps that may be tiled, on a device that can, with room for the tile."""
    stride, tiled = stride or width, MAX_UNTILED_TOKENS < tokens <= MAX_TILE_TOKENS
    room = tile_tokens(tokens) if tiled and on_hopper(like) else tokens
    rows = like.new_empty_strided((room, width), (stride, 1))
    return rows if room == tokens else rows[:tokens]


def with_room(x: torch.Tensor, room: int) -> tuple[torch.Tensor, int]:
    """x [T, in], or a copy of it where much of a tile of `room` tokens would be missing; and how
    many rows of the tile are in memory behind its first."""
    elements = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    there = min(room, (elements - x.shape[1]) // x.stride(0) + 1)
    if room - there < MIN_MISSING_ROWS:
        return x, there
    copy = x.new_empty(room, x.shape[1])[: x.shape[0]]
    return copy.copy_(x), room
