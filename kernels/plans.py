"""What choices are made of, and for: a projection's shape, a device, and the plan that they give.

`dispatch` makes plans; this file holds no limit.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from vllm_adafuse.kernels.configs import BLOCK_ER, GemmConfig
from vllm_adafuse.kernels.device.epilogues import tiled_widths

# What a plan may name, after its file; cuBLAS has none.
DECODE_GEMM, TMA_GEMM, CUBLAS = "decode_gemm", "tma_gemm", "cublas"
SHRINK, PAGE_SHRINK, FP8_SHRINK = "shrink", "page_shrink", "fp8_shrink"
NONE, EXPAND, TMA_EXPAND, ADD_NORM = "none", "expand", "tma_expand", "add_norm"


@dataclass(frozen=True)
class Device:
    """What choices ask of a device.

    Attributes:
        name: as torch gives it; tuned configs are kept by it.
        major: of an NVIDIA GPU's compute capability; 0 of any other device.
    """

    name: str
    major: int = 0

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Device:
        """The device that torch means."""
        if device.type != "cuda":
            return Device(device.type)
        major = 0 if torch.version.hip else torch.cuda.get_device_capability(device)[0]
        return Device(torch.cuda.get_device_name(device), major)

    @property
    def hopper(self) -> bool:
        """Hopper or later: there is a tensor memory accelerator, and a launch may begin while the
        one before it ends."""
        return self.major >= 9


def on_hopper(tensor: torch.Tensor) -> bool:
    """Whether it lies on an NVIDIA GPU of Hopper's kind or later, see `Device`."""
    return tensor.is_cuda and Device.of(tensor.device).hopper


def waits_in_loops(tensor: torch.Tensor) -> bool:
    """Whether a loop on tensor cores may wait for others, and stay pipelined: for Hopper's Triton
    3.6 compiles it, for later GPUs newer ones alone do."""
    return tensor.is_cuda and Device.of(tensor.device).major == 9


@dataclass(frozen=True)
class Shape:
    """What choices ask of a projection: host numbers, made once.

    Attributes:
        size_in: elements of its input.
        widths: columns of up to three slices of its output.
        adapted: of each slice the index of its adapted linear, -1 for none.
        num_experts: E.
        rank: R.
        itemsize: bytes of an element.
        epilogue: what follows in the same op: "", "silu", "gelu_tanh", "rotary", "norm".
        head_dim: with "rotary", else 0.
        has_bias: a bias is added.
        fused: W is not quantised, and stands in one tensor with A, but for one in fp8.
        tile_blocks: long steps list for every tile of tokens the blocks of experts that it has,
            and leave out the others, see `page_routes`.
        fp8: A and B are, see `Projection`.
    """

    size_in: int
    widths: tuple[int, ...]
    adapted: tuple[int, ...]
    num_experts: int
    rank: int
    itemsize: int = 2
    epilogue: str = ""
    head_dim: int = 0
    has_bias: bool = False
    fused: bool = True
    tile_blocks: bool = False
    fp8: bool = False

    @property
    def kernel_epilogue(self) -> str:
        """What the projection's own kernels do of it: all but a norm."""
        return "" if self.epilogue == "norm" else self.epilogue

    @property
    def size_out(self) -> int:
        return sum(self.widths)

    @property
    def ranks(self) -> int:
        """Of all experts."""
        return self.num_experts * self.rank

    @property
    def fused_rows(self) -> int:
        """Rows of W and of what stands in one tensor with it: A, but for one in fp8."""
        return self.size_out + (0 if self.fp8 else (max(self.adapted) + 1) * self.ranks)

    @property
    def tiled_rows(self) -> int:
        """Rows of W that are cut into tiles: of one member where they come in pairs."""
        return sum(tiled_widths(self.widths, self.kernel_epilogue))


def on_pages(shape: Shape) -> Shape:
    """The same of an expert for each page: more than one product's come in blocks."""
    return replace(shape, tile_blocks=shape.ranks > BLOCK_ER)


@dataclass(frozen=True)
class Plan:
    """What runs for a projection and a number of tokens.

    Attributes:
        kernel: of W and A; SHRINK, FP8_SHRINK or CUBLAS of A alone where W is quantised; of A while
            cuBLAS takes W the first two where A is in fp8, else PAGE_SHRINK.
        config: how it is cut; None for cuBLAS.
        split_k: slices of `in`, whose sums the norm adds up.
        one_gemm: cuBLAS takes W and A together.
        expand: what adds the deltas, and goes on to the epilogue.
        dense_from: the first expert that cuBLAS adds before that; None: it adds none.
    """

    kernel: str
    config: GemmConfig | None = None
    split_k: int = 1
    one_gemm: bool = False
    expand: str = NONE
    dense_from: int | None = None
