"""What vLLM's public seams cannot do: one patch per file, each idempotent, and loud when the
seam has moved. Each names the vLLM versions that it was read against."""

from __future__ import annotations


def apply_patches() -> None:
    """Applies every patch once per process."""
    from vllm_adafuse.patches import (
        engine_args,
        fingerprint,
        hf_config,
        lora_manager,
        lora_requests,
        lora_scheduler,
        lora_server,
        lora_sleep,
        metrics,
        reload,
        requests,
    )

    for patch in (
        hf_config, engine_args, fingerprint, lora_manager, lora_requests, lora_scheduler,
        lora_server, lora_sleep, metrics, reload, requests,
    ):  # fmt: skip
        patch.apply()
