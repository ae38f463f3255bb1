"""How expands are cut, and how they are launched."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from vllm_adafuse.kernels.whole import power_of_2

# Ranks, of one expert or of several, that one product takes.
BLOCK_ER = 128


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
        if tokens <= 256 or itemsize > 2:
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


def on_hopper(tensor: torch.Tensor) -> bool:
    """Whether it lies on an NVIDIA GPU of Hopper's kind or later: those have the tensor memory
    accelerator, and a launch may begin while the one before it ends."""
    return tensor.is_cuda and _is_hopper(tensor.device)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def overlap(hopper: bool) -> dict[str, bool]:
    """What tells a kernel to wait itself for the one before it (`gdc_wait`) where it can."""
    return {"PDL": True, "launch_pdl": True} if hopper else {"PDL": False}
