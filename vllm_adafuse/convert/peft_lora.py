"""A plain PEFT LoRA: one expert that every token uses. Arrow and compose-experts read it too.

    {base_model.model.}model.layers.{i}.{block}.{module}.lora_A.weight [r, in], .lora_B.weight
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from vllm_adafuse.backbone import Backbone
from vllm_adafuse.config import CONFIG_FILE, MAX_RANK, show, some
from vllm_adafuse.convert.mixture import Linear, Mixture, Part
from vllm_adafuse.convert.options import Options
from vllm_adafuse.convert.source import Source

KIND = "PEFT LoRA"
OPTIONS: tuple[str, ...] = ()
PREFIX = r"(?:base_model\.model\.)?"
LINEAR = r"(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+))"
_PAIR = PREFIX + LINEAR + r"\.lora_(?:A|B)(?:\.default)?\.weight"
# Keys of LoraConfig that make another function of it, or another backbone under it.
_REFUSED = {
    "use_dora": "DoRA rescales every output column of W + BA, which no sum of LoRA experts can say",
    "lora_bias": "biases beside B are not part of the adapter format",
    "modules_to_save": "whole modules that replace the backbone's are not part of an adapter",
    "trainable_token_indices": "trained embedding rows are not part of the adapter format",
    "layer_replication": "the format has no backbone with repeated layers",
    "target_parameters": "LoRA on bare parameters (mixture-of-experts backbones) is not served",
    "alora_invocation_tokens": "aLoRA switches on in the middle of a prompt",
    "use_qalora": "QALoRA pools its input before A",
    "use_bdlora": "BD-LoRA's block-diagonal layout is not read",
    "kasa_config": "KaSA changes the backbone's weights and scales between A and B",
    "monteclora_config": "Monteclora samples its weights",
    "megatron_config": "Megatron's layers are not Hugging Face linears",
}
# These begin by changing the backbone's weights; the saved LoRA fits the changed ones only.
_CHANGED_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def recognises(source: Source) -> bool:
    """Pairs, no router, no numbered experts."""
    return source.has(_PAIR)


def read(source: Source, backbone: Backbone, options: Options) -> Mixture:
    """The LoRA as the always-on part of every linear."""
    parts = read_lora(source, backbone)
    return Mixture(KIND, {n: Linear(always=part) for n, part in parts.items()}, top_k=1)


def check_config(source: Source, rslora: bool = True) -> None:
    """Puts down what PEFT or one of its forks says in the config and we cannot compute.

    Args:
        source: whose config.
        rslora: whether the library knows rsLoRA.
    """
    if source.config.get("use_rslora") and not rslora:
        source.problems.append(
            f"{CONFIG_FILE}: `use_rslora` is true, expected none: the code of this format scales "
            "by alpha / r whatever it says; set it to false if that is how it was trained"
        )
    for key, why in _REFUSED.items():
        if source.config.get(key):
            source.problems.append(
                f"{CONFIG_FILE}: `{key}` is {show(source.config[key])}, expected none: {why}. "
                "Merge this adapter into a backbone of its own (PEFT's merge_and_unload), or "
                "train without it"
            )
    if source.config.get("bias", "none") != "none":
        source.problems.append(
            f'{CONFIG_FILE}: `bias` is {show(source.config["bias"])}, expected "none": trained '
            "biases are not part of the adapter format; train without them"
        )
    init = source.config.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGED_BACKBONE):
        source.problems.append(
            f"{CONFIG_FILE}: `init_lora_weights` is {show(init)}, which changes the backbone's "
            "weights before training, so that the LoRA does not fit the backbone that is served; "
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes it plain"
        )


def check_complete(source: Source, found: Iterable[str], backbone: Backbone) -> None:
    """Puts down linears that `target_modules` names and the file has nothing of.

    A list of module names means all layers, unless the config says otherwise.
    """
    targets = source.config.get("target_modules")
    if isinstance(targets, dict):
        targets = [name for name, used in targets.items() if used]
    limited = [source.config.get(key) for key in ("layers_to_transform", "exclude_modules")]
    if not isinstance(targets, list) or any(value not in (None, []) for value in limited):
        return
    wanted = [name for name in backbone.linears if name.rsplit(".", 1)[1] in targets]
    if missing := [name for name in wanted if name not in set(found)]:
        source.problems.append(
            f"{source.file}: has no tensors of {some(missing)}, expected them because "
            f"`target_modules` of {CONFIG_FILE} lists their modules; the file is incomplete, save "
            "or copy it again"
        )


def read_lora(source: Source, backbone: Backbone) -> dict[str, Part]:
    """All pairs of a plain PEFT LoRA; `rank_pattern` and `alpha_pattern` are followed.

    Args:
        source: an open source; `finish` is left to the caller.
        backbone: gives the shapes.

    Returns:
        Linear -> LoRA.
    """
    check_config(source)
    rslora = bool(source.config.get("use_rslora"))
    rank = source.integer("r", MAX_RANK)
    alpha = source.number("lora_alpha")
    parts = {}
    for match in source.match(_PAIR):
        name = match[1]
        if name in parts:
            continue
        stem = match[0][: match[0].index(".lora_")]
        ending = ".default.weight" if match[0].endswith(".default.weight") else ".weight"
        parts[name] = take_pair(
            source, backbone, name, f"{stem}.lora_A{ending}", f"{stem}.lora_B{ending}",
            _by_pattern(source, "rank_pattern", int, name, rank),
            _by_pattern(source, "alpha_pattern", (int, float), name, alpha),
            rslora,
        )  # fmt: skip
    check_complete(source, parts, backbone)
    return parts


def take_pair(
    source: Source,
    backbone: Backbone,
    linear: str,
    a: str,
    b: str,
    rank: int,
    alpha: float,
    rslora: bool = False,
) -> Part:
    """Takes A [r, in] and B [out, r] of one linear, checked against config and backbone."""
    size_in, size_out = backbone.linears.get(linear, ("in", "out"))
    why = f"r is {rank} in {CONFIG_FILE}; the backbone is {backbone.path}"
    if linear not in backbone.linears:
        source.blame(
            a, f"fits no linear of the backbone {backbone.path}; name the right one with --base"
        )
    return Part(
        source.take(a, (rank, size_in), why), source.take(b, (size_out, rank), why), alpha, rslora
    )


def _by_pattern(
    source: Source, key: str, kind: type | tuple, name: str, default: float
) -> float:
    """PEFT's rule: the first pattern that matches the end of a module's name."""
    patterns = source.config.get(key) or {}
    try:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                if isinstance(value, kind) and not isinstance(value, bool) and value > 0:
                    return value
                raise ValueError(f"{show(value)} is no positive number")
    except (AttributeError, ValueError, re.error) as e:
        problem = f"{CONFIG_FILE}: `{key}` is {show(patterns)}, expected patterns and numbers ({e})"
        if problem not in source.problems:
            source.problems.append(problem)
    return default
