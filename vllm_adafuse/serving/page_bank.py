"""The pages of one projection, and what of an adapter goes into them on this rank."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm_adafuse.format.fp8 import E4M3, round_pair
from vllm_adafuse.kernels import projection, projection_norm
from vllm_adafuse.kernels.operands import Step
from vllm_adafuse.kernels.plans import Shape, on_pages
from vllm_adafuse.serving import ops
from vllm_adafuse.serving.bank import ExpertBank, aligned
from vllm_adafuse.serving.page_step import PageStep
from vllm_adafuse.serving.pool import PAGE_RANKS, pages_of_rank
from vllm_adafuse.serving.projections import own_rows


class PageBank(ExpertBank):
    """A [P, pages, 16, in] and B [sum of widths, pages, 16]: an `ExpertBank` whose experts are
    pages, which adapters take and leave while the model serves. In fp8 with factors of their ranks
    `lora_scale` [P, pages, 16] (`format/fp8.py`), 0 where there is no expert.

    Args:
        layer: vLLM's linear layer.
        linears: full names of its Hugging Face linears in the order of their outputs.
        pages: of the pool.
        step: the step's static buffers.
        index: of the projection, its row in the step's semaphores.
        fuse: the projection is computed together with its deltas.
        fp8: A and B are in float8_e4m3fn.
    """

    def __init__(
        self,
        layer: LinearBase,
        linears: Sequence[str],
        pages: int,
        step: PageStep,
        index: int,
        fuse: bool = False,
        fp8: bool = False,
    ):
        super().__init__(layer, linears, pages, PAGE_RANKS, step, index, fuse)
        self.fp8, self.dtype = fp8, layer.params_dtype
        self.layer_name = f"{layer.prefix}.adafuse_pages"  # beside a default mixture's bank
        self.sizes = [
            (layer.input_size, sum(shard.full for shard in shards)) for shards in self.linear_shards
        ]

    @functools.cached_property
    def shape(self) -> Shape:
        """As an `ExpertBank`'s; where one product has not all pages, long steps list blocks."""
        return on_pages(replace(super().shape, itemsize=self.dtype.itemsize, fp8=self.fp8))

    @property
    def _bytes_of_fp8(self) -> tuple[int, int, int]:
        """Of the factors, A and B, in this order: each begins at a multiple of 16."""
        numbers = math.prod(self._shape_a)
        return 4 * numbers // self._shape_a[-1], numbers, math.prod(self._shape_b)

    @property
    def numel(self) -> int:
        """As an `ExpertBank`'s."""
        if not self.fp8:
            return super().numel
        of_experts = -(-sum(self._bytes_of_fp8) // self.dtype.itemsize)
        return aligned(self._rows_of_w * self._shape_a[-1]) + aligned(of_experts)

    def place(self, memory: torch.Tensor) -> None:
        """As an `ExpertBank`'s; what is in fp8 stands behind W, byte by byte."""
        if not self.fp8:
            super().place(memory)
            return
        rows, size_in = self._rows_of_w, self._shape_a[-1]
        if rows:
            weight = memory[: rows * size_in].view(rows, size_in)
            self.register_buffer("fused_weight", weight, persistent=False)
        sizes = self._bytes_of_fp8
        of_experts = memory[aligned(rows * size_in) :].view(torch.uint8)[: sum(sizes)]
        scale, a, b = of_experts.split(sizes)
        for name, of, shape in (
            ("lora_scale", scale.view(torch.float32), self._shape_a[:-1]),
            ("lora_a", a.view(E4M3), self._shape_a),
            ("lora_b", b.view(E4M3), self._shape_b),
        ):
            self.register_buffer(name, of.view(shape), persistent=False)

    @property
    def nbytes(self) -> int:
        return super().nbytes + (self.lora_scale.nbytes if self.fp8 else 0)

    def workspace_sizes(self) -> tuple[int, int, int]:
        """As an `ExpertBank`'s: A x is in the model's dtype, whatever A is in."""
        sizes = projection_norm if self.before_norm else projection
        like_a = torch.empty(self._shape_a, dtype=self.dtype, device="meta")
        return sizes.workspace_sizes(like_a, sum(self.widths))

    @functools.cached_property
    def step(self) -> Step:
        """As an `ExpertBank`'s."""
        return replace(super().step, tile_blocks=self.route.tile_blocks)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + delta, in place, in steps that have adapters. x: [..., in], y: [..., out]."""
        ops.page_deltas(_rows(y), _rows(x), self.route.gates, ops.named(self.layer_name))
        return y

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The joined projection, with its deltas and what follows it. x: [..., in]."""
        name = ops.named(self.layer_name)
        y = ops.page_projection(_rows(x), self.route.gates, name, *self.layout)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def linear_norm(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As an `ExpertBank`'s."""
        gates, name = self.route.gates, ops.named(self.layer_name)
        return ops.page_projection_norm(x, residual, gates, name)

    def write(self, pages: torch.Tensor, packed: Packed | None) -> None:
        """Puts an adapter's experts on their pages [n] int64; zeros where it has none here."""
        parts = (None,) * 3 if packed is None else (packed.a, packed.b, packed.scale)
        for own, new in zip((self.lora_a, self.lora_b, self.lora_scale), parts):
            if own is None:  # no factors but in fp8
                continue
            if new is None:
                bits_of(own).index_fill_(1, pages, 0)
            else:
                bits_of(own).index_copy_(1, pages, new.to(pages.device, non_blocking=True))


def bits_of(x: torch.Tensor) -> torch.Tensor:
    """A tensor, or one in fp8 as bytes: torch copies no parts of those on every device."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., n] as rows. Not even a view of what has them: torch.compile would copy what an op
    changes through one."""
    return x if x.dim() == 2 else x.view(-1, x.shape[-1])


@dataclass(frozen=True)
class Packed:
    """An adapter's share of one bank, on the host: A [P, n, 16, in], B [rows, n, 16], and in fp8,
    whose bits A and B then are, the factors [P, n, 16] float32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        tensors = self.a, self.b, *(() if self.scale is None else (self.scale,))
        return sum(t.nbytes for t in tensors)

    @classmethod
    def zeros(cls, bank: PageBank, pages: int) -> Packed:
        linears, _, ranks, size_in = bank.lora_a.shape
        how = {"dtype": bits_of(bank.lora_a).dtype, "pin_memory": bank.lora_a.is_cuda}
        a = torch.zeros(linears, pages, ranks, size_in, **how)
        b = torch.zeros(bank.lora_b.shape[0], pages, ranks, **how)
        if not bank.fp8:
            return cls(a, b)
        return cls(a, b, torch.zeros(linears, pages, ranks, **how | {"dtype": torch.float32}))


@dataclass
class Packer:
    """Collects an adapter's tensors as the banks of this rank hold them.

    Args:
        banks: of this rank.
        first_pages: of each expert the first of its pages, counted within the adapter.
        pages: that the adapter takes.

    Attributes:
        packed: for each bank the adapter's share, None where it has none.
    """

    banks: Sequence[PageBank]
    first_pages: Sequence[int]
    pages: int
    packed: list[Packed | None] = field(init=False)

    def __post_init__(self):
        self.packed = [None] * len(self.banks)
        self._places = {
            name: (index, linear) for index, bank in enumerate(self.banks)
            for linear, name in enumerate(bank.names)
        }  # fmt: skip

    def add(self, name: str, expert: int, a: torch.Tensor, b: torch.Tensor) -> None:
        """Takes n experts of one linear, which follow on each other: A [n or 1, r, in] and B
        [n, out, r] of the whole linear; those of another pipeline stage's are left out."""
        if name not in self._places:
            return
        index, linear = self._places[name]
        bank = self.banks[index]
        if self.packed[index] is None:
            self.packed[index] = Packed.zeros(bank, self.pages)
        packed, (experts, _, rank) = self.packed[index], b.shape
        first, each = self.first_pages[expert], pages_of_rank(rank)
        pages = slice(first, first + experts * each)
        if packed.scale is not None:  # by the whole linear: ranks that share it round alike
            a, b, scale = round_pair(a, b)
            a, b = bits_of(a), bits_of(b)
            of_scale = packed.scale[linear, pages].view(experts, each * PAGE_RANKS)
            of_scale[:, :rank].copy_(scale)
        row = sum(shard.width for group in bank.linear_shards[:linear] for shard in group)
        own = own_rows(b, bank.linear_shards[linear]).transpose(0, 1)
        # As few copies as can be: each has to wait for whatever else this process does.
        of_a = packed.a[linear, pages].view(experts, each * PAGE_RANKS, -1)
        of_a[:, :rank].copy_(a[..., bank.input_slice])
        of_b = packed.b[row : row + len(own), pages].unflatten(1, (experts, each)).flatten(2)
        of_b[..., :rank].copy_(own)


def sizes_of(banks: Sequence[PageBank]) -> Mapping[str, tuple[int, int]]:
    """The whole linears that banks adapt: full name -> (in, out)."""
    return {name: size for bank in banks for name, size in zip(bank.names, bank.sizes)}


