"""MixLoRA (arXiv 2404.15159), as pip's mixlora 0.2.3 and MoE-PEFT save it.

One router per MLP; every expert is a whole MLP with LoRAs of its own, and the experts' outputs
are mixed: y = sum_e g_e F_e(x). Attention may have one LoRA that is always on.
"""

from __future__ import annotations

import math

from vllm_adafuse.convert import moe_peft
from vllm_adafuse.convert.mixture import Mixture
from vllm_adafuse.convert.options import Options
from vllm_adafuse.convert.source import Source
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import CONFIG_FILE, MAX_EXPERTS
from vllm_adafuse.format.keys import is_positive
from vllm_adafuse.format.pretrained import read_config
from vllm_adafuse.text import show

KIND = "MixLoRA"
OPTIONS = ("expert_lora",)
METHOD = "mixlora"
_SAME = {"swish": "silu"}


def recognises(source: Source) -> bool:
    """By the first word of its names."""
    return source.has(r"mixlora\..*")


def read(source: Source, backbone: Backbone, options: Options) -> Mixture:
    """One router for every MLP, mixing at the MLP's output."""
    notes: list[str] = []
    _check(source, backbone, notes)
    top_k = source.integer("top_k", MAX_EXPERTS, default=2)
    if "top_k" not in source.config:
        notes.append("top_k is not in the config: 2, both libraries' default")
    alpha = _expert_alpha(source, options, notes)
    linears = moe_peft.read_linears(source, backbone, METHOD, alpha)
    routers = {}
    for match in source.match(METHOD + r"\.(layers\.\d+\.mlp)\.moe_gate\.weight"):
        weight = moe_peft.take_router(source, match[0], backbone.hidden_size)
        if any(n.startswith(f"model.{match[1]}.") and ln.experts for n, ln in linears.items()):
            routers[f"model.{match[1]}"] = weight
        else:
            notes.append(f"the router of {match[1]} has no experts and changes nothing: left out")
    for name, linear in linears.items():
        if linear.experts and (block := name.rsplit(".", 1)[0]) not in routers:
            gate = block.replace("model.", f"{METHOD}.", 1) + ".moe_gate.weight"
            routers[block] = moe_peft.take_router(source, gate, backbone.hidden_size)
    return Mixture(
        KIND,
        linears,
        top_k,
        routers,
        options={"router.scope": "block", "mix": "ffn_output"},
        exact="the same function, up to rounding: experts are mixed at the MLP's output",
        notes=notes,
    )


def _check(source: Source, backbone: Backbone, notes: list[str]) -> None:
    strategy = source.config.get("routing_strategy", "mixlora")
    if strategy != "mixlora":
        why = {
            "mixlora-dynamic": "it takes as many experts as a share of probability needs, so k "
            "differs from token to token",
            "mixlora-switch": "an expert takes a limited number of a sequence's tokens, so a "
            "token's route depends on its neighbours",
        }.get(str(strategy), "it is not known")
        source.problems.append(
            f'{CONFIG_FILE}: `routing_strategy` is {show(strategy)}, expected "mixlora": {why}; '
            "train with that strategy, or distil this adapter into one of a fixed k"
        )
    if (act := source.config.get("act_fn")) is not None:
        own = _activation(backbone.path)
        if _SAME.get(str(act), act) != _SAME.get(own, own):
            source.problems.append(
                f"{CONFIG_FILE}: `act_fn` is {show(act)}, expected {own}, the activation of the "
                f"backbone {backbone.path}: experts with another one are not served"
            )
    else:
        notes.append("act_fn is not in the config: the backbone's activation, as in MoE-PEFT")
    if source.config.get("jitter_noise"):
        notes.append(
            f"jitter_noise {show(source.config['jitter_noise'])} left out: it is for training "
            "(pip's mixlora applies it when serving too, which makes its answers random)"
        )


def _activation(path: str) -> str:
    config = read_config(path)
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _expert_alpha(
    source: Source, options: Options, notes: list[str]
) -> tuple[float, bool] | None:
    """Alpha and rslora of the experts, None for the config's own.

    `expert_lora` may give the experts other numbers. MoE-PEFT uses them, pip's mixlora does not.
    """
    own, config = source.config.get("expert_lora"), source.config
    if not isinstance(own, dict):
        return None
    merged = {key: own.get(key, config.get(key)) for key in ("r", "lora_alpha", "use_rslora")}
    if own.get("use_dora"):
        source.problems.append(
            f"{CONFIG_FILE}: `expert_lora` has use_dora, expected none: DoRA is no sum of LoRA "
            "experts; train without it"
        )
    if merged["r"] != config.get("r"):
        source.problems.append(
            f"{CONFIG_FILE}: `expert_lora` has r {show(merged['r'])} and the adapter "
            f"{show(config.get('r'))}, expected one r for both; train with one"
        )
        return None
    if all((merged[key] or False) == (config.get(key) or False) for key in merged):
        return None
    if not is_positive(merged["lora_alpha"]) or not isinstance(merged["use_rslora"] or False, bool):
        source.problems.append(
            f"{CONFIG_FILE}: `expert_lora` is {show(own)}, expected a positive number for "
            "lora_alpha and true or false for use_rslora; correct it"
        )
        return None
    if not all(map(is_positive, (config.get("r"), config.get("lora_alpha")))):
        return None  # said where they are read
    if options.expert_lora is None:
        scales = [
            c.get("lora_alpha", 0) / (math.sqrt(c["r"]) if c.get("use_rslora") else c["r"])
            for c in (merged, config)
        ]
        source.problems.append(
            f"{CONFIG_FILE}: `expert_lora` gives experts the scale {scales[0]:g}, the adapter's "
            f"own is {scales[1]:g}. MoE-PEFT uses the first, pip's mixlora the second; say "
            "--expert-lora used or --expert-lora ignored, after the library it was trained with"
        )
        return None
    notes.append(f"expert_lora was {options.expert_lora}, as --expert-lora said")
    if options.expert_lora == "ignored":
        return None
    return merged["lora_alpha"], bool(merged["use_rslora"])
