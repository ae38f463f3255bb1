"""Tiny adapters as other libraries save them, and what they compute, from their formulas alone."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import CONFIG_FILE
from vllm_adafuse.offline import reference

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


class Draw:
    """Seeded weights, so sized that experts and routes matter."""

    def __init__(self, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=self.generator)
        return values * scale * columns**-0.5

    def pair(self, size_in: int, size_out: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self(r, size_in), self(size_out, r, 0.3)


def linears_of(base: Path, modules=(*ATTENTION, *MLP)) -> dict[str, tuple[int, int]]:
    """"layers.0.mlp.up_proj" -> (in, out), of the modules named."""
    linears = Backbone.from_path(str(base)).linears
    return {
        name.removeprefix("model."): size
        for name, size in linears.items()
        if name.rsplit(".", 1)[1] in modules
    }


def write(path: Path, config: dict, tensors: dict, pickle: bool = False) -> Path:
    """A source directory. All of these libraries but PEFT write pickles, which take a second."""
    path.mkdir(parents=True)
    (path / CONFIG_FILE).write_text(json.dumps(config))
    if pickle:
        torch.save(tensors, path / "adapter_model.bin")
    else:
        save_file(tensors, path / "adapter_model.safetensors")
    return path


def read(path: Path) -> tuple[dict, dict]:
    """Config and tensors of `write`."""
    config = json.loads((path / CONFIG_FILE).read_text())
    if (path / "adapter_model.bin").exists():
        return config, torch.load(path / "adapter_model.bin")
    return config, load_file(path / "adapter_model.safetensors")


def load_base(base: Path):
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def with_deltas(base: Path, delta) -> torch.nn.Module:
    """The backbone with `delta(name, x)` added to each linear's output; None adds nothing."""
    model = load_base(base)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.startswith("model.layers."):

            def hook(module, args, y, name=name):
                d = delta(name.removeprefix("model."), args[0])
                return y if d is None else y + d

            module.register_forward_hook(hook)
    return model


def dense(logits: torch.Tensor) -> torch.Tensor:
    """LoRAMoE's and HydraLoRA's weights [..., E]."""
    return torch.softmax(logits, -1)


def top_k(k: int):
    """MoLA's weights [..., E]: softmax over all, top-k, renormalised."""

    def weights(logits: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(logits, -1)
        kept, ids = torch.topk(p, k, -1)
        return torch.zeros_like(p).scatter(-1, ids, kept / kept.sum(-1, keepdim=True))

    return weights


def scale_of(config: dict, r: int | None = None) -> float:
    r = r or config["r"]
    return config["lora_alpha"] / (math.sqrt(r) if config.get("use_rslora") else r)


@torch.no_grad()
def assert_same(original, base: Path, adapter: Path, error: float = 1e-5) -> None:
    """Logits of the converted adapter in the reference equal the original's; experts matter."""
    ids = torch.randint(6, 1003, (3, 40), generator=torch.Generator().manual_seed(1))
    expected = original(ids).logits
    found = reference.load(base, adapter, dtype=torch.float32)(ids).logits
    bare = load_base(base)(ids).logits
    size = expected.norm()
    assert (bare - expected).norm() > 0.1 * size
    assert (found - expected).norm() <= error * size, float((found - expected).norm() / size)


def mixlora(
    base: Path, path: Path, modules=(*ATTENTION, *MLP), experts=4, r=4, pickle=True, **config
) -> Path:
    """pip mixlora 0.2.3 (it reads pickles only) and MoE-PEFT: plain LoRA in attention."""
    config = {
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "bias": "none",
        "r": r,
        "lora_alpha": 2 * r,
        "lora_dropout": 0.05,
        "target_modules": list(modules),
        "routing_strategy": "mixlora",
        "num_experts": experts,
        "act_fn": "silu",
        "top_k": 2,
    } | config
    draw, tensors = Draw(), {}
    for name, (size_in, size_out) in linears_of(base, modules).items():
        own = [f"experts.{e}." for e in range(experts)] if ".mlp." in name else [""]
        for expert in own:
            a, b = draw.pair(size_in, size_out, r)
            tensors[f"mixlora.{name}.{expert}lora_A.weight"] = a
            tensors[f"mixlora.{name}.{expert}lora_B.weight"] = b
    backbone = Backbone.from_path(str(base))
    for layer in range(backbone.num_layers):
        tensors[f"mixlora.layers.{layer}.mlp.moe_gate.weight"] = draw(
            experts, backbone.hidden_size, 2.0
        )
    config = {key: value for key, value in config.items() if value is not None}
    return write(path, config, tensors, pickle)


def moe_peft(base: Path, path: Path, method: str, routed, experts=4, r=4, **config) -> Path:
    """MoE-PEFT's MoLA and LoRAMoE: a router in every linear that `routed(name)` says."""
    config = {
        "peft_type": method.upper(),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": r,
        "lora_alpha": 6,
        "lora_dropout": 0.05,
        "target_modules": [*ATTENTION, *MLP],
        "routing_strategy": method,
        "num_experts": experts,
    } | config
    draw, tensors = Draw(), {}
    for name, (size_in, size_out) in linears_of(base).items():
        if routed(name):
            tensors[f"{method}.{name}.moe_gate.weight"] = draw(experts, size_in, 2.0)
        for expert in [f"experts.{e}." for e in range(experts)] if routed(name) else [""]:
            a, b = draw.pair(size_in, size_out, r)
            tensors[f"{method}.{name}.{expert}lora_A.weight"] = a
            tensors[f"{method}.{name}.{expert}lora_B.weight"] = b
    return write(path, config, tensors)


def moe_peft_model(base: Path, source: Path, method: str, weights) -> torch.nn.Module:
    """y = W x + sum_e w_e s B_e A_e x where there is a gate, W x + s B A x elsewhere."""
    config, tensors = read(source)
    scale = scale_of(config)

    def lora(stem: str, x: torch.Tensor) -> torch.Tensor:
        return scale * (x @ tensors[f"{stem}.lora_A.weight"].T @ tensors[f"{stem}.lora_B.weight"].T)

    def delta(name: str, x: torch.Tensor):
        stem = f"{method}.{name}"
        if (gate := tensors.get(f"{stem}.moe_gate.weight")) is None:
            return lora(stem, x)
        w = weights(x @ gate.T)
        return sum(
            w[..., e, None] * lora(f"{stem}.experts.{e}", x) for e in range(config["num_experts"])
        )

    return with_deltas(base, delta)


PEFT = "base_model.model.model."


def mola(base: Path, path: Path, experts=(2, 4, 3), r=4, **config) -> Path:
    """GCYZSL/MoLA: experts (and with a list r, ranks) by layer; k and E are not saved."""
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "bias": "none",
        "r": r,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "target_modules": [*ATTENTION, *MLP],
    } | config
    draw, tensors = Draw(), {}
    for name, (size_in, size_out) in linears_of(base).items():
        layer = int(name.split(".")[1])
        tensors[f"{PEFT}{name}.router.router.weight"] = draw(experts[layer], size_in, 2.0)
        for e in range(experts[layer]):
            a, b = draw.pair(size_in, size_out, r[layer] if isinstance(r, list) else r)
            tensors[f"{PEFT}{name}.lora_A_{e}.weight"] = a
            tensors[f"{PEFT}{name}.lora_B_{e}.weight"] = b
    return write(path, config, tensors)


