"""Normal values for random tensors, many times faster than each could be drawn."""

from __future__ import annotations

import math

import torch

DRAWN = 1 << 21  # values that are drawn for themselves
# Of the block; a stretch has at most half of it, and begins in the first half.
BLOCK = 1 << 22
HALF = BLOCK // 2
STRIDE = 1_296_109  # odd, so that the first HALF stretches all begin at places of their own


class Normals:
    """Normal tensors in the order in which they are asked for; those of one generator's seed and
    the same questions are always the same.

    As many as DRAWN values are drawn for themselves. The tensors behind them are stretches of one
    block of BLOCK values, each from another place on, so that no two are equal.

    Args:
        generator: of the values; on the CPU.
        dtype: of the tensors, a floating one.
    """

    def __init__(self, generator: torch.Generator, dtype: torch.dtype):
        self._generator, self._dtype = generator, dtype
        self._drawn = self._taken = 0
        self._values: torch.Tensor | None = None
        self._scaled: dict[float, torch.Tensor] = {}

    def take(self, *shape: int, scale: float) -> torch.Tensor:
        """A contiguous tensor of this shape and standard deviation; it may lie in the block that
        others lie in, so clone it before you write to it."""
        count = math.prod(shape)
        if self._drawn + count <= DRAWN:
            self._drawn += count
            return (torch.randn(shape, generator=self._generator) * scale).to(self._dtype)
        if count <= HALF:
            return self._stretch(count, scale).view(shape)
        values = torch.empty(count, dtype=self._dtype)
        for part in values.split(HALF):
            part.copy_(self._stretch(len(part), scale))
        return values.view(shape)

    def _stretch(self, count: int, scale: float) -> torch.Tensor:
        begin = self._taken * STRIDE % HALF
        self._taken += 1
        return self._block(scale)[begin : begin + count]

    def _block(self, scale: float) -> torch.Tensor:
        if self._values is None:
            self._values = torch.randn(BLOCK, generator=self._generator)
        if scale not in self._scaled:
            self._scaled[scale] = (self._values * scale).to(self._dtype)
        return self._scaled[scale]
