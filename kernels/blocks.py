"""How expands are cut, and how they are launched."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.pairs import ACTIVATIONS, tiled_widths
from vllm_adafuse.kernels.whole import cdiv, power_of_2

# Ranks, of one expert or of several, that one product takes.
BLOCK_ER = 128
# Ranks of all experts, up to which long steps take the vendor's product of them (dense_expand.py).
MAX_DENSE_RANKS = 1024
# Longer steps are all cut alike.
MAX_SHORT_TOKENS = 256


def block_er(ranks: int) -> int:
    """Ranks that one product takes of so many, for kernels that do not mind experts' limits."""
    return min(BLOCK_ER, max(16, power_of_2(ranks)))


@dataclass(frozen=True)
class ExpandBlocks:
    """How an expand is cut.

    Attributes:
        tokens, columns: of a tile.
        loop: tiles of a program, side by side; what it knows of its tokens serves them all.
        warps: of a program.
        stages: loads in flight in a loop.
    """

    tokens: int
    columns: int
    loop: int
    warps: int
    stages: int

    @classmethod
    @functools.cache
    def choose(cls, tokens: int, activation: bool, itemsize: int) -> ExpandBlocks:
        """Found on an H200 at the shapes of Llama-2-7B; docs/kernel-notes.md has the figures."""
        if tokens <= MAX_SHORT_TOKENS or itemsize > 2:
            block_t = min(64 if itemsize == 2 else 32, max(16, power_of_2(tokens)))
            return cls(block_t, 64, 1, 4, 1)
        if activation:
            return cls(64, 64, 8, 4, 1)
        return cls(64, 64, 8, 4, 3)


@functools.cache
def expert_blocks(experts: int, rank: int, skip: bool) -> dict[str, int | bool]:
    """How E experts of one rank are cut into products over ranks.

    skip: one expert at a time, so that absent ones can be left out.
    """
    block_r = min(BLOCK_ER, power_of_2(rank))
    block_e = 1 if skip else min(power_of_2(experts), BLOCK_ER // block_r)
    block_r = max(block_r, 16 // block_e)
    even = rank % block_r == 0 and experts % block_e == 0 and (block_e == 1 or rank == block_r)
    return {
        "RANK": rank, "SKIP": skip, "EVEN_K": even, "BLOCK_E": block_e, "BLOCK_R": block_r,
        "ONE": not skip and experts <= block_e and rank <= block_r,
    }  # fmt: skip


@triton.jit
def group_of_tiles(
    group, TILES0: tl.constexpr, TILES1: tl.constexpr, TILES2: tl.constexpr, LOOP: tl.constexpr
):  # fmt: skip
    """Which part a group of LOOP tiles belongs to, its first and its end among that part's tiles,
    and the tiles of the parts before; see `grouped_tiles`."""
    GROUPS0: tl.constexpr = (TILES0 + LOOP - 1) // LOOP
    GROUPS01: tl.constexpr = GROUPS0 + (TILES1 + LOOP - 1) // LOOP
    second, third = group >= GROUPS0, group >= GROUPS01
    part = second.to(tl.int32) + third.to(tl.int32)
    group -= tl.where(third, GROUPS01, tl.where(second, GROUPS0, 0))
    tiles = tl.where(third, TILES2, tl.where(second, TILES1, TILES0))
    before = tl.where(third, TILES0 + TILES1, tl.where(second, TILES0, 0))
    return part, group * LOOP, tl.minimum((group + 1) * LOOP, tiles), before


def grouped_tiles(
    widths: Sequence[int], activation: str, half: int, columns: int, loop: int
) -> tuple[int, dict[str, int]]:
    """Groups of `loop` tiles, and a kernel's constants that say so.

    Args:
        widths: columns of each part, in whole tiles.
        activation: what follows; columns come in pairs.
        half: of a head with "rotary", whose tiles are whole heads; else 0.
        columns: of a tile elsewhere.
    """
    columns = half or columns
    tiles = [width // columns for width in tiled_widths(widths, activation)] + [0, 0]
    return sum(cdiv(count, loop) for count in tiles), {
        "TILES0": tiles[0], "TILES1": tiles[1], "TILES2": tiles[2],
        "ACT": ACTIVATIONS.index(activation), "APART": half or widths[0],
        "COLS": columns, "LOOP": loop,
    }  # fmt: skip


def in_whole_tiles(parts: Sequence[int], widths: Sequence[int], head_dim: int) -> bool:
    """Whether every part has experts, and columns come in tiles of 64, or of heads of this size
    where it is not 0."""
    if list(parts) != list(range(len(widths))) or head_dim not in (0, 32, 64, 128):
        return False
    return not any(width % (head_dim or 64) for width in widths)


def in_wide_ranks(experts: int, rank: int) -> bool:
    """Whether `wide_expand` takes experts of this rank, after `dense_expand` if they are many."""
    return 16 <= rank <= BLOCK_ER and not rank & (rank - 1) and experts * rank <= MAX_DENSE_RANKS


def on_hopper(tensor: torch.Tensor) -> bool:
    """Whether it lies on an NVIDIA GPU of Hopper's kind or later: those have the tensor memory
    accelerator, and a launch may begin while the one before it ends."""
    return tensor.is_cuda and _is_hopper(tensor.device)


def waits_in_loops(tensor: torch.Tensor) -> bool:
    """Whether a loop on tensor cores may wait for others, and stay pipelined: for Hopper's Triton
    3.6 compiles it, for later GPUs newer ones alone do."""
    return on_hopper(tensor) and _capability(tensor.device) == 9


@functools.cache
def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return not torch.version.hip and _capability(device) >= 9


@functools.cache
def overlap(hopper: bool) -> dict[str, bool]:
    """What tells a kernel to wait itself for the one before it (`gdc_wait`) where it can."""
    return {"PDL": True, "launch_pdl": True} if hopper else {"PDL": False}
