"""The expert weights of one projection, as this rank of tensor parallelism holds them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm_adafuse.kernels import projection, projection_norm
from vllm_adafuse.kernels.operands import Norm, Projection, Step, stays_in_place
from vllm_adafuse.kernels.plans import Shape
from vllm_adafuse.serving import ops
from vllm_adafuse.serving.kv_cache import LayerCache
from vllm_adafuse.serving.projections import bias_of, own_rows, slices_of
from vllm_adafuse.serving.routes import Route


def aligned(elements: int) -> int:
    """Up to whole 128 bytes of two-byte elements, as kernels read best."""
    return -(-elements // 64) * 64


def place_banks(banks: Sequence[ExpertBank], dtype: torch.dtype) -> None:
    """Gives all banks one allocation: the allocator rounds every large one up to 2 MiB."""
    sizes = [bank.numel for bank in banks]
    for bank, memory in zip(banks, torch.zeros(sum(sizes), dtype=dtype).split(sizes)):
        bank.place(memory)


class ExpertBank(torch.nn.Module):
    """A [P, E, R, in] and B [sum of widths, E, R] of the P adapted linears of one projection.

    Those are Hugging Face's (q_proj of vLLM's qkv_proj); one without an adapter takes no memory.
    The buffers are not persistent, so no loader of vLLM writes or misses them; `place` makes them.

    Args:
        layer: vLLM's linear layer.
        linears: full names of its Hugging Face linears in the order of their outputs, None for
            one without an adapter.
        num_experts: E.
        rank: R, the largest rank.
        route: the step's static buffers.
        index: of the projection, its row in the route's semaphores.
        fuse: W and A are to stand in one tensor; see `wrap.linears.join`.

    Attributes:
        slices: how its linears lie in the projection.
        before_norm: `projection_norm` computes the projection together with the norm behind it.
        in_place: what follows gate_up may stay in its product's memory, see `stays_in_place`.
        cache: where the projection of q, k and v may write keys and values itself; or None.
        epilogue: what follows the projection in the same op, see `Shape`.
        layer_name: by which the ops find this bank.
        layout: of what `linear` returns, columns and elements between rows, see `settle`.
    """

    gate = None  # of layers that route themselves, see `LayerBank`

    def __init__(
        self,
        layer: LinearBase,
        linears: Sequence[str | None],
        num_experts: int,
        rank: int,
        route: Route,
        index: int,
        fuse: bool = False,
    ):
        super().__init__()
        self.route, self.index = route, index
        self.before_norm = self.in_place = False
        self.cache: LayerCache | None = None
        self.epilogue, self.layer_name, self.layout = "", f"{layer.prefix}.adafuse", (0, 0)
        # Asked when all is loaded; no modules, which would be below this one then.
        self.bias_of = functools.partial(bias_of, layer)
        self.norm_of: Callable[[], Norm] | None = None
        self.slices = slices = slices_of(layer, linears)
        self.names, self.linear_shards = slices.names, slices.linear_shards
        self.adapted, self.widths = slices.adapted, slices.widths
        self.input_slice, size_in = slices.input_slice, slices.size_in
        self._shape_a = len(self.names), num_experts, rank, size_in
        self._shape_b = slices.adapted_columns, num_experts, rank
        self._rows_of_w = sum(self.widths) if fuse else 0

    @property
    def is_fused(self) -> bool:
        """Whether W and A stand in one tensor."""
        return self._rows_of_w > 0

    @property
    def numel(self) -> int:
        """Elements that `place` takes."""
        first = self._rows_of_w * self._shape_a[-1] + math.prod(self._shape_a)
        return aligned(first) + aligned(math.prod(self._shape_b))

    def place(self, memory: torch.Tensor) -> None:
        """Takes its place in [numel] zeros of the model's dtype."""
        rows, size_in = self._rows_of_w, self._shape_a[-1]
        all_rows = rows + math.prod(self._shape_a[:-1])
        fused = memory[: all_rows * size_in].view(all_rows, size_in)
        if rows:
            self.register_buffer("fused_weight", fused, persistent=False)
        self.register_buffer("lora_a", fused[rows:].view(self._shape_a), persistent=False)
        b = memory[aligned(fused.numel()) :][: math.prod(self._shape_b)].view(self._shape_b)
        self.register_buffer("lora_b", b, persistent=False)
        self.register_buffer("lora_scale", None, persistent=False)

    @property
    def nbytes(self) -> int:
        return self.lora_a.nbytes + self.lora_b.nbytes

    def load(self, read: Callable[[str], torch.Tensor]) -> None:
        """Copies this rank's shards out of the adapter.

        Args:
            read: tensor name -> tensor on the CPU, unsharded.
        """
        row = 0
        for i, (name, shards) in enumerate(zip(self.names, self.linear_shards)):
            self.lora_a[i].copy_(read(f"{name}.lora_A")[..., self.input_slice])
            own = own_rows(read(f"{name}.lora_B"), shards).transpose(0, 1)
            self.lora_b[row : row + len(own)].copy_(own)
            row += len(own)

    def workspace_sizes(self) -> tuple[int, int, int]:
        sizes = projection_norm if self.before_norm else projection
        return sizes.workspace_sizes(self.lora_a, sum(self.widths))

    @functools.cached_property
    def shape(self) -> Shape:
        """By which kernels are chosen; once all is wrapped."""
        rotates = self.epilogue == "rotary"
        _, experts, rank, size_in = self._shape_a
        return Shape(
            size_in, tuple(self.widths), tuple(self.adapted), experts, rank,
            self.lora_b.element_size(), self.epilogue,
            self.rotary.cos_sin.shape[1] if rotates else 0,
            self.bias_of() is not None, self.is_fused,
        )  # fmt: skip

    def settle(self) -> None:
        """Once all is wrapped, and before anything is compiled: says what a graph has to know."""
        self.layout = projection.result_layout(self.shape, self.strided_out)

    @property
    def strided_out(self) -> bool:
        """See `Projection`."""
        return self.in_place and stays_in_place(self.shape)

    @functools.cached_property
    def projection(self) -> Projection:
        """What kernels take; once all is loaded."""
        route = self.route
        return Projection(
            self.shape, self.lora_a, self.lora_b, self.fused_weight if self.is_fused else None,
            self.bias_of(), None if self.norm_of is None else self.norm_of(),
            route.semaphores[self.index], self.strided_out, self.lora_scale,
        )  # fmt: skip

    @functools.cached_property
    def step(self) -> Step:
        """The step's buffers as kernels take them."""
        cos_sin = self.rotary.cos_sin if self.epilogue == "rotary" else None
        return Step(self.route.gates, self.route.active, self.route.workspace, cos_sin)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + delta, in place. x: [T, in], y: [T, out] of this rank."""
        ops.deltas(y, x, self.route.gates, ops.named(self.layer_name))
        return y

    @property
    def weight(self) -> torch.Tensor:
        """The rows of the fused weight that are W [out, in]."""
        return self.fused_weight[: self._rows_of_w]

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The projection, joined before, with its deltas and what follows it; `projection` has
        this bias already."""
        return ops.projection(x, self.route.gates, ops.named(self.layer_name), *self.layout)

    def linear_norm(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of residual + x Wᵀ + delta, and that sum. Of a fused projection of one slice."""
        return ops.projection_norm(x, residual, self.route.gates, ops.named(self.layer_name))
