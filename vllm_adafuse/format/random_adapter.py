"""Adapters with random weights, for load tests and for trying a backbone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import (
    CONFIG_FILE,
    LAYER_WISE,
    VERSION_2,
    WEIGHTS_FILE,
    AdapterConfig,
    parse_config,
)
from vllm_adafuse.format.context_keys import CONTEXT_WEIGHT
from vllm_adafuse.format.files import save_tensors
from vllm_adafuse.format.layout import router_of
from vllm_adafuse.format.normals import Normals


def write_adapter(
    path: str | Path,
    config: AdapterConfig,
    tensors: dict[str, torch.Tensor],
    extra: dict[str, Any] | None = None,
) -> Path:
    """Writes an adapter directory; existing adapter files in it are replaced.

    Args:
        path: the directory.
        config: its config.
        tensors: by their names in the format.
        extra: further keys of the config; they begin with x_.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, path / WEIGHTS_FILE)
    content = config.to_json() | (extra or {})
    (path / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
    return path


@dataclass
class RandomOptions:
    """What adapter to make, beside the keys of its config.

    Attributes:
        num_experts: E.
        top_k: k; layer-wise also per block or per layer.
        r: rank, or one per expert.
        lora_alpha: default 2 r.
        target_modules: default: every linear of the decoder layers.
        layers: indices of the adapted layers; default all from `router_layer` on.
        router_bias: also write biases of routers.
        layer_experts: layer-wise: experts of each backbone layer, at most E; default E.
        expert_modules: those of the target modules that get experts; default all.
        always_modules: those that get a part that is always on; default all where `always_r`.
        dtype: of the tensors.
        seed: of the weights.
    """

    num_experts: int = 8
    top_k: int | Mapping[str, int] | Sequence[int] = 2
    r: int | Sequence[int] = 16
    lora_alpha: float | Sequence[float] | None = None
    target_modules: Sequence[str] | None = None
    layers: Sequence[int] | None = None
    router_bias: bool = False
    layer_experts: Sequence[int] | None = None
    expert_modules: Sequence[str] | None = None
    always_modules: Sequence[str] | None = None
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0


def make_random_adapter(
    base: str | Path, path: str | Path, *, progress: bool = False, **options: Any
) -> Path:
    """Writes an adapter for a backbone with normal weights, so sized that deltas matter. Those of a
    large one repeat one another in part (`Normals`): what it computes is as random, and it is there
    in a second.

    Args:
        base: the backbone's directory; only its config.json is read.
        path: the directory to write.
        progress: show a progress bar.
        **options: those of `RandomOptions`, and other keys of `adapter_config.json`, with
            `router_input` for `router.input` and so on.

    Returns:
        The directory.

    Raises:
        AdapterError: the options do not make a valid config, or a module or layer is not there.
    """
    own = RandomOptions(**{f.name: options.pop(f.name) for f in fields(RandomOptions)
                           if f.name in options})  # fmt: skip
    backbone = Backbone.from_path(str(base))
    depth = backbone.num_layers
    num_experts, targets = own.num_experts, own.target_modules
    ranks = [own.r] * num_experts if isinstance(own.r, int) else list(own.r)
    alphas = own.lora_alpha if own.lora_alpha is not None else [2 * rank for rank in ranks]
    targets = sorted(backbone.modules()) if targets is None else list(targets)
    raw = {
        "peft_type": "ADAFUSE",
        "format_version": 1,
        "base_model_name_or_path": os.path.abspath(base) if Path(base).exists() else str(base),
        "num_experts": num_experts,
        "top_k": own.top_k,
        "r": ranks,
        "lora_alpha": alphas,
        "target_modules": targets,
        **{key.replace("router_", "router.", 1): value for key, value in options.items()},
    }
    if raw.keys() & set(VERSION_2) or raw.get("routing") == LAYER_WISE:
        raw["format_version"] = 2
    config, problems = parse_config(raw)
    with_experts = targets if own.expert_modules is None else list(own.expert_modules)
    with_always = targets if own.always_modules is None else list(own.always_modules)
    problems += [
        f"target module {name} is not in {base}; it has {', '.join(sorted(backbone.modules()))}"
        for name in targets
        if name not in backbone.modules()
    ]
    problems += [
        f"module {name} is not among the target modules {', '.join(targets)}"
        for name in dict.fromkeys([*with_experts, *with_always])
        if name not in targets
    ]
    chosen = own.layers
    if chosen is None:
        chosen = range(config.router_layer if config else 0, depth)
    problems += [
        f"layer {i} is not in {base}; it has {depth} layers" for i in chosen if not 0 <= i < depth
    ]
    counts = list(own.layer_experts or [num_experts] * depth)
    if len(counts) != depth or not all(0 < count <= num_experts for count in counts):
        problems.append(
            f"layer_experts is {counts}, expected {depth} numbers from 1 to {num_experts}, one for "
            f"each layer of {base}"
        )
    if problems:
        raise AdapterError(f"random adapter {path}", problems)

    weights = _Weights(Normals(torch.Generator().manual_seed(own.seed), own.dtype), own.router_bias)
    if not config.layer_wise:
        weights.router("", num_experts, backbone.hidden_size)
        if config.router_context:
            shape = num_experts, backbone.hidden_size
            weights.tensors[CONTEXT_WEIGHT] = weights.normal(*shape, scale=shape[1] ** -0.5)
    names = [
        name
        for name in backbone.linears
        if name.rsplit(".", 1)[1] in targets and int(name.split(".")[2]) in chosen
    ]
    for name in tqdm(names, desc="random experts", disable=not progress):
        size_in, size_out = backbone.linears[name]
        module, experts = name.rsplit(".", 1)[1], counts[int(name.split(".")[2])]
        if module in with_experts:
            weights.experts(name, experts, size_in, size_out, config)
            if config.layer_wise:
                of_linear = config.router_scope == "linear"
                reads = size_in if of_linear else backbone.hidden_size
                weights.router(f"{router_of(name, config)}.", experts, reads)
        if module in with_always and config.always_r:
            weights.always_on(name, size_in, size_out, config.always_r)
    return write_adapter(path, config, weights.tensors)


class _Weights:
    """Normal tensors by name, in the order in which they are asked for."""

    def __init__(self, normals: Normals, bias: bool):
        self.normal, self.bias = normals.take, bias
        self.tensors: dict[str, torch.Tensor] = {}

    def router(self, owner: str, experts: int, size_in: int) -> None:
        """A router of `owner` ("" or a name that ends in a dot), once."""
        if f"{owner}router.weight" in self.tensors:
            return
        self.tensors[f"{owner}router.weight"] = self.normal(experts, size_in, scale=size_in**-0.5)
        if self.bias:
            self.tensors[f"{owner}router.bias"] = self.normal(experts, scale=0.05)

    def experts(
        self, name: str, experts: int, size_in: int, size_out: int, config: AdapterConfig
    ) -> None:
        shared = 1 if config.shared_A else experts
        a = self.normal(shared, config.rank, size_in, scale=size_in**-0.5)
        b = self.normal(experts, size_out, config.rank, scale=0.3 / math.sqrt(config.rank))
        if min(config.ranks[:experts]) < config.rank:
            a, b = a.clone(), b.clone()
        for expert, rank in enumerate(config.ranks[:experts]):
            b[expert, :, rank:] = 0
            if not config.shared_A:
                a[expert, rank:] = 0
        self.tensors[f"{name}.lora_A"], self.tensors[f"{name}.lora_B"] = a, b

    def always_on(self, name: str, size_in: int, size_out: int, rank: int) -> None:
        self.tensors[f"{name}.always_A"] = self.normal(rank, size_in, scale=size_in**-0.5)
        self.tensors[f"{name}.always_B"] = self.normal(
            size_out, rank, scale=0.3 / math.sqrt(rank)
        )
