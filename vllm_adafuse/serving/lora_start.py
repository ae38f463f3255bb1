"""What a server's LoRA options show before its engine starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.serving import vllm_api
from vllm_adafuse.serving.fits import check_engine
from vllm_adafuse.serving.plain_loras import VLLM_LORA
from vllm_adafuse.serving.pool import misfits
from vllm_adafuse.serving.versions import Checks


def check_start(vllm_config: VllmConfig, modules: Sequence[Any]) -> None:
    """Checks what can be told without an engine.

    Args:
        vllm_config: of the engine.
        modules: what `--lora-modules` names, vLLM's `LoRAModulePath`s.

    Raises:
        AdapterError: an adapter cannot be served, or none can so.
    """
    if not vllm_api.serves_lora(vllm_config):
        return
    if vllm_api.rust_front_end():
        raise AdapterError(
            "--enable-lora",
            [
                "VLLM_USE_RUST_FRONTEND is set, and that front end would not check adapters nor "
                "tell their versions apart; leave it out, or let vLLM's own LoRA serve them "
                f"({VLLM_LORA})"
            ],
        )
    if vllm_api.shares_lora(vllm_config):
        check_engine(vllm_config)
    lora, checks, problems = vllm_config.lora_config, Checks(vllm_config), []
    for module in modules:
        try:
            size = checks.open(module.path).size
            found = misfits(size, lora.max_loras, lora.max_lora_rank)
        except AdapterError as e:
            found = e.problems
        problems += [f"{module.name}: {problem}" for problem in found]
    if problems:
        raise AdapterError("--lora-modules", problems)
