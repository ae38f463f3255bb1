"""Which linears of a vLLM model take experts, how these lie in its packed and sharded projections,
and what follows a projection that kernels can compute with it. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.platforms import current_platform
from vllm_adafuse.format.adapter import Adapter
from vllm_adafuse.format.config import BLOCKS
from vllm_adafuse.kernels.device.epilogues import can_rotate

# The projection of each block that reads what the block reads.
_FIRST = {"self_attn": "qkv_proj", "mlp": "gate_up_proj"}


@dataclass(frozen=True)
class Shard:
    """One slice of a projection's output: columns [start, start + width) of `full`."""

    full: int
    start: int
    width: int


def output_shards(layer: LinearBase) -> list[Shard]:
    """The slices of a projection's output that this rank computes, in their order in y.

    Raises:
        TypeError: a linear layer whose sharding is not known.
    """
    if isinstance(layer, (RowParallelLinear, ReplicatedLinear)):
        return [Shard(layer.output_size, 0, layer.output_size)]
    rank, size = layer.tp_rank, layer.tp_size
    if isinstance(layer, QKVParallelLinear):
        kv_rank = rank // layer.num_kv_head_replicas
        heads = (
            (layer.total_num_heads, layer.num_heads, layer.head_size, rank),
            (layer.total_num_kv_heads, layer.num_kv_heads, layer.head_size, kv_rank),
            (layer.total_num_kv_heads, layer.num_kv_heads, layer.v_head_size, kv_rank),
        )
        return [Shard(total * dim, at * own * dim, own * dim) for total, own, dim, at in heads]
    if isinstance(layer, MergedColumnParallelLinear):
        return [Shard(full, rank * (full // size), full // size) for full in layer.output_sizes]
    if isinstance(layer, ColumnParallelLinear):
        width = layer.output_size // size
        return [Shard(layer.output_size, rank * width, width)]
    raise TypeError(f"vllm-adafuse does not know how {type(layer).__name__} is sharded")


@dataclass(frozen=True)
class Slices:
    """How the adapted Hugging Face linears lie in a projection of vLLM, on this rank.

    Attributes:
        names: full names of the adapted linears.
        linear_shards: of each, its slices of the output.
        adapted: for each slice of the output the index of its linear, -1 for none.
        widths: columns of each slice.
        size_in: inputs on this rank.
        input_slice: which of the whole linear's inputs those are.
    """

    names: list[str]
    linear_shards: list[list[Shard]]
    adapted: list[int]
    widths: list[int]
    size_in: int
    input_slice: slice

    @property
    def adapted_columns(self) -> int:
        """Columns that belong to an adapted linear."""
        return sum(shard.width for group in self.linear_shards for shard in group)


def slices_of(layer: LinearBase, linears: Sequence[str | None]) -> Slices:
    """The slices of a projection.

    Args:
        layer: vLLM's linear layer.
        linears: full names of its Hugging Face linears in the order of their outputs, None for
            one without an adapter.

    Raises:
        TypeError: see `output_shards`.
        ValueError: the projection does not consist of so many linears.
    """
    shards = output_shards(layer)
    # One Hugging Face linear may be all of a packed projection (Phi-3).
    groups = [shards] if len(linears) == 1 else [[shard] for shard in shards]
    if len(groups) != len(linears):
        raise ValueError(f"{layer.prefix} has {len(groups)} slices, expected {list(linears)}")
    linear_shards, of_slices, widths = [], [], []
    for name, group in zip(linears, groups):
        of_slices += [len(linear_shards) if name else -1] * len(group)
        widths += [shard.width for shard in group]
        if name:
            linear_shards.append(group)
    size_in, first = layer.input_size, 0
    if isinstance(layer, RowParallelLinear):
        size_in = layer.input_size_per_partition
        first = layer.tp_rank * size_in
    return Slices(
        [name for name in linears if name], linear_shards, of_slices, widths,
        size_in, slice(first, first + size_in),
    )  # fmt: skip


def own_rows(full: torch.Tensor, shards: Sequence[Shard]) -> torch.Tensor:
    """This rank's rows of a whole linear's B [..., out, R], in the order of its slices."""
    start, rows = 0, []
    for shard in shards:
        rows.append(full[..., start + shard.start : start + shard.start + shard.width, :])
        start += shard.full
    return torch.cat(rows, -2)


def bias_of(layer: LinearBase) -> torch.Tensor | None:
    """What vLLM hands a projection's method as bias."""
    elsewhere = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
    return None if layer.skip_bias_add or elsewhere else getattr(layer, "bias", None)


def linears_of(
    model: torch.nn.Module, packed: Mapping[str, Sequence[str]], prefixes: Sequence[str] | None
) -> Iterator[tuple[LinearBase, torch.nn.Module, list[str]]]:
    """The linears of a model that see its tokens, their blocks (attention, MLP), and the full names of
    the linears that they consist of.

    Args:
        model: as vLLM built it.
        packed: leaf name of a projection -> leaf names of its linears.
        prefixes: only below one of these modules; None: everywhere.
    """
    pooled = _called_by(getattr(model, "pooler", None))
    for name, module in list(model.named_modules()):
        if not isinstance(module, LinearBase) or module.quant_method is None or module in pooled:
            continue
        if prefixes is not None and not name.startswith(tuple(f"{p}." for p in prefixes)):
            continue
        block, _, leaf = name.rpartition(".")
        names = [f"{block}.{part}" if block else part for part in packed.get(leaf, [leaf])]
        yield module, model.get_submodule(block), names


def _called_by(pooler: torch.nn.Module | None) -> set[torch.nn.Module]:
    """A pooler and all that it calls, a classifier's head among it: their rows are of requests."""
    found: set[torch.nn.Module] = set()
    left = [pooler]
    while left:
        if isinstance(module := left.pop(), torch.nn.Module) and module not in found:
            found.add(module)
            # Poolers of several tasks lie in a dictionary that torch knows nothing of.
            held = (value for value in vars(module).values() if isinstance(value, Mapping))
            left += [child for own in held for child in own.values()]
    return found


def adapted_linears(
    model: torch.nn.Module, adapted: set[str], packed: Mapping[str, Sequence[str]]
) -> Iterator[tuple[LinearBase, torch.nn.Module, list[str | None]]]:
    """The linears of this pipeline stage with experts, their blocks, and of each the full names of
    its linears, None for one without an adapter.

    Args:
        model: a `…ForCausalLM` of vLLM.
        adapted: full names of the adapter's linears.
        packed: see `linears_of`.
    """
    for layer, block, names in linears_of(model, packed, None):
        linears = [name if name in adapted else None for name in names]
        if any(linears):
            yield layer, block, linears


@dataclass(frozen=True)
class Place:
    """One projection of vLLM in a layer-wise adapter.

    Attributes:
        layer: the projection.
        owner: the attention or MLP that it belongs to.
        linears: full names of its Hugging Face linears in the order of their outputs.
        index, block: of the decoder layer, and "self_attn" or "mlp".
        decides: it reads what its block reads, first of the block.
        whole_ffn: it belongs to an MLP whose experts are mixed at its output.
    """

    layer: LinearBase
    owner: torch.nn.Module
    linears: tuple[str, ...]
    index: int
    block: str
    decides: bool
    whole_ffn: bool

    @property
    def block_name(self) -> str:
        return f"model.layers.{self.index}.{self.block}"


def is_row_sharded(layer: LinearBase) -> bool:
    """Whether ranks hold parts of a projection's input: logits are then sums over the ranks."""
    return isinstance(layer, RowParallelLinear) and layer.tp_size > 1


def places(
    model: torch.nn.Module, adapter: Adapter, packed: Mapping[str, Sequence[str]]
) -> Iterator[Place]:
    """This pipeline stage's projections that have experts, parts always on, or a block's router.

    Args:
        model: a `…ForCausalLM` of vLLM.
        adapter: a layer-wise adapter.
        packed: see `linears_of`.
    """
    config, adapted = adapter.config, {*adapter.projections, *adapter.always_on}
    for layer, owner, linears in linears_of(model, packed, None):
        block_name, _, _ = linears[0].rpartition(".")
        _, _, index, *block = block_name.split(".") if block_name.count(".") == 3 else [None] * 4
        if not index or block[0] not in BLOCKS:
            continue
        routed = block_name in adapter.routers
        first = dict(owner.named_children()).get(_FIRST[block[0]]) is layer
        if adapted.intersection(linears) or (routed and first):
            whole = config.mix == "ffn_output" and block[0] == "mlp" and routed
            yield Place(layer, owner, tuple(linears), int(index), block[0], first, whole)


def can_fuse(layer: LinearBase) -> bool:
    """Whether the projection is a plain product on a GPU, which vLLM leaves to cuBLAS."""
    plain = type(layer.quant_method) is UnquantizedLinearMethod
    return plain and current_platform.is_cuda_alike() and not envs.VLLM_BATCH_INVARIANT


def activation_of(block: torch.nn.Module) -> str:
    """The name of an MLP's activation, where the kernels know it; "" otherwise."""
    act = getattr(block, "act_fn", None)
    if type(act) is SiluAndMul:
        return "silu"
    return "gelu_tanh" if type(act) is GeluAndMul and act.approximate == "tanh" else ""


def can_turn(layer: LinearBase, block: torch.nn.Module) -> bool:
    """Whether the projection of q, k and v can apply its block's rotary embedding."""
    if getattr(block, "qkv_proj", None) is not layer or getattr(block, "qk_norm", False):
        return False
    return _turns_by_halves(getattr(block, "rotary_emb", None), layer)


def _turns_by_halves(rotary: torch.nn.Module | None, layer: LinearBase) -> bool:
    """The embedding turns whole heads, halves against halves, by one table."""
    if not isinstance(rotary, RotaryEmbedding) or not isinstance(layer, QKVParallelLinear):
        return False
    kind, heads = type(rotary), {layer.head_size, layer.v_head_size, rotary.head_size}
    return (
        kind.forward_native is RotaryEmbedding.forward_native
        and kind.forward_cuda is RotaryEmbedding.forward_cuda
        and rotary.is_neox_style
        and heads == {rotary.rotary_dim}
        and can_rotate(rotary.rotary_dim)
    )


@dataclass(frozen=True)
class NormPlace:
    """Where a model keeps a norm."""

    owner: torch.nn.Module
    name: str

    @property
    def norm(self) -> torch.nn.Module:
        return getattr(self.owner, self.name)


def norms_behind(
    model: torch.nn.Module, vllm_config: VllmConfig, residual_norms: bool
) -> dict[LinearBase, NormPlace]:
    """The projections of this pipeline stage whose output only the next norm reads, and that norm.

    Args:
        model: the decoder, `.model` of a vLLM class.
        vllm_config: of the engine.
        residual_norms: the family adds o_proj's and down_proj's outputs to the residual in the
            norm that follows them, and uses them for nothing else.
    """
    # Draft models read the states between layers.
    if not residual_norms or vllm_config.speculative_config is not None:
        return {}
    places, start, end = {}, model.start_layer, model.end_layer
    for index in range(start, end):
        layer = model.layers[index]
        places[layer.self_attn.o_proj] = NormPlace(layer, "post_attention_layernorm")
        if index + 1 < end:
            places[layer.mlp.down_proj] = NormPlace(model.layers[index + 1], "input_layernorm")
        elif get_pp_group().is_last_rank:
            places[layer.mlp.down_proj] = NormPlace(model, "norm")
    return {layer: place for layer, place in places.items() if _fits(layer, place.norm)}


def _fits(layer: LinearBase, norm: torch.nn.Module) -> bool:
    """Nothing stands between the product and the norm: no bias, no sum over other ranks."""
    plain = type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
    return plain and isinstance(layer, RowParallelLinear) and layer.tp_size == 1 and (
        getattr(layer, "bias", None) is None
    )
