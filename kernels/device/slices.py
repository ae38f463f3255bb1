"""Tiles side by side in one program: those of one slice of the output, several at a time."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from vllm_adafuse.kernels.device.epilogues import EPILOGUES, tiled_widths
from vllm_adafuse.kernels.whole import cdiv


@triton.jit
def group_of_tiles(
    group, TILES0: tl.constexpr, TILES1: tl.constexpr, TILES2: tl.constexpr, LOOP: tl.constexpr
):  # fmt: skip
    """Which slice a group of LOOP tiles belongs to, its first and its end among that slice's tiles,
    and the tiles of the slices before; see `grouped_tiles`."""
    GROUPS0: tl.constexpr = (TILES0 + LOOP - 1) // LOOP
    GROUPS01: tl.constexpr = GROUPS0 + (TILES1 + LOOP - 1) // LOOP
    second, third = group >= GROUPS0, group >= GROUPS01
    slice_idx = second.to(tl.int32) + third.to(tl.int32)
    group -= tl.where(third, GROUPS01, tl.where(second, GROUPS0, 0))
    tiles = tl.where(third, TILES2, tl.where(second, TILES1, TILES0))
    before = tl.where(third, TILES0 + TILES1, tl.where(second, TILES0, 0))
    return slice_idx, group * LOOP, tl.minimum((group + 1) * LOOP, tiles), before


def grouped_tiles(
    widths: Sequence[int], epilogue: str, half: int, columns: int, loop: int
) -> tuple[int, dict[str, int]]:
    """Groups of `loop` tiles, and a kernel's constants that say so.

    Args:
        widths: columns of each slice, in whole tiles.
        epilogue: what follows; columns come in pairs.
        half: of a head with "rotary", whose tiles are whole heads; else 0.
        columns: of a tile elsewhere.
    """
    columns = half or columns
    tiles = [width // columns for width in tiled_widths(widths, epilogue)] + [0, 0]
    return sum(cdiv(count, loop) for count in tiles), {
        "TILES0": tiles[0], "TILES1": tiles[1], "TILES2": tiles[2],
        "EPILOGUE": EPILOGUES.index(epilogue), "APART": half or widths[0],
        "COLS": columns, "LOOP": loop,
    }  # fmt: skip
