"""Formats that are known and cannot be converted, with the reason."""

from __future__ import annotations

from pathlib import Path

from vllm_adafuse.convert.source import Source
from vllm_adafuse.format.backbone import INDEX
from vllm_adafuse.format.config import CONFIG_FILE
from vllm_adafuse.format.reading import MAX_INDEX_BYTES, FileProblem, read_json

_X_LORA = (
    "{where}: this is X-LoRA. Its router reads the last hidden state of a whole pass of the "
    "backbone, so every token takes two passes with a KV cache each; no router in this format, at "
    "the entrance or inside the layers, decides the same. `vllm-adafuse compose-experts` makes a "
    "mixture of its LoRAs with a router of its own"
)
_INCOMPLETE = (
    "; besides, its classifier is incomplete: {missing} is missing (PEFT 0.21 drops `layers.0.*` "
    "when it saves), so that PEFT itself cannot load it"
)
_PESC = (
    "{where}: this is PESC (Camelidae). Its experts are GELU adapters that read the MLP's output, "
    "which are not LoRA; a linear update cannot say what they compute. Serve it with its authors' "
    "own model code"
)
_DORA = (
    "{where}: this is DoRA. It rescales every output column of W + BA, which no sum of LoRA "
    "experts can say. Merge it into a backbone of its own (PEFT's merge_and_unload), or train "
    "without use_dora"
)


def refused_directory(path: Path) -> str | None:
    """The reason, where the files' names tell enough."""
    if (path / "xlora_config.json").is_file():
        return _X_LORA.format(where=path / "xlora_config.json")
    if (path / "moe_model.bin").is_file():
        return _PESC.format(where=path / "moe_model.bin")
    if not (path / CONFIG_FILE).is_file() and (path / "config.json").is_file():
        index = path / INDEX
        config = _object(path / "config.json")
        names = _object(index).get("weight_map", {}) if index.is_file() else {}
        if "adapter_dim" in config or any(".moe_adapter." in str(name) for name in names):
            return _PESC.format(where=path)
    return None


def refused_source(source: Source) -> str | None:
    """The reason, where the tensors' names tell it."""
    if source.has(r".*internal_xlora_classifier\..*") or source.config.get("peft_type") == "XLORA":
        reason = _X_LORA.format(where=source.path)
        first = "internal_xlora_classifier.layers.0.weight"
        complete = source.has(rf".*{first}".replace(".layers", r"\.layers"))
        return reason if complete else reason + _INCOMPLETE.format(missing=first)
    if source.has(r".*\.moe_adapter\..*"):
        return _PESC.format(where=f"{source.path}/{source.file}")
    if source.has(r".*\.lora_magnitude_vector\b.*"):
        return _DORA.format(where=f"{source.path}/{source.file}")
    return None


def _object(file: Path) -> dict:
    try:
        value, _ = read_json(file, MAX_INDEX_BYTES)
    except FileProblem:  # not ours to judge: only looking for a sign
        return {}
    return value if isinstance(value, dict) else {}
