"""Plain PEFT LoRAs, each an expert."""

from __future__ import annotations

from pathlib import Path

from vllm_adafuse.backbone import Backbone
from vllm_adafuse.config import show
from vllm_adafuse.convert import peft_lora
from vllm_adafuse.convert.bank import Bank, make_bank
from vllm_adafuse.convert.beside import take_modules
from vllm_adafuse.convert.mixture import Linear, Part
from vllm_adafuse.convert.refused import refused_source
from vllm_adafuse.convert.source import Source
from vllm_adafuse.errors import AdapterError


def read_experts(
    loras: dict[str, Path], backbone: Backbone, notes: list[str]
) -> list[dict[str, Part]]:
    """The pairs of every LoRA, by linear.

    Args:
        loras: name -> directory.
        backbone: what they are checked against.
        notes: gets a sentence for everything assumed.

    Raises:
        AdapterError: with the problems of all of them.
    """
    experts, problems, named = [], [], {}
    for name, path in loras.items():
        try:
            source = Source.open(Path(path))
            source.use_decoder_names()
            if reason := refused_source(source):
                raise AdapterError(f"source {path}", [reason])
            parts = peft_lora.read_lora(source, backbone)
            if not parts:
                source.problems.append(
                    f"{source.file}: holds no lora_A / lora_B pair, expected a plain PEFT LoRA"
                )
            take_modules(source, backbone)
            source.finish()
            notes += [f"expert {show(name)[1:-1]}: {note}" for note in source.notes]
        except AdapterError as e:
            problems += [f"expert {show(name)[1:-1]}: {problem}" for problem in e.problems]
            continue
        experts.append(parts)
        named[name] = show(source.config.get("base_model_name_or_path"))
    if problems:
        raise AdapterError("mixture of LoRAs", problems)
    if len(set(named.values())) > 1:
        listed = ", ".join(f"{name}: {base[1:-1]}" for name, base in named.items())
        notes.append(f"the LoRAs name different backbones ({listed}); all are put on one")
    return experts


def stack_experts(experts: list[dict[str, Part]]) -> Bank:
    """One bank over the union of their linears: zeros where an expert leaves a linear alone.

    Args:
        experts: from `read_experts`.
    """
    linears = sorted({name for parts in experts for name in parts}, key=_place)
    return make_bank(
        {name: Linear(experts=[parts.get(name) for parts in experts]) for name in linears}
    )


def _place(name: str) -> tuple[int, str]:
    return int(name.split(".")[2]), name
