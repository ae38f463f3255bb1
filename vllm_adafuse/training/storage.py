"""A training model's tensors in the adapter format, to and from a directory or a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.backbone import EMBEDDING, FIRST_NORM
from vllm_adafuse.format.config import BASE_HASH, WEIGHTS_FILE, parse_config
from vllm_adafuse.format.origin import tensors_hash
from vllm_adafuse.format.random_adapter import write_adapter
from vllm_adafuse.format.values import all_finite
from vllm_adafuse.training.config import MixtureConfig

if TYPE_CHECKING:
    from vllm_adafuse.training.model import AdaFuseModel


class LoadResult(NamedTuple):
    """What torch's `load_state_dict` returns."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def _views(model: AdaFuseModel) -> dict[str, torch.Tensor]:
    """Name in the format -> a view of the parameter with the format's shape."""
    views = {}
    for name, router, part in model.router_names:
        views[f"{name}.weight"] = router.weight[part]
        if router.bias is not None:
            views[f"{name}.bias"] = router.bias[part]
        if router.context is not None:
            views[f"{name}.context.weight"] = router.context
    for group in model.groups:
        for part, name in enumerate(group.names):
            views[f"{name}.lora_A"] = group.A[part]
            views[f"{name}.lora_B"] = group.B[part].transpose(0, 1)
    return views


@torch.no_grad()
def tensors(model: AdaFuseModel) -> dict[str, torch.Tensor]:
    """Copies of the adapter's tensors, float32, on the model's device."""
    return {
        name: view.detach().clone(memory_format=torch.contiguous_format)
        for name, view in _views(model).items()
    }


@torch.no_grad()
def load(model: AdaFuseModel, state: dict[str, torch.Tensor]) -> LoadResult:
    """Copies tensors into the parameters.

    Raises:
        AdapterError: a tensor is missing, unknown or of another shape.
    """
    views = _views(model)
    problems = [f"tensor {name} is missing" for name in views if name not in state]
    problems += [
        f"tensor {name} belongs to no router or expert of this model"
        for name in state
        if name not in views
    ]
    problems += [
        f"tensor {name} has shape {list(state[name].shape)}, expected {list(view.shape)}"
        for name, view in views.items()
        if name in state and state[name].shape != view.shape
    ]
    if problems:
        raise AdapterError(
            "saved state", problems + ["build the model with the config that it was saved with"]
        )
    for name, view in views.items():
        view.copy_(state[name])
    return LoadResult([], [])


def save(model: AdaFuseModel, path: str | Path, dtype: torch.dtype) -> Path:
    """Writes the adapter's two files.

    Raises:
        AdapterError: the config is not one of the format, or a value is not finite.
    """
    weights = {name: model.backbone.get_parameter(name) for name in (EMBEDDING, FIRST_NORM)}
    config, problems = parse_config(model.adapter_config | {BASE_HASH: tensors_hash(weights)})
    made = {
        name: (tensor if ".lora_" not in name else tensor.to(dtype)).cpu()
        for name, tensor in tensors(model).items()
    }
    problems += [
        f"{WEIGHTS_FILE}: tensor {name} is not finite; the training diverged: try a lower learning "
        "rate"
        for name, tensor in made.items()
        if not all_finite(tensor)
    ]
    if problems:
        raise AdapterError(f"adapter {path}", problems)
    return write_adapter(path, config, made)


def read(
    path: str | Path, changes: dict[str, Any]
) -> tuple[MixtureConfig, str, dict[str, torch.Tensor]]:
    """A saved adapter as a config to train, its backbone's name, and its tensors.

    Raises:
        AdapterError: a faulty adapter, or parts of the format that are not trained.
    """
    adapter = load_adapter(path)
    saved = adapter.config
    raw = saved.to_json()
    with adapter.reader() as get:
        tensors = {name: get(name).float() for name in adapter.tensors}
    problems = []
    if len(set(saved.ranks)) > 1 or len(set(saved.alphas)) > 1:
        problems.append("its experts differ in rank or alpha; experts are trained with one of each")
    if raw.get("router.logits", "linear") != "linear" or raw.get("mix", "linear") != "linear":
        problems.append("its `router.logits` or `mix` is not linear, which is not trained")
    if raw.get("shared_A") or any(".always_" in name for name in tensors):
        problems.append("it has parts that serve all experts (shared_A, always_A), not trained")
    if not isinstance(raw["top_k"], int):
        problems.append("its `top_k` differs from layer to layer; one k is trained")
    experts = raw["num_experts"]
    if any(len(t) != experts for n, t in tensors.items() if n.endswith("router.weight")):
        problems.append("its layers differ in their number of experts; one number is trained")
    if problems:
        raise AdapterError(f"adapter {path}", problems + ["see vllm-adafuse distill for a way out"])
    layer_wise = raw.get("routing") == "layer_wise"
    config = MixtureConfig(
        num_experts=experts,
        top_k=raw["top_k"],
        r=saved.rank,
        lora_alpha=saved.alphas[0],
        use_rslora=saved.use_rslora,
        target_modules=saved.target_modules,
        layers=tuple(sorted({int(name.split(".")[2]) for name in adapter.projections})),
        routing="layer_wise" if layer_wise else "pre_gated",
        router_scope=raw.get("router.scope", "linear"),
        router_input=raw.get("router.input", "first_norm"),
        router_layer=raw.get("router.layer", 0),
        router_context=saved.router_context,
        context_scale=saved.context_scale,
        context_half_life=saved.context_half_life,
        router_weights=raw["router.weights"],
        router_bias=any(name.endswith("router.bias") for name in tensors),
        temperature=raw["router.temperature"],
        expert_names=tuple(saved.expert_names),
        **changes,
    )
    return config, saved.base_path(adapter.path), tensors
