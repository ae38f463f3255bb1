"""Which tensors an adapter holds: names, pairs and shapes, of pre-gated and layer-wise routing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import AdapterConfig
from vllm_adafuse.format.context_keys import CONTEXT_KEY, CONTEXT_WEIGHT
from vllm_adafuse.format.keys import CONFIG_FILE, WEIGHTS_FILE
from vllm_adafuse.text import show, some

_LAYER = r"model\.layers\.(?P<layer>0|[1-9]\d{0,5})\.(?P<block>self_attn|mlp)"
_LORA = re.compile(
    rf"(?P<owner>{_LAYER}\.(?P<module>\w{{1,64}}))\.(?P<kind>lora|always)_(?P<side>[AB])", re.ASCII
)
_ROUTER = re.compile(
    rf"(?P<owner>{_LAYER}(?:\.(?P<module>\w{{1,64}}))?)\.router\.(?P<kind>weight|bias)", re.ASCII
)
ENTRANCE_ROUTER = ("router.weight", "router.bias", CONTEXT_WEIGHT)


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, from the file's header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Alike:
    """Problems of tensors. Those that differ in the name only share a line: one wrong number in
    the config may touch every tensor of the file."""

    def __init__(self):
        self.names: dict[str, list[str]] = {}

    def add(self, name: str, text: str) -> None:
        self.names.setdefault(text, []).append(name)

    @property
    def bad(self) -> set[str]:
        return {name for names in self.names.values() for name in names}

    def lines(self) -> list[str]:
        return [f"{WEIGHTS_FILE}: tensor {some(n)}: {text}" for text, n in self.names.items()]


def router_of(projection: str, config: AdapterConfig) -> str:
    """What the router of a linear belongs to: the linear or its block (layer-wise routing)."""
    return projection if config.router_scope == "linear" else projection.rsplit(".", 1)[0]


def past_ranks(
    name: str, shape: tuple[int, ...], config: AdapterConfig
) -> Iterator[tuple[int, int, str]]:
    """Where an expert tensor must be zero: (expert, its rank, side).

    Side "A": `tensor[expert, rank:]`; side "B": `tensor[expert, :, rank:]`.
    """
    match = _LORA.fullmatch(name)
    if not match or match["kind"] != "lora" or config.shared_A or len(shape) != 3:
        return
    ranks = shape[1] if match["side"] == "A" else shape[2]
    for expert, rank in enumerate(config.ranks[: shape[0]]):
        if rank < ranks:
            yield expert, rank, match["side"]


def _made_for(config: AdapterConfig | None, backbone: Backbone) -> str:
    made_for = f"; the adapter was made for {show(config.base_model)[1:-1]}" if config else ""
    return f"the backbone {backbone.path}{made_for}"


def check_targets(config: AdapterConfig, backbone: Backbone) -> list[str]:
    """Problems of a config that its backbone shows: modules and layers that it does not have."""
    problems, layers = [], backbone.num_layers
    if absent := [module for module in config.target_modules if module not in backbone.modules()]:
        problems.append(
            f"{CONFIG_FILE}: `target_modules` lists {some(absent)}, expected only "
            f"{', '.join(sorted(backbone.modules()))}, which {_made_for(config, backbone)} has"
        )
    if config.router_layer >= layers:
        problems.append(
            f"{CONFIG_FILE}: `router.layer` is {config.router_layer}, expected 0 to {layers - 1}, "
            f"the layers of {_made_for(config, backbone)}"
        )
    if config.top_k_layers and len(config.top_k_layers) != layers:
        problems.append(
            f"{CONFIG_FILE}: `top_k` has {len(config.top_k_layers)} entries, expected {layers}, "
            f"one for each layer of {_made_for(config, backbone)}"
        )
    return problems


class _Checker:
    """One walk over the tensors of a file. A dimension that is a word stands for any size."""

    def __init__(self, tensors, config, backbone, alike):
        self.tensors: dict[str, TensorInfo] = tensors
        self.config: AdapterConfig | None = config
        self.backbone: Backbone | None = backbone
        self.alike: Alike = alike
        self.problems: list[str] = []
        self.experts, self.rank = (
            (config.num_experts, config.rank) if config else ("num_experts", "r")
        )
        self.hidden = backbone.hidden_size if backbone else "hidden"
        why = f"num_experts is {self.experts}, the largest r is {self.rank}"
        self.why = why if config else "format"
        self.why += f"; {_made_for(config, backbone)}" if backbone else ""
        # Linears and blocks that have experts.
        linears = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
        self.served = {*linears, *(name.rpartition(".")[0] for name in linears)}
        if config:
            self.layer_wise = config.layer_wise
        else:  # as far as the names tell
            self.layer_wise = any(map(_ROUTER.fullmatch, tensors))

    def expect(self, name: str, *dims: int | str) -> None:
        found = self.tensors[name].shape
        # A size that is not known is not 0: an empty tensor says nothing.
        fits = [
            have > 0 if isinstance(want, str) else want == have for want, have in zip(dims, found)
        ]
        if len(found) != len(dims) or not all(fits):
            expected = ", ".join(map(str, dims))
            self.alike.add(name, f"shape {show(list(found))}, expected [{expected}] ({self.why})")

    def run(self) -> list[str]:
        if not self.layer_wise:
            self.entrance_router()
        for name in self.tensors:
            lora, router = _LORA.fullmatch(name), _ROUTER.fullmatch(name)
            if lora and (self.layer_wise or lora["kind"] == "lora"):
                self.lora(name, lora)
            elif router and self.layer_wise and self.has_scope(router):
                self.router(name, router)
            elif self.layer_wise or name not in ENTRANCE_ROUTER:
                self.alike.add(name, f"unknown name, expected {self.known()}; leave it out")
        self.problems += self.alike.lines()
        if not self.problems:
            self.whole_file()
        return self.problems

    def has_scope(self, router: re.Match) -> bool:
        scope = "linear" if router["module"] else "block"
        return not self.config or self.config.router_scope == scope

    def known(self) -> str:
        if not self.layer_wise:
            return (
                f"router.weight, router.bias, {CONTEXT_WEIGHT} or "
                "model.layers.{i}.{self_attn or mlp}.{module}.lora_A / lora_B"
            )
        linear, block = "model.layers.{i}.{self_attn or mlp}.{module}", "model.layers.{i}.{block}"
        scope = self.config.router_scope if self.config else "linear"
        return (
            f"{linear if scope == 'linear' else block}.router.weight / bias, "
            f"{linear}.lora_A / lora_B or always_A / always_B "
            f"(`routing` is layer_wise, `router.scope` {scope})"
        )

    def entrance_router(self) -> None:
        if "router.weight" in self.tensors:
            self.expect("router.weight", self.experts, self.hidden)
        else:
            self.problems.append(
                f"{WEIGHTS_FILE}: tensor router.weight is missing, expected "
                f"[{self.experts}, {self.hidden}]; save it with the experts"
            )
        if "router.bias" in self.tensors:
            self.expect("router.bias", self.experts)
        reads_past = bool(self.config and self.config.router_context)
        if CONTEXT_WEIGHT in self.tensors:
            self.expect(CONTEXT_WEIGHT, self.experts, self.hidden)
            if self.config and not reads_past:
                self.alike.add(
                    CONTEXT_WEIGHT,
                    f"says what the past is worth, expected `{CONTEXT_KEY}` in {CONFIG_FILE}; set "
                    "it or leave the tensor out",
                )
        elif reads_past:
            self.problems.append(
                f"{WEIGHTS_FILE}: tensor {CONTEXT_WEIGHT} is missing, expected "
                f"[{self.experts}, {self.hidden}] because `{CONTEXT_KEY}` is "
                f"{show(self.config.router_context)}; save it with the experts or leave the key out"
            )

    def sizes(self, name: str, match: re.Match) -> tuple[int | str, int | str]:
        """(in, out) of a tensor's linear, after a check that the backbone has it."""
        layer, owner, module = int(match["layer"]), match["owner"], match["module"]
        backbone = self.backbone
        if backbone and layer >= backbone.num_layers:
            self.alike.add(
                name,
                f"no such layer, expected layers 0 to {backbone.num_layers - 1} "
                f"for {_made_for(self.config, backbone)}",
            )
        elif backbone and owner in backbone.linears:
            return backbone.linears[owner]
        elif backbone and module and (module in backbone.modules() or not self.config):
            self.alike.add(
                name, f"fits no linear of {_made_for(self.config, backbone)}; leave it out"
            )
        return "in", "out"

    def lora(self, name: str, match: re.Match) -> None:
        owner, kind, side, config = match["owner"], match["kind"], match["side"], self.config
        other = f"{owner}.{kind}_{'B' if side == 'A' else 'A'}"
        if other not in self.tensors:
            self.alike.add(name, f"half a pair, expected {other} beside it; save both or neither")
        if config and match["module"] not in config.target_modules:
            self.alike.add(
                name,
                f"its module {match['module']} is not in `target_modules` of {CONFIG_FILE}, "
                f"expected one of {some(config.target_modules)}; list it or leave the tensor out",
            )
        if config and int(match["layer"]) < config.router_layer:
            self.alike.add(
                name,
                f"stands below layer {config.router_layer}, where the router reads "
                "(`router.layer`); only that layer and those above it can be adapted",
            )
        size_in, size_out = self.sizes(name, match)
        if kind == "always":
            rank = (config.always_r or "always_r") if config else "always_r"
            if config and not config.always_r:
                self.alike.add(
                    name,
                    f"is always on, expected `always_r` and `always_alpha` in {CONFIG_FILE}; "
                    "set them or leave the tensor out",
                )
            self.expect(name, *((rank, size_in) if side == "A" else (size_out, rank)))
            return
        experts = self.experts_of(name, owner) if self.layer_wise else self.experts
        if side == "A" and config and config.shared_A:
            experts = 1
        pair = (self.rank, size_in) if side == "A" else (size_out, self.rank)
        self.expect(name, experts, *pair)

    def experts_of(self, name: str, owner: str) -> int | str:
        """E_l of a linear with experts, the rows of its router."""
        if not self.config:
            return "experts"
        router = f"{router_of(owner, self.config)}.router.weight"
        if router not in self.tensors:
            scope = self.config.router_scope
            place = "{block}.{module}" if scope == "linear" else "{block}"
            self.alike.add(
                name,
                f"has no router, expected model.layers.{{i}}.{place}.router.weight of its {scope}; "
                "save it too",
            )
            return "experts"
        shape = self.tensors[router].shape
        return shape[0] if len(shape) == 2 else "experts"

    def router(self, name: str, match: re.Match) -> None:
        owner, config, weight = match["owner"], self.config, f"{match['owner']}.router.weight"
        if match["kind"] == "bias":
            shape = self.tensors[weight].shape if weight in self.tensors else ()
            if not shape:
                self.alike.add(name, f"belongs to no router, expected {weight} beside it")
            self.expect(name, shape[0] if shape else "experts")
            return
        size_in, _ = self.sizes(name, match)
        self.expect(name, "experts", size_in if match["module"] else self.hidden)
        if not config:
            return
        if owner not in self.served:
            self.alike.add(
                name,
                "serves no expert, expected a lora_A / lora_B pair in its "
                f"{config.router_scope}; leave it out",
            )
        rows = self.tensors[name].shape[0] if self.tensors[name].shape else 0
        if not 1 <= rows <= config.num_experts:
            self.alike.add(name, f"{rows} rows, expected 1 to num_experts ({config.num_experts})")
        layer = int(match["layer"])
        if config.top_k_layers and layer >= len(config.top_k_layers):
            self.alike.add(
                name,
                f"no such layer, expected layers 0 to {len(config.top_k_layers) - 1}: `top_k` of "
                f"{CONFIG_FILE} has an entry for each",
            )
        elif (top_k := config.k_of(layer, match["block"])) > rows:
            self.alike.add(
                name,
                f"{rows} rows, expected at least {top_k}, the `top_k` of its place in "
                f"{CONFIG_FILE}",
            )

    def whole_file(self) -> None:
        """What only shows where every tensor is in order."""
        if not any(name.endswith(".lora_A") for name in self.tensors):
            self.problems.append(
                f"{WEIGHTS_FILE}: holds no tensor but the router's, expected at least one lora_A / "
                "lora_B pair; nothing would be adapted"
            )
        elif self.config and self.layer_wise:
            config = self.config
            routers = [t for name, t in self.tensors.items() if name.endswith("router.weight")]
            most = max(router.shape[0] for router in routers)
            if most < config.num_experts:
                self.problems.append(
                    f"{CONFIG_FILE}: `num_experts` is {config.num_experts}, expected {most}, the "
                    f"rows of the largest router in {WEIGHTS_FILE}"
                )
            if config.always_r and not any(n.endswith(".always_A") for n in self.tensors):
                self.problems.append(
                    f"{CONFIG_FILE}: `always_r` is {config.always_r}, but {WEIGHTS_FILE} holds no "
                    "always_A / always_B pair; leave `always_r` and `always_alpha` out"
                )


def check_tensors(
    tensors: dict[str, TensorInfo],
    config: AdapterConfig | None,
    backbone: Backbone | None,
    alike: Alike,
) -> list[str]:
    """Every problem of names, pairs and shapes. What an absent config or backbone would fix is
    left open.

    Args:
        tensors: the file's table.
        config: of the adapter, None where it is broken.
        backbone: None where it is not known.
        alike: gets problems of single tensors; may hold some already.
    """
    return _Checker(tensors, config, backbone, alike).run()
