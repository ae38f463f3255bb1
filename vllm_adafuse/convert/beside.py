"""Whole modules that PEFT saved beside a LoRA: left out where they are the backbone's own.

PEFT saves the embedding and the head by itself where it believes that they were resized, and
wherever `save_embedding_layers` or `modules_to_save` says so. Often nobody trained them.
"""

from __future__ import annotations

import re

import torch
from vllm_adafuse.convert.peft_config import WAY_OUT, check_modules_to_save
from vllm_adafuse.convert.source import Source
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.backbone import EMBEDDING, Backbone, read_backbone_tensors
from vllm_adafuse.text import some

_HEAD = "lm_head.weight"
_MODULE = re.compile(r"(?!.*\.lora_)((?:model|lm_head)\.(?:.*\.)?(?:weight|bias))")
# PEFT's own layers around a module that it adapts or trains.
_INNER = re.compile(r"\.(?:base_layer|original_module|modules_to_save(?:\.\w+)?)(?=\.)")
_ON_HEAD = r"(?:lm_head|(?:model\.)?embed_tokens)\.lora_.*"


def take_modules(source: Source, backbone: Backbone) -> None:
    """Compares what lies beside the LoRA with the backbone, and puts down what differs.

    Args:
        source: whose names are those of a decoder; it gets a note for what is left out.
        backbone: its directory is read.
    """
    source.leave(
        _ON_HEAD,
        "is of a LoRA on the output head or the embedding, expected LoRA on linears of the "
        f"decoder's layers alone: experts cannot stand there. {WAY_OUT} (`target_modules`)",
    )
    own_names = {
        name: _INNER.sub("", name)
        for name in source.tensors
        if name not in source.taken and _MODULE.fullmatch(name)
    }
    check_modules_to_save(source, own_names)
    if not own_names:
        return
    try:
        own = read_backbone_tensors(backbone.path, [*own_names.values(), EMBEDDING], "convert")
    except AdapterError as e:
        for name in own_names:
            source.refuse_tensor(
                name, "is a whole module of the backbone, which must be compared with it: "
                + "; ".join(e.problems),
            )
        return
    if backbone.tied and EMBEDDING in own:
        own.setdefault(_HEAD, own[EMBEDDING])
    same = []
    for name, own_name in own_names.items():
        if own_name not in own:
            continue  # `finish` calls it unknown
        if difference := _difference(source.tensors[name], own[own_name]):
            source.refuse_tensor(
                name, f"is a whole module, and {difference}, expected the backbone's own: an "
                "adapter in this format replaces none. If it was not meant to be trained, save "
                "the LoRA again with save_pretrained(…, save_embedding_layers=False) and without "
                f"`modules_to_save`. Else merge it into a backbone of its own, with PEFT's "
                "merge_and_unload",
            )
        else:
            source.taken.add(name)
            same.append(own_name)
    if same:
        source.notes.append(
            f"{some(same)}, saved beside the LoRA, equal the backbone's own bit for bit: left out"
        )


def _difference(saved: torch.Tensor, own: torch.Tensor) -> str | None:
    """How a saved module differs from the backbone's, once that is rounded to its dtype."""
    if saved.shape != own.shape:
        return f"its shape is {list(saved.shape)}, the backbone's {list(own.shape)}"
    differing = (saved != own.to(saved.dtype)).flatten(1 if saved.dim() > 1 else 0)
    if not differing.any():
        return None
    rows = differing.any(-1) if saved.dim() > 1 else differing
    return f"{int(rows.sum())} of its {len(rows)} rows differ from the backbone's"
