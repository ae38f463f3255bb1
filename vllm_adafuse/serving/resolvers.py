"""AdaFuse directories for vLLM's resolvers, which know PEFT LoRAs alone.

Where a request names an adapter that nobody loaded, vLLM asks its resolvers in turn. Ours look
where vLLM's look, by the same environment variables, and take what those leave.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import vllm.envs as envs
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.config import CONFIG_FILE


def register() -> None:
    """Registers them, where vLLM's are asked for; again in a process: nothing."""
    if envs.VLLM_LORA_RESOLVER_CACHE_DIR:
        _register("AdaFuse file system", _files)
    plugins = envs.VLLM_PLUGINS or ()
    if envs.VLLM_LORA_RESOLVER_HF_REPO_LIST and "lora_hf_hub_resolver" in plugins:
        _register("AdaFuse hub", _hub)


def _register(name: str, make: Any) -> None:
    from vllm.lora.resolver import LoRAResolverRegistry

    if name not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(name, make())


def _files() -> Any:
    from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

    root = envs.VLLM_LORA_RESOLVER_CACHE_DIR
    return _for_adafuse(FilesystemResolver, root)(root)


def _hub() -> Any:
    from vllm.plugins.lora_resolvers.hf_hub_resolver import HfHubResolver

    repos = envs.VLLM_LORA_RESOLVER_HF_REPO_LIST.split(",")
    return _for_adafuse(HfHubResolver)([repo.strip() for repo in repos])


def _for_adafuse(resolver: type, root: str | None = None) -> type:
    class Resolver(resolver):
        """The same places, other adapters."""

        async def _get_lora_req_from_path(self, lora_name, lora_path, base_model_name):
            from vllm.lora.request import LoRARequest

            if root is not None and not _below(root, lora_path):
                return None
            # Whether it fits the backbone is for the check that every load goes through.
            return LoRARequest(lora_name, 1, lora_path) if is_adafuse(lora_path) else None

    return Resolver


def _below(root: str, path: str) -> bool:
    """Whether a name leads into the directory, and not out of it by ".."."""
    top, inner = os.path.abspath(root), os.path.abspath(path)
    return inner != top and os.path.commonpath([top, inner]) == top


def is_adafuse(path: str) -> bool:
    """Whether a directory's config says that it is an AdaFuse adapter."""
    from vllm_adafuse.convert.source import read_json

    config = Path(path) / CONFIG_FILE
    try:
        return config.is_file() and read_json(config).get("peft_type") == "ADAFUSE"
    except AdapterError:
        return False  # vLLM's own resolver says so
