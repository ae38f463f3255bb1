"""PEFT's LoraConfig, key by key: what is followed, what changes nothing here, what is refused."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_adafuse.convert.source import Source, refuse
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import CONFIG_FILE
from vllm_adafuse.text import show, some

# The tensors, or code beside this table, do what the key says.
FOLLOWED = frozenset(
    "peft_type base_model_name_or_path revision r lora_alpha use_rslora rank_pattern alpha_pattern "
    "target_modules exclude_modules layers_to_transform layers_pattern bias init_lora_weights "
    "modules_to_save arrow_config".split()
)
# Of training or loading, or of PEFT's own bookkeeping. The configs of initialisations count only
# beside their name in `init_lora_weights`; VeLoRA changes the backward pass alone; the linears
# here are nn.Linear, for which PEFT takes `fan_in_fan_out` back; tied heads follow from tensors.
HARMLESS = frozenset(
    "task_type auto_mapping peft_version inference_mode lora_dropout fan_in_fan_out megatron_core "
    "loftq_config eva_config corda_config lora_ga_config velora_config qalora_group_size "
    "runtime_config ensure_weight_tying".split()
)
# They make another function of it, or another backbone under it.
REFUSED = {
    "use_dora": "DoRA rescales every output column of W + BA, which no sum of LoRA experts can say",
    "lora_bias": "biases beside B are not part of the adapter format",
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
MODULES = "whole modules that replace the backbone's are not part of an adapter"
WAY_OUT = (
    "Merge this adapter into a backbone of its own (PEFT's merge_and_unload), or train without it"
)
# These begin by changing the backbone's weights; the saved LoRA fits the changed ones only.
_CHANGED_BACKBONE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    for key, why in REFUSED.items():
        if source.config.get(key):
            _refuse_key(source, key, why)
    if source.config.get("bias", "none") != "none":
        source.problems.append(
            f'{CONFIG_FILE}: `bias` is {show(source.config["bias"])}, expected "none": trained '
            "biases are not part of the adapter format; train without them"
        )
    init = source.config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BACKBONE):
        source.problems.append(
            f"{CONFIG_FILE}: `init_lora_weights` is {show(init)}, which changes the backbone's "
            "weights before training, so that the LoRA does not fit the backbone that is served; "
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes it plain"
        )


def check_modules_to_save(source: Source, held: Iterable[str] = ()) -> None:
    """Puts `modules_to_save` down.

    Args:
        source: whose config.
        held: names of tensors that are judged by themselves, beside a LoRA.
    """
    named = source.config.get("modules_to_save") or []
    named = named if isinstance(named, list) else [named]
    if not all(any(str(module) in name.split(".") for name in held) for module in named):
        _refuse_key(source, "modules_to_save", MODULES)


def check_plain(source: Source) -> None:
    """Puts down what makes a config another than that of one plain LoRA, keys that nobody here
    knows among it: a newer PEFT may have added them, and what they do would be lost.

    Raises:
        AdapterError: it is a mixture in this format.
    """
    kind = source.config.get("peft_type", "LORA")
    if kind == "ADAFUSE":
        raise refuse(
            source.path,
            f'{CONFIG_FILE}: `peft_type` is "ADAFUSE", expected "LORA": it is a mixture in this '
            "format already; name the LoRAs that it was made of",
        )
    if kind != "LORA":
        source.problems.append(
            f'{CONFIG_FILE}: `peft_type` is {show(kind)}, expected "LORA"; docs/convert.md lists '
            "what is read"
        )
    if source.config.get("arrow_config"):
        _refuse_key(source, "arrow_config", "it is the router of an Arrow mixture")
    known = FOLLOWED | HARMLESS | REFUSED.keys()
    unknown = [key for key, value in source.config.items() if key not in known and value]
    if unknown:
        by = source.config.get("peft_version")
        source.problems.append(
            f"{CONFIG_FILE}: unknown key `{some(unknown)}`, set to "
            f"{show(source.config[unknown[0]])}"
            + (f" by PEFT {show(by)[1:-1]}" if isinstance(by, str) else "")
            + ": what it changes would be lost; take it out if it changes nothing when the adapter "
            "is used, else merge the adapter into a backbone of its own (merge_and_unload)"
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
    targets, found = {name for name in targets if isinstance(name, str)}, set(found)
    wanted = [name for name in backbone.linears if name.rpartition(".")[2] in targets]
    if missing := [name for name in wanted if name not in found]:
        source.problems.append(
            f"{source.file}: has no tensors of {some(missing)}, expected them because "
            f"`target_modules` of {CONFIG_FILE} lists their modules; the file is incomplete, save "
            "or copy it again"
        )


def _refuse_key(source: Source, key: str, why: str) -> None:
    source.problems.append(
        f"{CONFIG_FILE}: `{key}` is {show(source.config[key])}, expected none: {why}. {WAY_OUT}"
    )
