"""Names of tensors as trainers write them, without what their wrappers add.

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight               PEFT
    base_model.model.layers.0.…                                                  of an AutoModel
    base_model.model.model.language_model.layers.0.…                            of a multi-modal one
    _orig_mod.…, module.…, …._fsdp_wrapped_module.…, …._checkpoint_wrapped_module.…
    ….lora_A.sql.weight                                                          an adapter's name
"""

from __future__ import annotations

import re

# torch.compile, DataParallel, FSDP, activation checkpointing: they stand anywhere in a name.
_WRAPPER = re.compile(
    r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PEFT = re.compile(r"^(?:base_model\.model\.)+")
_ADAPTER = re.compile(r"\.(lora_[AB])\.([^.]+)\.(weight|bias)")
_DECODER = re.compile(
    r"(?:model\.)*(?:(?:language_model|text_model|llm)\.)?(?:model\.)*"
    r"((?:layers|embed_tokens|norm|lm_head)\..+)"
)


def unwrapped(name: str) -> str:
    """The name in the model that PEFT was given, with lora_A.weight whatever the adapter's name."""
    return _ADAPTER.sub(r".\1.\3", _PEFT.sub("", _WRAPPER.sub("", name)))


def of_decoder(name: str) -> str:
    """An unwrapped name as it is in a model for causal language: model.layers.0.…, lm_head.…

    The inner model, which AutoModel loads, has no `model.`; a multi-modal model has its decoder
    under a name of its own. A name of anything else stays.
    """
    match = _DECODER.fullmatch(name)
    if match is None:
        return name
    return match[1] if match[1].startswith("lm_head.") else f"model.{match[1]}"
