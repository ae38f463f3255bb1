"""vLLM's entry point. vLLM calls `register` in every one of its processes, often twice."""

from __future__ import annotations


def register() -> None:
    """Makes the AdaFuse architectures known to vLLM; imports no model and touches no device."""
    from vllm import ModelRegistry
    from vllm_adafuse.format.architectures import ARCHITECTURES
    from vllm_adafuse.patches import apply_patches
    from vllm_adafuse.serving import resolvers
    from vllm_adafuse.serving.vllm_api import check_vllm_version

    check_vllm_version()
    known = ModelRegistry.models
    for architecture in ARCHITECTURES.values():
        if architecture.adafuse_name not in known:
            ModelRegistry.register_model(
                architecture.adafuse_name,
                f"vllm_adafuse.serving.models:{architecture.adafuse_name}",
            )
    apply_patches()
    resolvers.register()
