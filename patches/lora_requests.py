"""Checks and stamps LoRA requests in vLLM's front end, before an engine sees them.

A bad adapter is the request's fault: an error of ours in `LLM.generate`, 404 or 400 over HTTP, and
the engine is not asked. What it gets of the others says which content is meant
(`serving/versions.py`), and keys of the prefix cache say it too. All of it rests where LoRA is
vLLM's own (`vllm_api.lora_option`) or off.

Read against vLLM 0.26.0 and 0.32.0.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm_adafuse.patches.on_import import when_imported
from vllm_adafuse.serving import vllm_api

_MARK = "_adafuse_wrapped"


def apply() -> None:
    """Wraps each function when its module is imported."""
    when_imported("vllm.lora.request", _compare_versions)
    when_imported("vllm.v1.core.kv_cache_utils", _key_by_content)
    when_imported("vllm.v1.engine.input_processor", _stamp_in_input_processor)
    when_imported("vllm.v1.engine.llm_engine", _stamp_in_llm_engine)
    when_imported("vllm.v1.engine.async_llm", _stamp_in_async_llm)


def wrap(owner: Any, name: str, takes: tuple[str, ...], make: Callable) -> None:
    """Puts `make(original)` in the place of a function, once.

    Args:
        owner: a class or a module.
        name: of its attribute.
        takes: its first parameters.
        make: gets the original, gives what stands for it.

    Raises:
        RuntimeError: the seam has moved in this vLLM.
    """
    original = getattr(owner, name, None)
    if getattr(original, _MARK, False):
        return
    found = list(inspect.signature(original).parameters) if callable(original) else None
    if found is None or tuple(found[: len(takes)]) != takes:
        raise vllm_api.moved(
            f"vLLM's {owner.__name__}.{name} no longer takes ({', '.join(takes)}), so a LoRA "
            "request could pass unchecked"
        )
    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, _MARK, True)
    setattr(owner, name, wrapper)


def versions_of(owner: Any):
    """The `Versions` of an engine, of its input processor or of a server's models; None where
    LoRA requests are not ours."""
    from vllm.v1.engine.input_processor import InputProcessor

    processor = owner if isinstance(owner, InputProcessor) else owner.input_processor
    if not isinstance(processor, InputProcessor):
        return None  # a renderer's front end, without an engine
    if not hasattr(processor, "adafuse_versions"):
        from vllm_adafuse.serving.versions import Checks, Versions

        config, versions = processor.vllm_config, None
        if vllm_api.serves_lora(config):
            lora = config.lora_config
            versions = Versions(
                Checks(config).open, lora.max_loras, lora.max_lora_rank, lora.max_cpu_loras
            )
        processor.adafuse_versions = versions
    return processor.adafuse_versions


def _compare_versions() -> None:
    from vllm.lora.request import LoRARequest
    from vllm_adafuse.serving.adapters import split_path

    def make_eq(original):
        # By name alone, two versions in one set would be one. Equal ones still hash alike.
        def __eq__(self, value):
            return original(self, value) and self.lora_int_id == value.lora_int_id

        return __eq__

    wrap(LoRARequest, "__eq__", ("self", "value"), make_eq)
    if not getattr(LoRARequest.path.fget, _MARK, False):

        def path(self) -> str:
            return split_path(self.lora_path)[0]  # /v1/models shows it as `root`

        setattr(path, _MARK, True)
        LoRARequest.path = property(path)


def _key_by_content() -> None:
    import vllm.v1.core.kv_cache_utils as seam
    from vllm_adafuse.serving.adapters import split_path

    def make(original):
        def _gen_lora_extra_hash_keys(request):
            keys, lora = original(request), request.lora_request
            digest = split_path(lora.lora_path)[1] if lora else None
            if digest is None:
                return keys
            if isinstance(keys[0], tuple):  # ("lora", name, path)
                return [(*keys[0][:2], digest), *keys[1:]]
            return [*keys, digest]  # 0.26: the name

        return _gen_lora_extra_hash_keys

    wrap(seam, "_gen_lora_extra_hash_keys", ("request",), make)


def _stamp_in_input_processor() -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    def make(original):
        signature = inspect.signature(original)

        def process_inputs(self, *args, **kwargs):
            given = signature.bind(self, *args, **kwargs).arguments
            _check_params(self.vllm_config, given.get("params"))
            request = given.get("lora_request")
            if request is None or (versions := versions_of(self)) is None:
                return original(self, *args, **kwargs)
            # The event loop's callers have a stamped one by now.
            given["lora_request"] = versions.adopt(request, versions.stamp(request))
            return original(**given)

        return process_inputs

    def make_identifier(original):
        def _get_mm_identifier(self, mm_hash, lora_request):
            found = original(self, mm_hash, lora_request)
            same = found == mm_hash or versions_of(self) is None
            return found if same else f"{found}:{lora_request.lora_int_id}"

        return _get_mm_identifier

    wrap(InputProcessor, "process_inputs", ("self", "request_id", "prompt", "params"), make)
    wrap(
        InputProcessor, "_get_mm_identifier", ("self", "mm_hash", "lora_request"), make_identifier
    )


def _check_params(vllm_config: Any, params: Any) -> None:
    """Raises AdapterRefused for a request whose logits vLLM computes apart from its batch's: its own
    LoRA on the output head takes the batch's adapters for them."""
    if getattr(params, "prompt_logprobs", None) is None or not vllm_api.shares_lora(vllm_config):
        return
    from vllm_adafuse.serving.plain_loras import BOTH_LORA
    from vllm_adafuse.serving.versions import AdapterRefused

    raise AdapterRefused(
        "prompt_logprobs",
        [f"the engine has vLLM's own LoRA beside ours ({BOTH_LORA}); leave one of them out"],
    )


