"""Puts the adapter's content into the `system_fingerprint` of answers, and keeps it out of the key
of vLLM's compile cache.

vLLM makes both of one hash of its configs. The content hash travels in `hf_config.adafuse`, which
that hash covers: but values do not change a graph, and a retrained adapter must find the old ones.
So the hash is computed without it, and the fingerprint gets its first digits at the end:
vllm-0.32.0-tp2-1a2b3c4d-adafuse-5e6f7a8b.

Read against vLLM 0.26.0 and 0.32.0 (config/model.py, entrypoints/serve/utils/fingerprint.py).
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_adafuse.format.config import CONTENT_KEY, SECTION
from vllm_adafuse.patches.on_import import when_imported
from vllm_adafuse.serving import vllm_api

_SEAM = "vllm.entrypoints.serve.utils.fingerprint"
_MARK = "_adafuse_wrapped"
_MODES, DIGITS = ("full", "hash"), 8


def apply() -> None:
    """Wraps both.

    Raises:
        RuntimeError: a seam has moved in this vLLM.
    """
    from vllm.config.model import ModelConfig

    if not getattr(_seam(ModelConfig, "compute_hash"), _MARK, False):
        ModelConfig.compute_hash = _without_content(ModelConfig.compute_hash)
    when_imported(_SEAM, wrap)


def wrap() -> None:
    """Wraps the fingerprint now."""
    from vllm.entrypoints.serve.utils import fingerprint

    if not getattr(_seam(fingerprint, "build_system_fingerprint"), _MARK, False):
        original = fingerprint.build_system_fingerprint
        fingerprint.build_system_fingerprint = _with_content(original)


def _seam(owner: Any, name: str) -> Any:
    found = getattr(owner, name, None)
    if found is None:
        raise vllm_api.moved(
            f"{owner.__name__} of this vLLM has no {name}, so answers could not tell which adapter "
            "made them"
        )
    return found


def _without_content(original):
    @functools.wraps(original)
    def compute_hash(self, *args, **kwargs):
        section = getattr(self.hf_config, SECTION, None)
        if not isinstance(section, dict) or CONTENT_KEY not in section:
            return original(self, *args, **kwargs)
        self.hf_config.adafuse = {k: v for k, v in section.items() if k != CONTENT_KEY}
        try:
            return original(self, *args, **kwargs)
        finally:
            self.hf_config.adafuse = section

    setattr(compute_hash, _MARK, True)
    return compute_hash


def _with_content(original):
    @functools.wraps(original)
    def build_system_fingerprint(vllm_config, mode="full", custom_value=None):
        made = original(vllm_config, mode, custom_value)
        hf_config = getattr(vllm_config.model_config, "hf_config", None)
        section = getattr(hf_config, SECTION, None)
        if mode not in _MODES or not isinstance(section, dict) or CONTENT_KEY not in section:
            return made
        return f"{made}-{SECTION}-{section[CONTENT_KEY][:DIGITS]}"

    setattr(build_system_fingerprint, _MARK, True)
    return build_system_fingerprint