def mola_model(base: Path, source: Path, ks) -> torch.nn.Module:
    config, tensors = read(source)

    def delta(name: str, x: torch.Tensor) -> torch.Tensor:
        layer, stem = int(name.split(".")[1]), PEFT + name
        r = config["r"][layer] if isinstance(config["r"], list) else config["r"]
        w = top_k(ks[layer])(x @ tensors[f"{stem}.router.router.weight"].T)
        return sum(
            w[..., e, None]
            * (config["lora_alpha"] / r)
            * (x @ tensors[f"{stem}.lora_A_{e}.weight"].T @ tensors[f"{stem}.lora_B_{e}.weight"].T)
            for e in range(w.shape[-1])
        )

    return with_deltas(base, delta)


def routed_lora(base: Path, path: Path, shared_a: bool, experts=4, r=4, **config) -> Path:
    """HydraLoRA (one A) and LoRAMoE (an A for each B): `lora_route` in every MLP linear."""
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "bias": "none",
        "r": r,
        "lora_alpha": 16,
        "lora_nums": experts,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "target_modules": list(MLP),
    } | config
    draw, tensors = Draw(), {}
    for name, (size_in, size_out) in linears_of(base, MLP).items():
        tensors[f"{PEFT}{name}.lora_route.weight"] = draw(experts, size_in, 2.0)
        for e in range(experts):
            a, b = draw.pair(size_in, size_out, r)
            tensors[f"{PEFT}{name}.lora_A{'' if shared_a else e}.weight"] = a
            tensors[f"{PEFT}{name}.lora_B{e}.weight"] = b
    return write(path, config, tensors)


def routed_lora_model(base: Path, source: Path, shared_a: bool) -> torch.nn.Module:
    config, tensors = read(source)

    def delta(name: str, x: torch.Tensor):
        stem = PEFT + name
        if f"{stem}.lora_route.weight" not in tensors:
            return None
        w = dense(x @ tensors[f"{stem}.lora_route.weight"].T)
        result = 0.0
        for e in range(config["lora_nums"]):
            ax = x @ tensors[f"{stem}.lora_A{'' if shared_a else e}.weight"].T
            result = result + w[..., e, None] * (ax @ tensors[f"{stem}.lora_B{e}.weight"].T)
        return result * config["lora_alpha"] / config["r"]

    return with_deltas(base, delta)


def peft_lora(base: Path, path: Path, seed=0, **config):
    """A plain LoRA made and saved by PEFT itself; returns (model, directory)."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, *MLP]} | config
    model = get_peft_model(load_base(base), LoraConfig(task_type="CAUSAL_LM", **config)).eval()
    draw = Draw(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(draw(*weight.shape, 0.3 if ".lora_B." in name else 1.0))
    model.save_pretrained(path)
    return model, path
