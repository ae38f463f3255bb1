"""Which kernels serve an adapter, without a GPU: the shapes that serving makes, and their plans."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import Adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.kernels.configs import PAGE_RANKS
from vllm_adafuse.kernels.device.epilogues import can_rotate
from vllm_adafuse.kernels.dispatch import plan
from vllm_adafuse.kernels.plans import Device, Plan, Shape, on_pages

# How vLLM packs linears of a layer, and those whose input ranks of tensor parallelism share out.
PACKED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "self_attn.o_proj": ("o_proj",),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
    "mlp.down_proj": ("down_proj",),
}
ROW_PARALLEL = ("o_proj", "down_proj")
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Capabilities of NVIDIA's GPUs by name; older ones are 8 here, which no choice tells apart.
MAJORS = {"H100": 9, "H200": 9, "H20": 9, "H800": 9, "GH200": 9, "B100": 10, "B200": 10, "B300": 10}


def device_named(name: str) -> Device:
    """A GPU that need not be here, by the name that torch gives it ("NVIDIA H200")."""
    known = [major for gpu, major in MAJORS.items() if gpu in name.replace("-", " ").split()]
    return Device(name, known[0] if known else 8)


@dataclass(frozen=True)
class Model:
    """What a backbone's config says beside the shapes of its linears.

    Attributes:
        activation: of its MLP, as Hugging Face names it.
        head_dim, heads, kv_heads: of attention.
        itemsize: bytes of an element of its dtype.
        quantised: its linears are.
        turns: the rotary embedding turns whole heads, by one table.
    """

    activation: str
    head_dim: int
    heads: int
    kv_heads: int
    itemsize: int = 2
    quantised: bool = False
    turns: bool = True

    @classmethod
    def of(cls, config: Any) -> Model:
        """Of a `PretrainedConfig`."""
        heads = config.num_attention_heads
        dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
        scaling = getattr(config, "rope_scaling", None) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        return cls(
            # Gemma has both, and means this one.
            activation=getattr(config, "hidden_activation", None) or config.hidden_act,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            itemsize=dtype.itemsize if isinstance(dtype, torch.dtype) else 2,
            quantised=getattr(config, "quantization_config", None) is not None,
            turns=kind != "longrope" and (getattr(config, "partial_rotary_factor", 1) or 1) == 1,
        )


def shapes_of(
    backbone: Backbone, model: Model, adapter: Adapter | SimpleNamespace, ranks: int = 1
) -> Iterator[tuple[int, str, Shape]]:
    """The adapted projections as vLLM packs and shards them: layer, name in it, shape.

    Of an adapter `projections` are asked for, and its config's `num_experts` and `rank`.

    Raises:
        AdapterError: a width is not divisible by the ranks.
    """
    adapted, config = set(adapter.projections), adapter.config
    for layer in range(backbone.num_layers):
        of_layer = shapes_of_layer(
            backbone, model, layer, adapted, (config.num_experts, config.rank), ranks
        )
        for name, shape in of_layer:
            yield layer, name, shape


def shapes_on_pages(
    backbone: Backbone, model: Model, pages: int, ranks: int = 1, fp8: bool = False
) -> Iterator[tuple[int, str, Shape]]:
    """The same where requests choose their adapters: all linears, and an expert for each page.

    Args:
        pages: of the pool.
        fp8: it is in fp8.

    Raises:
        AdapterError: see `shapes_of`.
    """
    config = SimpleNamespace(num_experts=pages, rank=PAGE_RANKS)
    everywhere = SimpleNamespace(projections=tuple(backbone.linears), config=config)
    for layer, name, shape in shapes_of(backbone, model, everywhere, ranks):
        yield layer, name, on_pages(replace(shape, fp8=fp8))


def shapes_of_layer(
    backbone: Backbone,
    model: Model,
    layer: int,
    adapted: set[str],
    experts: tuple[int, int],
    ranks: int = 1,
) -> Iterator[tuple[str, Shape]]:
    """The adapted projections of one layer: name in it, shape.

    Args:
        adapted: full names of the adapted linears.
        experts: their number, and the largest rank.
        ranks: of tensor parallelism.

    Raises:
        AdapterError: a width is not divisible by the ranks.
    """
    for name, leaves in PACKED.items():
        block, whole = name.split(".")
        first = f"model.layers.{layer}.{block}"
        if f"{first}.{whole}" in backbone.linears:  # Phi-3 has one linear for all
            leaves = (whole,)
        linears = [f"{first}.{leaf}" for leaf in leaves]
        if not adapted.intersection(linears):
            continue
        size_in, widths = _sizes(backbone, model, linears, ranks)
        numbers, found = [], -1
        for linear in linears:
            found += linear in adapted
            numbers.append(found if linear in adapted else -1)
        if len(linears) == 1:
            numbers *= len(widths)
        biased = not backbone.biased.isdisjoint(linears)
        epilogue = _epilogue(backbone, model, whole, ranks, biased)
        yield name, Shape(
            size_in, widths, tuple(numbers), *experts, model.itemsize,
            "" if model.quantised else epilogue,
            model.head_dim if epilogue == "rotary" and not model.quantised else 0,
            biased, not model.quantised,
        )  # fmt: skip


def _sizes(
    backbone: Backbone, model: Model, linears: list[str], ranks: int
) -> tuple[int, tuple[int, ...]]:
    """Inputs, and columns of each slice, on one rank."""
    size_in, leaf = backbone.linears[linears[0]][0], linears[0].rsplit(".", 1)[1]
    widths = [backbone.linears[linear][1] for linear in linears]
    if leaf == "gate_up_proj":
        widths = [widths[0] // 2] * 2
    elif leaf == "qkv_proj":
        widths = [n * model.head_dim for n in (model.heads, model.kv_heads, model.kv_heads)]
    shared = [size_in] if leaf in ROW_PARALLEL else widths
    if any(n % ranks for n in shared):
        raise AdapterError(
            f"backbone {backbone.path}",
            [f"{linears[0]} has {shared[0]} to share out, expected a multiple of {ranks} ranks"],
        )
    if leaf in ROW_PARALLEL:
        return size_in // ranks, tuple(widths)
    return size_in, tuple(width // ranks for width in widths)


def _epilogue(backbone: Backbone, model: Model, whole: str, ranks: int, biased: bool) -> str:
    family = backbone.architecture
    if whole == "qkv_proj":
        turns = family.rotary_follows and model.turns and can_rotate(model.head_dim)
        return "rotary" if turns else ""
    if whole == "gate_up_proj":
        return ACTIVATIONS.get(model.activation, "")
    return "norm" if family.residual_norms and ranks == 1 and not biased else ""


@dataclass(frozen=True)
class Line:
    """What projections of one kind run.

    Attributes:
        name: of the projection within its layer.
        layers: in which.
        shape, plan: of it.
    """

    name: str
    layers: tuple[int, ...]
    shape: Shape
    plan: Plan


def explain(
    shapes: Iterator[tuple[int, str, Shape]], num_tokens: int, device: Device
) -> list[Line]:
    """The plans of a step of T tokens, by the `plan` that serving calls; equal ones as one line."""
    layers: dict[tuple[str, Shape], list[int]] = {}
    for layer, name, shape in shapes:
        layers.setdefault((name, shape), []).append(layer)
    return [
        Line(name, tuple(of), shape, plan(shape, num_tokens, device))
        for (name, shape), of in layers.items()
    ]
