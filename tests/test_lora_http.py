"""vLLM's own code for loads over HTTP, with an engine that notes what it is asked: what is refused,
with which status, and which version requests have afterwards."""

import asyncio
import shutil
from types import SimpleNamespace

import convert_sources as sources
import pytest
from loras import engine_config
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm_adafuse.patches import lora_requests, lora_server
from vllm_adafuse.serving.adapters import split_path
from vllm_adafuse.tiny import make_tiny_backbone, tiny_config

lora_requests.apply(), lora_server.apply()


class Core:
    """An engine that has what it was given; `fails` is raised instead."""

    def __init__(self):
        self.asked, self.fails, self.removed = [], None, []

    async def add_lora_async(self, request):
        self.asked.append(request)
        if self.fails is not None:
            raise self.fails
        return True

    async def list_loras_async(self):
        return {request.lora_int_id for request in self.asked} - {*self.removed}

    async def remove_lora_async(self, adapter):
        self.removed.append(adapter)
        return True

    async def pin_lora_async(self, adapter):
        return adapter


class Resolver:
    def __init__(self, path):
        self.path = path

    async def resolve_lora(self, base_model_name, lora_name):
        if isinstance(self.path, Exception):
            raise self.path
        return LoRARequest(lora_name, 2**40, str(self.path)) if self.path else None


def make_models(lora="adafuse"):
    """The server's table of models, over an engine without a core."""
    client = AsyncLLM.__new__(AsyncLLM)
    client.engine_core = Core()
    client.output_processor = SimpleNamespace(request_states={})
    client.input_processor = InputProcessor.__new__(InputProcessor)
    model_config = SimpleNamespace(hf_config=tiny_config("LlamaForCausalLM"), model="base")
    config = client.input_processor.vllm_config = engine_config(model_config, lora=lora)
    config.lora_config = SimpleNamespace(max_loras=2, max_lora_rank=16, max_cpu_loras=None)
    client.model_config, client.renderer = SimpleNamespace(model="base", max_model_len=8), None
    return OpenAIServingModels(client, [BaseModelPath("base", "base")])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("http")
    base = make_tiny_backbone(root / "base")
    return [sources.peft_lora(base, root / f"lora{i}", seed=i)[1] for i in range(2)]


@pytest.fixture
def models():
    return make_models()


@pytest.fixture
def live(good, tmp_path):
    return shutil.copytree(good[0], tmp_path / "live")


def load(models, path, name="live", **options):
    request = LoadLoRAAdapterRequest(lora_name=name, lora_path=str(path), **options)
    return asyncio.run(models.load_lora_adapter(request))


def digest_of(request):
    return split_path(request.lora_path)[1]


def test_a_load_is_what_requests_have(models, live):
    assert "added successfully" in load(models, live)
    (asked,), stored = models.engine_client.engine_core.asked, models.lora_requests["live"]
    assert stored is asked and len(digest_of(stored)) == 64 and stored.lora_int_id > 1
    (_, card) = asyncio.run(models.show_available_models()).data
    assert (card.id, card.root, card.parent) == ("live", str(live), "base")


def test_a_reload_replaces_and_its_ids_are_of_the_content(models, good, live):
    load(models, live)
    first = models.lora_requests["live"]
    assert load(models, live).error.code == 400 and models.lora_requests["live"] is first
    shutil.rmtree(live), shutil.copytree(good[1], live)
    assert "added" in load(models, live, load_inplace=True)
    second = models.lora_requests["live"]
    assert digest_of(second) != digest_of(first) and second.lora_int_id != first.lora_int_id
    assert not second.load_inplace
    shutil.rmtree(live), shutil.copytree(good[0], live)
    load(models, live, load_inplace=True)
    assert models.lora_requests["live"] == first


