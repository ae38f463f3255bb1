"""Adapters with random weights, for load tests and for trying a backbone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from vllm_adafuse.backbone import Backbone
from vllm_adafuse.config import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, parse_config
from vllm_adafuse.errors import AdapterError


def write_adapter(
    path: str | Path, config: AdapterConfig, tensors: dict[str, torch.Tensor]
) -> Path:
    """Writes an adapter directory; existing adapter files in it are replaced."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / WEIGHTS_FILE, metadata={"format": "pt"})
    (path / CONFIG_FILE).write_text(json.dumps(config.to_json(), indent=2) + "\n")
    return path


def make_random_adapter(
    base: str | Path,
    path: str | Path,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    r: int | Sequence[int] = 16,
    lora_alpha: float | Sequence[float] | None = None,
    target_modules: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    router_bias: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    progress: bool = False,
    **options,
) -> Path:
    """Writes an adapter for a backbone with normal weights, so sized that deltas matter.

    Args:
        base: the backbone's directory; only its config.json is read.
        path: the directory to write.
        num_experts: E.
        top_k: k.
        r: rank, or one per expert.
        lora_alpha: default 2 r.
        target_modules: default: every linear of the decoder layers.
        layers: indices of the adapted layers; default all.
        router_bias: also write router.bias.
        dtype: of the tensors.
        seed: of the weights.
        progress: show a progress bar.
        **options: other keys of `adapter_config.json`, with `router_input` for `router.input`
            and so on.

    Returns:
        The directory.

    Raises:
        AdapterError: the options do not make a valid config, or a module or layer is not there.
    """
    backbone = Backbone.from_path(str(base))
    ranks = [r] * num_experts if isinstance(r, int) else list(r)
    alphas = lora_alpha if lora_alpha is not None else [2 * rank for rank in ranks]
    targets = sorted(backbone.modules()) if target_modules is None else list(target_modules)
    raw = {
        "peft_type": "ADAFUSE",
        "format_version": 1,
        "base_model_name_or_path": os.path.abspath(base) if Path(base).exists() else str(base),
        "num_experts": num_experts,
        "top_k": top_k,
        "r": ranks,
        "lora_alpha": alphas,
        "target_modules": targets,
        **{key.replace("router_", "router.", 1): value for key, value in options.items()},
    }
    config, problems = parse_config(raw)
    problems += [
        f"target module {name} is not in {base}; it has {', '.join(sorted(backbone.modules()))}"
        for name in targets
        if name not in backbone.modules()
    ]
    chosen = range(backbone.num_layers) if layers is None else layers
    problems += [
        f"layer {i} is not in {base}; it has {backbone.num_layers} layers"
        for i in chosen
        if not 0 <= i < backbone.num_layers
    ]
    if problems:
        raise AdapterError(f"random adapter {path}", problems)

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    hidden = backbone.hidden_size
    tensors = {"router.weight": normal(num_experts, hidden, scale=hidden**-0.5)}
    if router_bias:
        tensors["router.bias"] = normal(num_experts, scale=0.05)
    names = [
        name
        for name in backbone.linears
        if name.rsplit(".", 1)[1] in targets and int(name.split(".")[2]) in chosen
    ]
    for name in tqdm(names, desc="random experts", disable=not progress):
        size_in, size_out = backbone.linears[name]
        a = normal(num_experts, config.rank, size_in, scale=size_in**-0.5)
        b = normal(num_experts, size_out, config.rank, scale=0.3 / math.sqrt(config.rank))
        for expert, rank in enumerate(config.ranks):
            a[expert, rank:], b[expert, :, rank:] = 0, 0
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = a, b
    return write_adapter(path, config, tensors)
