"""The experts of one projection that is routed inside its layer, and its routers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm_adafuse.format.adapter import Adapter
from vllm_adafuse.kernels.device.epilogues import result_width
from vllm_adafuse.kernels.layerwise.low_product import low_product
from vllm_adafuse.kernels.layerwise.operands import LayerGate, LayerGates, LayerProjection
from vllm_adafuse.kernels.layerwise.route import split_router
from vllm_adafuse.serving import ops
from vllm_adafuse.serving.bank import aligned
from vllm_adafuse.serving.projections import (
    Place,
    bias_of,
    is_row_sharded,
    own_rows,
    slices_of,
)

# Pieces into which a float32 router is cut for rows of two-byte numbers, see `split_router`.
ROUTER_SPLITS = 3
# Rows of a fused weight are a multiple of it.
_ROWS_ALIGNED = 16


class Gates(torch.nn.Module):
    """What routers of one shape decided last, in static buffers. Layers run one after the other,
    so all of them share it.

    Attributes:
        gates: [N, routers, E] float32, plain.
        active: [1] int64, a bit for each expert with a gate.
    """

    def __init__(self, rows: int, routers: int, experts: int):
        super().__init__()
        gates = torch.zeros(rows, routers, experts, dtype=torch.float32)
        self.register_buffer("gates", gates, persistent=False)
        active = torch.zeros(1, dtype=torch.int64)
        self.register_buffer("active", active, persistent=False)

    @property
    def layer(self) -> LayerGates:
        """As kernels take them."""
        return LayerGates(self.gates, self.active)


class LayerBank(torch.nn.Module):
    """A of the P adapted linears of a projection and, below it, its routers; B; as this rank of
    tensor parallelism holds them.

    The rows are A [P, EA, R, in], then routers [S, routers, E, in] in S pieces of the model's
    dtype; where the projection is joined, W stands before them. Parts that are always on are
    experts past E, cut to rank R. `place` makes the buffers, which are not persistent: no loader of
    vLLM writes or misses them.

    Args:
        place: which projection.
        adapter: the adapter, checked.
        dtype: of the model.
        gates_of: (routers, E) -> the buffers to decide in.
        fuse: W is to stand before the rows in one tensor, see `wrap.linears.join`.
    """

    cache = None  # keys and values are written by vLLM

    def __init__(
        self,
        place: Place,
        adapter: Adapter,
        dtype: torch.dtype,
        gates_of: Callable[[int, int], Gates],
        fuse: bool = False,
    ):
        super().__init__()
        config, tensors = adapter.config, adapter.tensors
        self.config, self.dtype, self.epilogue = config, dtype, ""
        self.layer_name = f"{place.layer.prefix}.adafuse"
        # Asked when all is loaded; no module, which would be below this one then.
        self._bias_of = functools.partial(bias_of, place.layer)
        adapted = {*adapter.projections, *adapter.always_on}
        self.slices = slices_of(
            place.layer, [name if name in adapted else None for name in place.linears]
        )
        names = self.slices.names
        self.with_experts = [name in adapter.projections for name in names]
        self.with_always = [name in adapter.always_on for name in names]

        def rows_of(owner: str) -> int:
            return tensors[f"{owner}.router.weight"].shape[0]

        self.routers: list[str | None] = []
        own_block = place.block_name in adapter.routers
        if config.router_scope == "linear" and any(self.with_experts):
            self.routers = [n if has else None for n, has in zip(names, self.with_experts)]
        elif config.router_scope == "block" and own_block and place.decides:
            self.routers = [place.block_name]
        self.biased = {owner for owner in self.routers if f"{owner}.router.bias" in tensors}
        counts = tuple(rows_of(owner) if owner else 0 for owner in self.routers)
        self.experts = max(counts, default=0)
        if not counts and any(self.with_experts):
            self.experts = rows_of(place.block_name)
        # A projection of parts that are always on alone has a rank of its own.
        self.rank = config.rank if self.experts else config.always_r
        self.always = math.ceil(config.always_r / self.rank) if any(self.with_always) else 0
        self.num_all_experts = self.experts + self.always
        self.rows_a = (1 if config.shared_A and self.experts else self.experts) + self.always
        self.columns = len(names) * self.rows_a * self.rank
        self.splits = 1
        if dtype != torch.float32 and any(
            tensors[f"{owner}.router.weight"].dtype != dtype for owner in self.routers if owner
        ):
            self.splits = ROUTER_SPLITS
        self.gate = LayerGate(
            top_k=config.k_of(place.index, place.block) if counts else 0,
            experts=counts,
            always=self.always,
            softmax_first=config.router_weights == "softmax_topk",
            absolute=config.router_logits == "abs",
            temperature=config.temperature,
            shared=config.shared_A and self.experts > 0,
            plain=place.whole_ffn and place.decides,
        )
        self.top_k = config.k_of(place.index, place.block)
        self.reduces = bool(counts) and is_row_sharded(place.layer)
        self._rows_of_w = sum(self.slices.widths) if fuse else 0
        self.shared_gates = gates_of(max(1, len(self.routers)), self.experts)
        # Not in the default dtype, which vLLM sets to the model's.
        f32 = torch.float32
        scales = [*config.scales[: self.experts], *[config.always_scale] * self.always]
        self.register_buffer("scales", torch.tensor(scales, dtype=f32), persistent=False)
        bias = torch.zeros(len(self.routers), self.experts, dtype=f32)
        self.register_buffer("bias", bias, persistent=False)

    @property
    def numel(self) -> int:
        """Elements that `place` takes."""
        first = aligned((self._rows_of_w + self._rows) * self.slices.size_in)
        return first + aligned(self.slices.adapted_columns * self.num_all_experts * self.rank)

    @property
    def logits(self) -> int:
        """Rows of all pieces of the routers."""
        return self.splits * len(self.routers) * self.experts

    @property
    def _rows(self) -> int:
        rows = self.columns + self.logits
        # Rows of the product's result begin where whole vectors do.
        return rows + (-(self._rows_of_w + rows) % _ROWS_ALIGNED if self._rows_of_w else 0)

    def place(self, memory: torch.Tensor) -> None:
        """Takes its place in [numel] zeros of the model's dtype."""
        rows, size_in = self._rows_of_w + self._rows, self.slices.size_in
        fused = memory[: rows * size_in].view(rows, size_in)
        if self._rows_of_w:
            self.register_buffer("fused_weight", fused, persistent=False)
        self.register_buffer("rows", fused[self._rows_of_w :], persistent=False)
        shape = self.slices.adapted_columns, self.num_all_experts, self.rank
        b = memory[aligned(fused.numel()) :][: math.prod(shape)].view(shape)
        self.register_buffer("lora_b", b, persistent=False)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.lora_b.nbytes

    def load(self, read: Callable[[str], torch.Tensor]) -> None:
        """Copies this rank's shards out of the adapter.

        Args:
            read: tensor name -> tensor on the CPU, unsharded.
        """
        own, first = self.slices, 0
        size_in, always = own.size_in, self.always
        lora_a = self.rows[: self.columns].view(len(own.names), self.rows_a, self.rank, size_in)
        for i, (name, shards) in enumerate(zip(own.names, own.linear_shards)):
            b = self.lora_b[first : first + sum(shard.width for shard in shards)]
            first += len(b)
            if self.with_experts[i]:
                a = read(f"{name}.lora_A")[..., own.input_slice]
                lora_a[i, : len(a)].copy_(a)
                rows = own_rows(read(f"{name}.lora_B"), shards).transpose(0, 1)
                b[:, : rows.shape[1]].copy_(rows)
            if self.with_always[i]:
                a, rows = read(f"{name}.always_A"), own_rows(read(f"{name}.always_B"), shards)
                flat_a = lora_a[i, self.rows_a - always :].flatten(0, 1)
                flat_a[: len(a)].copy_(a[:, own.input_slice])
                padded = rows.new_zeros(len(rows), always * self.rank)
                padded[:, : rows.shape[1]] = rows
                b[:, self.experts :].copy_(padded.view(len(rows), always, self.rank))
        shape = self.splits, len(self.routers), self.experts, size_in
        routers = self.rows[self.columns :][: self.logits].view(shape)
        for at, (owner, count) in enumerate(zip(self.routers, self.gate.experts)):
            if owner is None:
                continue
            weight = read(f"{owner}.router.weight").float()[:, own.input_slice]
            split = split_router(weight, self.dtype)
            routers[: len(split), at, :count].copy_(split)
            if owner in self.biased:
                self.bias[at, :count].copy_(read(f"{owner}.router.bias"))

    def lora_a_out(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [T, in] in rank space [T, P EA R], and the routers' logits; float32."""
        lora_a_out = low_product(x, self.rows)
        if not self.routers:
            return lora_a_out, None
        logits = lora_a_out[:, self.columns :]
        if self.reduces:
            logits = tensor_model_parallel_all_reduce(logits.contiguous())
        return lora_a_out[:, : self.columns], logits

    @functools.cached_property
    def projection(self) -> LayerProjection:
        """What kernels take; once all is loaded."""
        return LayerProjection(
            self.gate, tuple(self.slices.widths), tuple(self.slices.adapted), self.scales,
            self.lora_b, self.bias if self.routers else None, self.logits,
            self.fused_weight if self._rows_of_w else None, self._bias_of(), self.epilogue,
        )  # fmt: skip

    @functools.cached_property
    def step(self) -> LayerGates:
        """The gates of its kind as kernels take them."""
        return self.shared_gates.layer

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y + delta, in place. x: [T, in], y: [T, out] of this rank."""
        ops.layer_deltas(y, *self.lora_a_out(x), self.shared_gates.gates, ops.named(self.layer_name))
        return y

    def route(self, x: torch.Tensor) -> torch.Tensor:
        """s [T, P, E' R] of x [T, in], see `route_layer`."""
        shape = len(self.slices.names), self.num_all_experts * self.rank
        decided = *self.lora_a_out(x), self.shared_gates.gates, ops.named(self.layer_name)
        return ops.layer_route(x, *decided, *shape)

    @property
    def weight(self) -> torch.Tensor:
        """The rows of the fused weight that are W [out, in]."""
        return self.fused_weight[: self._rows_of_w]

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The projection, joined before, with its deltas and the activation that follows it;
        `projection` has this bias already."""
        width = result_width(self.slices.widths, self.epilogue)
        gates, layer = self.shared_gates.gates, ops.named(self.layer_name)
        return ops.layer_projection(x, gates, layer, width, width)