def test_what_is_refused_never_reaches_the_engine(models, live, tmp_path):
    answer = load(models, tmp_path / "nowhere")
    assert (answer.error.code, answer.error.type) == (404, "NotFoundError")
    assert "no such directory" in answer.error.message
    (live / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    answer = load(models, live)
    assert (answer.error.code, answer.error.type) == (400, "BadRequestError")
    assert '`peft_type` is "IA3"' in answer.error.message
    assert not models.engine_client.engine_core.asked and not models.lora_requests


def test_a_bad_reload_leaves_the_version_that_was_there(models, live):
    load(models, live)
    first = models.lora_requests["live"]
    shutil.rmtree(live)
    assert load(models, live, load_inplace=True).error.code == 404
    assert models.lora_requests["live"] is first


def test_a_workers_refusal_is_the_clients_fault_other_errors_are_not(models, live):
    core = models.engine_client.engine_core
    refusal = "adapter x cannot be used:\n  - too wide"
    core.fails = Exception(f"Worker failed with error '{refusal}', see")
    answer = load(models, live)
    assert answer.error.code == 400 and "too wide" in answer.error.message
    core.fails = Exception("out of memory")
    answer = load(models, live)
    assert answer.error.code == 500 and "out of memory" in answer.error.message
    assert not models.lora_requests


def test_resolvers_are_checked_too(models, good, live):
    def resolve(name, *paths):
        models.lora_resolvers = [Resolver(path) for path in paths]
        return asyncio.run(models.resolve_lora(name))

    found = resolve("found", live)
    assert found is models.lora_requests["found"] and len(digest_of(found)) == 64
    assert found.lora_int_id < 2**31 and resolve("found", None) is found
    (live / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    answer = resolve("bad", live)
    assert answer.error.code == 400 and '"IA3"' in answer.error.message
    assert digest_of(resolve("second", live, good[1]))  # the next resolver has it
    answer = resolve("broken", ValueError("Expecting value"))
    assert answer.error.code == 400 and "Expecting value" in answer.error.message
    assert resolve("nobody", None).error.code == 404
    assert set(models.lora_requests) == {"found", "second"}


def test_versions_that_nobody_needs_are_unloaded(models, good, live):
    """Once the last request that has them has ended."""
    from vllm_adafuse.patches.lora_requests import versions_of

    core = models.engine_client.engine_core

    async def run():
        request = LoadLoRAAdapterRequest(lora_name="live", lora_path=str(live))
        await models.load_lora_adapter(request)
        first, states = models.lora_requests["live"], models.engine_client.output_processor
        states.request_states["r"] = SimpleNamespace(lora_request=first)
        shutil.rmtree(live), shutil.copytree(good[1], live)
        request.load_inplace = True
        await models.load_lora_adapter(request)
        second = models.lora_requests["live"]
        await asyncio.sleep(0.01)
        assert core.removed == []
        assert versions_of(models.engine_client).current(first) is first
        states.request_states.pop("r")
        await asyncio.sleep(0.01)
        assert core.removed == [first.lora_int_id]
        # One that was on its way here when the name changed.
        assert versions_of(models.engine_client).current(first) is second
        await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name="live"))
        await asyncio.sleep(0.01)
        assert core.removed == [first.lora_int_id, second.lora_int_id]

    asyncio.run(run())


def test_a_load_is_asked_for_until_it_is_there(models, live):
    core, answers = models.engine_client.engine_core, [False, False, True]
    original = core.add_lora_async

    async def add_lora_async(request):
        await original(request)
        return answers.pop(0)

    core.add_lora_async = add_lora_async
    assert "added" in load(models, live)
    assert len(core.asked) == 3 and not answers


def test_an_unloaded_name_makes_room(models, live):
    from vllm_adafuse.patches.lora_requests import versions_of

    load(models, live)
    versions = versions_of(models.engine_client)
    assert versions.standing("live").lora_int_id == models.lora_requests["live"].lora_int_id
    asyncio.run(models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name="live")))
    assert versions.standing("live") is None and not models.lora_requests


def test_the_event_loop_goes_on_meanwhile(models, live, monkeypatch):
    import threading

    from vllm_adafuse.serving import versions as seam

    there, original = [], seam.open_adapter
    monkeypatch.setattr(
        seam, "open_adapter",
        lambda *arguments: there.append(threading.current_thread()) or original(*arguments),
    )  # fmt: skip
    load(models, live)
    assert there and threading.main_thread() not in there


def test_where_lora_is_vllms_all_is_as_before(live, tmp_path):
    models = make_models(lora="vllm")
    load(models, live)
    stored = models.lora_requests["live"]
    assert (stored.lora_int_id, stored.lora_path) == (1, str(live))
    load(models, tmp_path / "nowhere", "absent")  # vLLM's engine is to say what it thinks of it
    assert len(models.engine_client.engine_core.asked) == 2


def test_a_pin_loads_again_what_had_to_make_room(models, good):
    client = models.engine_client

    async def pin_three():
        for user_id in (1, 2, 3):  # --max-cpu-loras is 2
            await client.add_lora(LoRARequest(f"a{user_id}", user_id, str(good[0])))
            await asyncio.sleep(0.01)
            asked = len(client.engine_core.asked)
            assert await client.pin_lora(user_id) == user_id
            again = len(client.engine_core.asked) - asked
        return again

    assert asyncio.run(pin_three()) == 1 and client.engine_core.removed == [3]
    holds = lora_requests.versions_of(client).holds
    assert holds.pinned == holds.resident == {1, 2, 3}