def _link(engine: Any):
    """An engine's `Versions`, told of the requests that the engine has."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm_adafuse.serving.engine_loads import AsyncEngineLoads, EngineLoads
    from vllm_adafuse.serving.holds import RequestStates

    versions = versions_of(engine)
    if versions is not None and not hasattr(engine, "adafuse_loads"):
        kind = AsyncEngineLoads if isinstance(engine, AsyncLLM) else EngineLoads
        engine.adafuse_loads = kind(engine.engine_core, versions.holds)
        table = engine.output_processor
        table.request_states = RequestStates(
            versions.holds, versions.users_request, table.request_states
        )
    return versions


def _stamp_in_llm_engine() -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    def make_add_request(original):
        signature = inspect.signature(original)

        def add_request(self, *args, **kwargs):
            given = signature.bind(self, *args, **kwargs).arguments
            request = _lora_of(given)
            if request is None or (versions := _link(self)) is None:
                return original(self, *args, **kwargs)
            stamped = versions.stamp(request)
            with versions.holds.held(stamped.lora_int_id):
                if stamped.lora_int_id not in versions.holds.resident:
                    self.adafuse_loads.load(stamped)
                given["lora_request"] = versions.adopt(request, stamped)
                return original(**given)

        return add_request

    def make_add(original):
        def add_lora(self, lora_request):
            if (versions := _link(self)) is None:
                return original(self, lora_request)
            stamped = versions.stamp(lora_request)
            with versions.holds.held(stamped.lora_int_id):
                self.adafuse_loads.load(stamped)
                versions.adopt(lora_request, stamped)
            return True

        return add_lora

    def make_pin(original):
        def pin_lora(self, lora_id):
            versions = _link(self)
            if versions is None or (stamped := versions.standing(lora_id)) is None:
                return original(self, lora_id)
            with versions.holds.held(adapter := stamped.lora_int_id):
                if adapter not in versions.holds.resident:  # it has made room since it was loaded
                    self.adafuse_loads.load(stamped)
                pinned = original(self, adapter)
                versions.holds.pinned.add(adapter)
            return pinned

        return pin_lora

    wrap(LLMEngine, "add_request", ("self", "request_id", "prompt", "params"), make_add_request)
    wrap(LLMEngine, "add_lora", ("self", "lora_request"), make_add)
    wrap(LLMEngine, "pin_lora", ("self", "lora_id"), make_pin)
    _translate_ids(LLMEngine)


def _stamp_in_async_llm() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    def make_add_request(original):
        signature = inspect.signature(original)

        async def add_request(self, *args, **kwargs):
            given = signature.bind(self, *args, **kwargs).arguments
            request = _lora_of(given)
            if request is None or (versions := _link(self)) is None:
                return await original(self, *args, **kwargs)
            if (stamped := versions.known(request)) is None:
                stamped = await asyncio.to_thread(versions.stamp, request)
            stamped = versions.current(stamped)
            with versions.holds.held(stamped.lora_int_id):
                if stamped.lora_int_id not in versions.holds.resident:
                    await self.adafuse_loads.load_beside(stamped)
                given["lora_request"] = versions.adopt(request, stamped)
                return await original(**given)

        return add_request

    def make_add(original):
        async def add_lora(self, lora_request):
            if (versions := _link(self)) is None:
                return await original(self, lora_request)
            return await _add_lora(self, versions, lora_request)

        return add_lora

    def make_pin(original):
        async def pin_lora(self, lora_id):
            versions = _link(self)
            if versions is None or (stamped := versions.standing(lora_id)) is None:
                return await original(self, lora_id)
            with versions.holds.held(adapter := stamped.lora_int_id):
                if adapter not in versions.holds.resident:
                    await self.adafuse_loads.load_beside(stamped)
                pinned = await original(self, adapter)
                versions.holds.pinned.add(adapter)
            return pinned

        return pin_lora

    wrap(AsyncLLM, "add_request", ("self", "request_id", "prompt", "params"), make_add_request)
    wrap(AsyncLLM, "add_lora", ("self", "lora_request"), make_add)
    wrap(AsyncLLM, "pin_lora", ("self", "lora_id"), make_pin)
    _translate_ids(AsyncLLM)


def _lora_of(given: dict[str, Any]) -> Any:
    """The LoRA request among an engine's arguments, of which the prompt may be a whole request."""
    found = given.get("lora_request")
    return found if found is not None else getattr(given.get("prompt"), "lora_request", None)


