"""The names that MoE-PEFT (TUDB-Labs, also the origin of pip's mixlora) saves under.

    {method}.layers.{i}.{block}.{module}.experts.{e}.lora_A.weight   beside a router
    {method}.layers.{i}.{block}.{module}.lora_A.weight               always on
    {method}.layers.{i}.mlp.moe_gate.weight                          MixLoRA's router
    {method}.layers.{i}.{block}.{module}.moe_gate.weight             MoLA's, LoRAMoE's
"""

from __future__ import annotations

import torch
from vllm_adafuse.convert.mixture import Linear
from vllm_adafuse.convert.peft_config import check_complete, check_config
from vllm_adafuse.convert.peft_lora import take_pair
from vllm_adafuse.convert.source import Source
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import CONFIG_FILE, MAX_EXPERTS, MAX_RANK
from vllm_adafuse.format.keys import is_int
from vllm_adafuse.text import show

_WHERE = r"\.(layers\.(\d+)\.(self_attn|mlp))\.(\w+)"


def read_linears(
    source: Source, backbone: Backbone, method: str, expert_alpha: tuple[float, bool] | None = None
) -> dict[str, Linear]:
    """Experts and always-on LoRAs of all linears, without routers.

    Args:
        source: where from.
        backbone: gives the shapes.
        method: the names' first word.
        expert_alpha: alpha and rslora of experts where they are not the config's own.
    """
    check_config(source)
    rank = source.integer("r", MAX_RANK)
    alpha = source.number("lora_alpha")
    rslora = bool(source.config.get("use_rslora"))
    experts = source.integer("num_experts", MAX_EXPERTS)
    own_alpha, own_rslora = expert_alpha or (alpha, rslora)
    linears: dict[str, Linear] = {}
    for match in source.match(method + _WHERE + r"\.experts\.\d+\.lora_[AB]\.weight"):
        stem, name = f"{method}.{match[1]}.{match[4]}", f"model.{match[1]}.{match[4]}"
        if name not in linears:
            linears[name] = Linear(experts=[
                take_pair(
                    source, backbone, name, f"{stem}.experts.{e}.lora_A.weight",
                    f"{stem}.experts.{e}.lora_B.weight", rank, own_alpha, own_rslora,
                )
                for e in range(experts)
            ])  # fmt: skip
    for match in source.match(method + _WHERE + r"\.lora_[AB]\.weight"):
        stem, name = f"{method}.{match[1]}.{match[4]}", f"model.{match[1]}.{match[4]}"
        linear = linears.setdefault(name, Linear())
        if linear.always is None:
            linear.always = take_pair(
                source, backbone, name, f"{stem}.lora_A.weight", f"{stem}.lora_B.weight",
                rank, alpha, rslora,
            )  # fmt: skip
    check_complete(source, linears, backbone)
    return linears


def take_router(source: Source, name: str, size_in: int | str) -> torch.Tensor:
    """A router's weight [num_experts, in]; "in" where the backbone has no such linear."""
    experts = source.config.get("num_experts")
    why = f"num_experts is {show(experts)} in {CONFIG_FILE}"
    return source.take(name, (experts if is_int(1, MAX_EXPERTS)(experts) else "E", size_in), why)


def read_routed_linears(source: Source, backbone: Backbone, method: str) -> dict[str, Linear]:
    """`read_linears` with a router for each linear that has experts (MoLA, LoRAMoE)."""
    linears = read_linears(source, backbone, method)
    for name, linear in linears.items():
        if linear.experts:
            size_in = backbone.linears.get(name, ("in", "out"))[0]
            gate = name.replace("model.", f"{method}.", 1) + ".moe_gate.weight"
            linear.router = take_router(source, gate, size_in)
    return linears
