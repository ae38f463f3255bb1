"""Memory that the launches of a device share, one after the other: made once, before any graph."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Workspace(NamedTuple):
    """Buffers at fixed addresses.

    Attributes:
        low: bytes for s, the tokens in rank space.
        partial: [F] float32, sums of programs that share a result.
        tickets: [C] int32, who comes last; zero between launches.
        unread: [4] int32, a counter that nobody waits for.
    """

    low: torch.Tensor
    partial: torch.Tensor
    tickets: torch.Tensor
    unread: torch.Tensor

    @classmethod
    def make(cls, low_bytes: int, floats: int, tickets: int, device: torch.device) -> Workspace:
        i32 = torch.int32
        return cls(
            torch.empty(low_bytes, dtype=torch.uint8, device=device),
            torch.empty(floats, dtype=torch.float32, device=device),
            torch.zeros(tickets, dtype=i32, device=device),
            torch.zeros(4, dtype=i32, device=device),
        )

    def s(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """[*shape] of a dtype, not initialised.

        Raises:
            ValueError: it was made too small.
        """
        count = torch.Size(shape).numel()
        if count * dtype.itemsize > self.low.numel():
            raise ValueError(f"workspace has {self.low.numel()} bytes for s, {shape} needs more")
        return self.low[: count * dtype.itemsize].view(dtype).view(shape)

    def split_sums(self, split_k: int, tokens: int, width: int) -> torch.Tensor:
        """[split_k, tokens, width] float32 at the end of `partial`, beside a launch's own sums.

        Raises:
            ValueError: it was made too small.
        """
        count = split_k * tokens * width
        if count > self.partial.numel():
            raise ValueError(f"workspace has {self.partial.numel()} sums, {count} are to be left")
        return self.partial[-count:].view(split_k, tokens, width)
