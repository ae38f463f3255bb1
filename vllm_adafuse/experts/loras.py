"""Plain PEFT LoRAs, each an expert."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vllm_adafuse.convert import peft_lora
from vllm_adafuse.convert.bank import Bank, make_bank
from vllm_adafuse.convert.beside import take_modules
from vllm_adafuse.convert.mixture import Linear, Part
from vllm_adafuse.convert.refused import refused_source
from vllm_adafuse.convert.source import Source
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.origin import known_hash
from vllm_adafuse.format.places import find_local_backbone
from vllm_adafuse.text import show


def read_experts(
    loras: dict[str, Path],
    backbone: Backbone,
    notes: list[str],
    mixed_backbones: bool = False,
    others: Mapping[str, tuple[str, str]] | None = None,
) -> list[dict[str, Part]]:
    """The pairs of every LoRA, by linear.

    Args:
        loras: name -> directory.
        backbone: what they are checked against.
        notes: gets a sentence for everything assumed.
        mixed_backbones: note that they name different backbones, instead of refusing them.
        others: that the mixture has besides: name -> what their backbone is called, and its place.

    Raises:
        AdapterError: with the problems of all of them.
    """
    experts, problems, named = [], [], dict(others or {})
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
        named[name] = _trained_on(source)
    if problems:
        raise AdapterError("mixture of LoRAs", problems)
    places = {place for _, place in named.values()}
    # Two copies of one backbone are one; its weights are read only to find that out.
    if len(places) > 1 and len({known_hash(place) or place for place in places}) > 1:
        listed = ", ".join(f"{name}: {said}" for name, (said, _) in named.items())
        if not mixed_backbones:
            raise AdapterError(
                "mixture of LoRAs",
                [
                    f"they were trained on different backbones ({listed}), expected one: on "
                    "another's weights a LoRA is noise. If these are names of one backbone, or you "
                    "know what comes of it, add --mixed-backbones"
                ],
            )
        notes.append(f"the LoRAs name different backbones ({listed}); all are put on one")
    return experts


def _trained_on(source: Source) -> tuple[str, str]:
    """The backbone that a LoRA names: as it says it, and where that is.

    That is the directory, where it is on this machine, else the name.
    """
    named = source.config.get("base_model_name_or_path")
    said = show(named)[1:-1] if isinstance(named, str) else show(named)
    if not isinstance(named, str):
        return said, said
    beside = source.path / named
    found = find_local_backbone(str(beside) if beside.is_dir() else named)
    if found is None:
        return said, named.rstrip("/")
    return said, os.path.realpath(found)


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
