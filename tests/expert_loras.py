"""LoRAs on the experts of a mixture-of-experts backbone, and references with their sums merged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from vllm_adafuse.tiny import make_tiny_backbone

QWEN, MIXTRAL = "Qwen3MoeForCausalLM", "MixtralForCausalLM"
CONFIGS = {
    QWEN: {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    MIXTRAL: {"num_local_experts": 4, "num_experts_per_tok": 2},
}
BLOCKS = {QWEN: ("mlp", "gate_proj", "down_proj", "up_proj"), MIXTRAL: ("block_sparse_moe", "w1", "w2", "w3")}
ATTENTION = [f"model.layers.{layer}.self_attn.{p}_proj" for layer in range(2) for p in "qv"]


def make_backbone(root: Path, architecture: str, **config) -> Path:
    """A tiny backbone of two layers with experts."""
    config = CONFIGS[architecture] | {"num_hidden_layers": 2} | config
    return make_tiny_backbone(root / "base", architecture, **config)


def expert_linears(architecture: str, *, experts=range(4), layers=range(2), kinds=(0, 1, 2)) -> list:
    """Names of experts' linears, of kinds 0 gate, 1 down, 2 up."""
    block, *names = BLOCKS[architecture]
    return [
        f"model.layers.{layer}.{block}.experts.{expert}.{names[kind]}"
        for layer in layers for expert in experts for kind in kinds
    ]  # fmt: skip


@torch.no_grad()
def make_expert_lora(base: Path, path: Path, seed: int, ranks: dict[str, int], dtype=torch.float32):
    """Saves a LoRA as PEFT saves it, of these ranks and alpha 16; returns transformers' model with
    it merged, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name, rank in ranks.items():
        weight = weight_of(model, name)
        size_out, size_in = weight.shape
        a = (torch.randn(rank, size_in, generator=draw) * size_in**-0.5).to(dtype)
        b = (torch.randn(size_out, rank, generator=draw) * 0.3 * rank**-0.5).to(dtype)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        weight += 16 / rank * b.float() @ a.float()
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": max(ranks.values()), "lora_alpha": 16}
    config["rank_pattern"] = {name: rank for name, rank in ranks.items() if rank != config["r"]}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return model


def weight_of(model, name: str) -> torch.Tensor:
    """The weight of a linear [out, in], experts' too, which transformers keeps together."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)", name)
    if not found:
        return model.get_submodule(name).weight
    experts, expert = model.model.layers[int(found[1])].mlp.experts, int(found[2])
    if found[3] in ("down_proj", "w2"):
        return experts.down_proj[expert]
    gate, up = experts.gate_up_proj[expert].chunk(2)
    return gate if found[3] in ("gate_proj", "w1") else up
