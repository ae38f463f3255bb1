"""Memory that the launches of a device share, one after the other: made once, before any graph."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Workspace(NamedTuple):
    """Buffers at fixed addresses.

    Attributes:
        lora_a_out: bytes for A x, the tokens in rank space.
        partial_sums: [F] float32, sums of programs that share a result.
        split_k_semaphores: [C] int32, who comes last; zero between launches.
        unused: [4] int32, a semaphore that nobody waits for.
    """

    lora_a_out: torch.Tensor
    partial_sums: torch.Tensor
    split_k_semaphores: torch.Tensor
    unused: torch.Tensor

    @classmethod
    def make(cls, bytes_: int, floats: int, semaphores: int, device: torch.device) -> Workspace:
        i32 = torch.int32
        return cls(
            torch.empty(bytes_, dtype=torch.uint8, device=device),
            torch.empty(floats, dtype=torch.float32, device=device),
            torch.zeros(semaphores, dtype=i32, device=device),
            torch.zeros(4, dtype=i32, device=device),
        )

    def view(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        """[*shape] of a dtype, not initialised.

        Raises:
            ValueError: it was made too small.
        """
        count = torch.Size(shape).numel()
        if count * dtype.itemsize > self.lora_a_out.numel():
            found = self.lora_a_out.numel()
            raise ValueError(f"workspace has {found} bytes for A x, {shape} needs more")
        return self.lora_a_out[: count * dtype.itemsize].view(dtype).view(shape)

    def split_sums(self, split_k: int, tokens: int, width: int) -> torch.Tensor:
        """[split_k, tokens, width] float32 at the end of `partial_sums`, beside the launch's own.

        Raises:
            ValueError: it was made too small.
        """
        count = split_k * tokens * width
        if count > self.partial_sums.numel():
            found = self.partial_sums.numel()
            raise ValueError(f"workspace has {found} sums, {count} are to be left")
        return self.partial_sums[-count:].view(split_k, tokens, width)
