"""What launchers are handed: a projection, made once when all is loaded, and a step's buffers.

Both hold tensors at addresses that a CUDA graph may remember; nothing of them is made in a step but
what the buffers hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property

import torch
from vllm_adafuse.kernels import dispatch
from vllm_adafuse.kernels.device.epilogues import is_gate_up
from vllm_adafuse.kernels.plans import Device, Plan, Shape
from vllm_adafuse.kernels.workspace import Workspace


class Plans(dict[int, Plan]):
    """The plans of one shape on one device: number of tokens -> `dispatch.plan`. A look in a dict
    is less than a hash of the shape, and ops look once each."""

    def __init__(self, shape: Shape, device: Device):
        super().__init__()
        self.shape, self.device = shape, device

    def __missing__(self, num_tokens: int) -> Plan:
        found = self[num_tokens] = dispatch.plan(self.shape, num_tokens, self.device)
        return found


@cache
def plans_of(shape: Shape, device: Device) -> Plans:
    """The same ones for projections of one shape."""
    return Plans(shape, device)


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMSNorm: its factors [H] and epsilon."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, eq=False)
class Projection:
    """An adapted projection.

    Attributes:
        shape: host numbers, by which kernels are chosen.
        lora_a: [S, E, R, in] of S adapted linears, dtype of the model; where W is not quantised a
            view of the last rows of `fused_weight`. Or in float8_e4m3fn, behind `lora_scale`.
        lora_b: [sum of the adapted widths, E, R] contiguous, same dtype.
        fused_weight: [out + S E R, in] contiguous: W, then lora_a unless that is in fp8; None where W
            is quantised.
        bias: [out], or None.
        norm: that follows in the same op, with the epilogue "norm".
        semaphore: [4] int32, zeroed once a step, of this projection alone; None where no kernel
            of ours takes W.
        strided_out: what follows gate_up leaves its result in rows as far apart as those of the
            product, see `stays_in_place`.
        lora_scale: [S, E, R] float32 contiguous, of experts in fp8: what s is multiplied by, for A and
            B (`format/fp8.py`). It ends where lora_a begins: kernels have one address for both.

    Raises:
        ValueError: experts are in fp8 and it stands elsewhere, or they are not and there is one.
    """

    shape: Shape
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    fused_weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    norm: Norm | None = None
    semaphore: torch.Tensor | None = None
    strided_out: bool = False
    lora_scale: torch.Tensor | None = None
    plans: Plans = field(init=False, repr=False)

    def __post_init__(self):
        a, scale = self.lora_a, self.lora_scale
        fits = a.dtype != torch.float8_e4m3fn and scale is None
        if self.shape.fp8:
            behind = scale is not None and scale.data_ptr() + scale.nbytes == a.data_ptr()
            fits = a.dtype == torch.float8_e4m3fn and behind
        if not fits:
            raise ValueError(
                f"Projection: lora_a is {a.dtype}, fp8 is {self.shape.fp8} in its shape, and "
                f"lora_scale is {'not ' * (scale is None)}there; expected float8_e4m3fn right behind "
                "a lora_scale where fp8 is true, else neither"
            )
        object.__setattr__(self, "plans", plans_of(self.shape, Device.of(self.lora_b.device)))

    @cached_property
    def weight(self) -> torch.Tensor:
        """W [out, in]."""
        return self.fused_weight[: self.shape.size_out]


@dataclass(frozen=True, eq=False)
class Step:
    """What all projections of a step read: static buffers, of N rows or more than a step has.

    Attributes:
        gates: [N, E] float32, LoRA's scale included; rows past T are not read.
        active: [2 + E] int64, the experts that the step needs, see `spread_routes`.
        workspace: what launches share.
        cos_sin: [N, D], cosines of each token's position, then sines; None without "rotary".
        tile_blocks: for `Shape.tile_blocks`, see `page_routes`.
    """

    gates: torch.Tensor
    active: torch.Tensor
    workspace: Workspace
    cos_sin: torch.Tensor | None = None
    tile_blocks: torch.Tensor | None = None

    def blocks_of(self, shape: Shape, tokens: int) -> torch.Tensor | None:
        """`tile_blocks` for a projection that goes by them, in steps that list them; else None."""
        listed = shape.tile_blocks and tokens > dispatch.MAX_ACTIVE_TOKENS
        return self.tile_blocks if listed else None


def stays_in_place(shape: Shape) -> bool:
    """Whether the result may have the rows of the product [T, out + S E R], gaps and all: what
    follows gate_up then takes no tensor of its own, which would be a quarter of a long step's
    memory.

    By shapes alone: a compiled model holds steps of all lengths to one layout. Not with a bias, for
    then long products are of W alone; in multiples of 16, for which the next kernel is compiled.
    """
    whole = shape.fused_rows % 16 == 0 and shape.widths[0] % 16 == 0
    return is_gate_up(shape.kernel_epilogue) and not shape.has_bias and whole
