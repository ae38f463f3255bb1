"""The truth: an adapter on a plain Hugging Face model, by the format's formulas alone.

It shares no code with serving, reads the two files by itself, and is slow: every expert runs for
every token. Served tokens and logprobs must equal it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Reference(torch.nn.Module):
    """Hooks on one model: layer 0 decides the gates, every adapted linear uses them."""

    def __init__(self, model: PreTrainedModel, adapter: Path):
        super().__init__()
        config = json.loads((adapter / "adapter_config.json").read_text())
        router = config.get("router", {})
        self.input = router.get("input", config.get("router.input", "first_norm"))
        self.mode = router.get("weights", config.get("router.weights", "topk_softmax"))
        temperature = router.get("temperature", config.get("router.temperature", 1.0))
        self.temperature, self.top_k = temperature, config["top_k"]
        experts = config["num_experts"]
        ranks = config["r"] if isinstance(config["r"], list) else [config["r"]] * experts
        alphas = config["lora_alpha"]
        alphas = alphas if isinstance(alphas, list) else [alphas] * experts
        root = config.get("use_rslora", False)
        self.scales = [a / (math.sqrt(r) if root else r) for a, r in zip(alphas, ranks)]
        device = model.device
        tensors = load_file(adapter / "adapter_model.safetensors", device=str(device))
        self.router_weight = tensors.pop("router.weight").float()
        self.router_bias = tensors.pop("router.bias", torch.zeros(experts, device=device)).float()
        self.gates: torch.Tensor | None = None
        self.first_norm = model.model.layers[0].input_layernorm
        model.model.layers[0].register_forward_pre_hook(self._decide, with_kwargs=True)
        modules = dict(model.named_modules())
        for name in sorted({n.rsplit(".", 1)[0] for n in tensors}):
            # In the model's dtype, as a served model holds them.
            a, b = (tensors[f"{name}.lora_{side}"].to(model.dtype).float() for side in "AB")
            modules[name].register_forward_hook(self._adapt(a, b))

    @torch.no_grad()
    def _decide(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        e = args[0] if args else kwargs["hidden_states"]
        u = self.first_norm(e.float()) if self.input == "first_norm" else e.float()
        z = (u.float() @ self.router_weight.T + self.router_bias) / self.temperature
        gates = torch.zeros_like(z)
        # Lower expert first among equals: argsort is stable.
        chosen = torch.argsort(-z, dim=-1, stable=True)[..., : self.top_k]
        if self.mode == "topk_softmax":
            weights = torch.softmax(torch.gather(z, -1, chosen), dim=-1)
        else:
            weights = torch.gather(torch.softmax(z, dim=-1), -1, chosen)
        self.gates = gates.scatter(-1, chosen, weights)

    def _adapt(self, a: torch.Tensor, b: torch.Tensor):
        def hook(module: torch.nn.Module, args: tuple, y: torch.Tensor) -> torch.Tensor:
            x, delta = args[0].float(), torch.zeros_like(y, dtype=torch.float32)
            for expert, scale in enumerate(self.scales):
                gate = self.gates[..., expert, None] * scale
                delta += gate * ((x @ a[expert].T) @ b[expert].T)
            return (y.float() + delta).to(y.dtype)

        return hook


def load(base: str | Path, adapter: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Loads a backbone with an adapter on it, in plain transformers and torch.

    Args:
        base: backbone, directory or hub name.
        adapter: adapter directory; see `vllm-adafuse check` for its faults.
        **kwargs: for `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.

    Returns:
        The model in eval mode. `model.adafuse.gates` holds the gates [..., E] of the last call
        (zero for experts not chosen; without LoRA's scale).
    """
    from transformers import AutoModelForCausalLM

    # Transformers' other attentions leave out Gemma-2's softcap.
    kwargs.setdefault("attn_implementation", "eager")
    model = AutoModelForCausalLM.from_pretrained(base, **kwargs).eval()
    # Not a submodule: saving the model saves the backbone as it was.
    object.__setattr__(model, "adafuse", _Reference(model, Path(adapter)))
    return model


def generate(
    base: str | Path,
    adapter: str | Path,
    input_ids: torch.Tensor,
    *,
    mode: str = "mixture",
    model_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Loads a backbone with an adapter, and lets transformers generate.

    Args:
        base, adapter: as in `load`.
        input_ids: [1, T] prompt.
        mode: "mixture", this module's hooks; or "switch", AdaFuse's fused switch: experts merged
            into the weights anew for every token, as fast as the bare backbone but for one launch
            (`vllm_adafuse.switch_runtime.SwitchRuntime`, which can be kept for more prompts).
        model_options: for `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.
        **kwargs: of transformers' `generate`: max_new_tokens, do_sample, streamer, …

    Returns:
        [1, T + new] token ids.

    Raises:
        ValueError: no such mode.
        AdapterError: "switch" cannot serve this adapter or backbone.
    """
    if mode == "switch":
        from vllm_adafuse.switch_runtime import SwitchRuntime

        return SwitchRuntime.load(base, adapter, **model_options or {}).generate(input_ids, **kwargs)
    if mode != "mixture":
        raise ValueError(f"mode is {mode!r}, expected mixture or switch")
    model = load(base, adapter, **model_options or {})
    return model.generate(input_ids.to(model.device), **kwargs)