def _translate_ids(engine: type) -> None:
    """Of an engine class whose methods may be coroutines."""

    def make_remove(original):
        def remove_lora(self, lora_id):
            if (versions := versions_of(self)) is None:
                return original(self, lora_id)
            known = lora_id in versions.users_ids(versions.holds.resident)
            gone = versions.forget(lora_id)
            for adapter in gone:
                versions.holds.gone(adapter)
            return _then([original(self, i) for i in gone], lambda found: known or any(found))

        return remove_lora

    def make_list(original):
        def list_loras(self):
            if (versions := versions_of(self)) is None:
                return original(self)
            return _then([original(self)], lambda found: versions.users_ids(found[0]))

        return list_loras

    wrap(engine, "remove_lora", ("self", "lora_id"), make_remove)
    wrap(engine, "list_loras", ("self",), make_list)


def _then(answers: list, change: Callable[[list], Any]) -> Any:
    """`change(answers)`, awaited where they are to be awaited."""
    if not any(map(inspect.isawaitable, answers)):
        return change(answers)

    async def later():
        return change([await answer for answer in answers])

    return later()


async def _add_lora(engine: Any, versions: Any, request: Any) -> bool:
    """Has the engine load an adapter, once it has been checked in a thread."""
    from vllm_adafuse.serving.versions import AdapterRefused, current_loading

    load = current_loading()
    try:
        stamped = await asyncio.to_thread(versions.stamp, request)
        if load:  # until the name stands for it
            versions.holds.add(stamped.lora_int_id)
            load.ends.append(lambda: versions.holds.drop(stamped.lora_int_id))
        with versions.holds.held(stamped.lora_int_id):
            await engine.adafuse_loads.load_beside(stamped)
            if not load:
                versions.adopt(request, stamped)
    except AdapterRefused as e:
        if load:
            load.refusal = e
        raise
    if load:
        load.stamped = stamped
    return True
