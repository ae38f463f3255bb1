"""Answers loads of bad adapters over HTTP with 404 or 400 and a message that helps.

vLLM asks the engine at once, and says 500 where that fails. Here an adapter is checked before, in
a thread beside the event loop; what the engine has got is what requests by that name have from
then on. It all rests where LoRA requests are not ours (`lora_requests.versions_of`).

Read against vLLM 0.26.0 and 0.32.0 (entrypoints/openai/models/serving.py).
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from vllm_adafuse.patches.lora_requests import versions_of, wrap
from vllm_adafuse.patches.on_import import when_imported


def apply() -> None:
    """Wraps the functions when their module is imported."""
    when_imported("vllm.entrypoints.openai.models.serving", _check)


def _check() -> None:
    import vllm.entrypoints.openai.models.serving as seam
    from vllm.lora.request import LoRARequest
    from vllm_adafuse.serving.versions import (
        AdapterAbsent,
        AdapterRefused,
        current_loading,
        loading,
    )

    def response(error: AdapterRefused):
        if isinstance(error, AdapterAbsent):
            return seam.create_error_response(str(error), "NotFoundError", HTTPStatus.NOT_FOUND)
        return seam.create_error_response(str(error), "BadRequestError", HTTPStatus.BAD_REQUEST)

    def make_check(original):
        async def _check_load_lora_adapter_request(self, request):
            answer, versions = await original(self, request), versions_of(self.engine_client)
            if answer is not None or versions is None:
                return answer
            try:
                opened = await asyncio.to_thread(versions.open_path, request.lora_path, True)
            except AdapterRefused as e:
                return response(e)
            if (load := current_loading()) is not None:
                load.opened = opened
            return None

        return _check_load_lora_adapter_request

    def make_load(original):
        async def load_lora_adapter(self, request, *args, **kwargs):
            with loading() as load:
                answer = await original(self, request, *args, **kwargs)
                if load.stamped is not None:
                    # Requests from now on have this version.
                    self.lora_requests[request.lora_name] = load.stamped
                    versions_of(self.engine_client).adopt_name(load.stamped)
            return response(load.refusal) if load.refusal else answer

        return load_lora_adapter

    def make_resolve(original):
        async def resolve_lora(self, lora_name):
            with loading() as load:
                try:
                    answer = await original(self, lora_name)
                except (ValueError, KeyError, TypeError, OSError) as e:
                    if versions_of(self.engine_client) is None:
                        raise
                    # A resolver reads an adapter's config by itself.
                    return response(AdapterRefused(
                        f"adapter {lora_name}",
                        [f"a resolver cannot read it ({e!r}); mend its adapter_config.json"],
                    ))  # fmt: skip
                if load.stamped is not None:
                    self.lora_requests[lora_name] = answer = load.stamped
                    versions_of(self.engine_client).adopt_name(load.stamped)
            if load.refusal is not None and not isinstance(answer, LoRARequest):
                return response(load.refusal)
            return answer

        return resolve_lora

    def make_unload(original):
        async def unload_lora_adapter(self, request):
            answer, versions = await original(self, request), versions_of(self.engine_client)
            if versions is not None and request.lora_name not in self.lora_requests:
                versions.forget_name(request.lora_name)
            return answer

        return unload_lora_adapter

    models = seam.OpenAIServingModels
    wrap(models, "_check_load_lora_adapter_request", ("self", "request"), make_check)
    wrap(models, "load_lora_adapter", ("self", "request"), make_load)
    wrap(models, "resolve_lora", ("self", "lora_name"), make_resolve)
    wrap(models, "unload_lora_adapter", ("self", "request"), make_unload)
