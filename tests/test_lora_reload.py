"""An adapter is replaced at its path while an engine serves it: every request has one content, the
one that its load was told of, whatever lies in the KV cache and whoever else is in the batch."""

import hashlib
import os
import shutil
from contextlib import ExitStack

import pytest
import torch
from engines import assert_greedy_equals, completion, engine, greedy, load_reference, make_pair
from loras import FEW, MODULES, add_to, make_lora, manager_of
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.serving.adapters import stamp_path
from vllm_adafuse.serving.versions import AdapterAbsent, AdapterRefused
from vllm_adafuse.tiny import real_prompts

PROMPTS = real_prompts(6, words=90)  # several blocks of the KV cache
ID = 3


class Live:
    """One directory whose content changes, and an engine."""

    def __init__(self, llm, root, references):
        self.llm, self.root, self.references = llm, root, references
        self.path = root / "live"

    def put(self, name):
        shutil.rmtree(self.path, ignore_errors=True)
        shutil.copytree(self.root / name, self.path)

    def request(self, **options):
        return LoRARequest("live", ID, str(self.path), **options)

    def generate(self, *requests, prompts=PROMPTS):
        requests = [requests[i % len(requests)] for i in range(len(prompts))]
        return self.llm.generate(prompts, greedy(6), lora_request=requests, use_tqdm=False)

    def check(self, outputs, *names):
        for i, name in enumerate(names):
            assert_greedy_equals(outputs[i :: len(names)], self.references[name])


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    root = tmp_path_factory.mktemp("reload")
    base, _ = make_pair(root, num_experts=2, r=2)
    references = {"base": AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()}
    for seed, name in enumerate(("one", "two")):
        options = {"r": 8, "lora_alpha": 16, "target_modules": MODULES}
        references[name] = make_lora(base, root / name, seed, **options)
    references["few"] = make_lora(base, root / "few", 7, **FEW)
    make_random_adapter(
        base, root / "mix", num_experts=3, top_k=2, r=8, dtype=references["base"].dtype
    )
    references["mix"] = load_reference(base, root / "mix")
    with ExitStack() as stack:
        llm = stack.enter_context(engine(
            base, enable_lora=True, max_loras=3, max_lora_rank=32, max_cpu_loras=6,
            block_size=32, enable_prefix_caching=True, max_num_batched_tokens=512,
        ))  # fmt: skip
        yield Live(llm, root, references)


def test_a_reload_leaves_nothing_behind_in_the_kv_cache(live):
    live.put("one")
    live.check(live.generate(live.request()), "one")
    for name in ("two", "mix", "one", "few"):
        live.put(name)
        live.check(live.generate(live.request(load_inplace=True)), name)
        live.check(live.generate(live.request()), name)  # out of the cache
        live.check(live.generate(None, live.request()), "base", name)
    assert live.llm.llm_engine.list_loras() == {ID}


def test_files_that_change_untold_change_nothing(live):
    live.put("one")
    live.generate(live.request(load_inplace=True))
    live.put("two")
    live.check(live.generate(live.request()), "one")
    shutil.rmtree(live.path)
    live.check(live.generate(live.request()), "one")


def test_two_versions_in_one_batch(live):
    """Requests that wait or run have theirs to the end; equal prompts meet in the cache."""
    prompts = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    live.put("one")
    engine_ = live.llm.llm_engine
    old, outputs, done = live.request(load_inplace=True), {}, []
    for i, prompt in enumerate(prompts):
        engine_.add_request(f"old-{i}", prompt, greedy(6), lora_request=old)
    engine_.step()
    live.put("two")
    for i, prompt in enumerate(prompts):
        new = live.request(load_inplace=True)
        engine_.add_request(f"new-{i}", prompt, greedy(6), lora_request=new)
    while engine_.has_unfinished_requests():
        done += [output for output in engine_.step() if output.finished]
    for output in done:
        outputs.setdefault(output.request_id.split("-")[0], []).append(output)
    assert len(outputs["old"]) == len(outputs["new"]) == len(prompts)
    live.check(outputs["old"], "one")
    live.check(outputs["new"], "two")


def test_files_are_not_read_again_every_step(live, monkeypatch):
    """vLLM leaves `load_inplace` on the request, and its worker obeys in every step."""
    from vllm_adafuse.serving.hosted import Loader

    live.llm.llm_engine.remove_lora(ID)
    reads, original = [], Loader.read

    def read(self, path):
        reads.append(path)
        return original(self, path)

    monkeypatch.setattr(Loader, "read", read)
    live.put("mix")
    live.check(live.generate(live.request(load_inplace=True)), "mix")
    live.generate(live.request(load_inplace=True))
    assert len(reads) == 1


def test_outputs_name_the_users_request(live):
    live.put("one")
    live.generate(live.request(load_inplace=True))
    live.put("two")
    request = live.request(load_inplace=True)
    assert all(output.lora_request is request for output in live.generate(request))
    assert request.load_inplace and request.lora_int_id == ID
    assert request.lora_path == str(live.path)


def test_pin_remove_and_list_speak_the_users_ids(live):
    engine_, manager = live.llm.llm_engine, manager_of(live.llm)
    for name in ("one", "two"):
        live.put(name)
        assert engine_.add_lora(live.request(load_inplace=True))
    # The older version, which nobody needs, is gone.
    assert engine_.list_loras() == {ID} and len(manager.list_adapters()) == 1
    assert engine_.pin_lora(ID)
    (pinned,) = manager.pool.pinned
    assert pinned != ID
    live.check(live.generate(live.request()), "two")
    assert engine_.remove_lora(ID) and not engine_.list_loras() and not manager.list_adapters()
    assert not engine_.remove_lora(ID)
    live.put("few")
    live.check(live.generate(live.request()), "few")  # not asked to reload, but it was removed


@pytest.mark.parametrize("damage, kind, word", [
    (lambda path: shutil.rmtree(path), AdapterAbsent, "no such directory"),
    (lambda path: (path / "adapter_model.safetensors").unlink(), AdapterRefused, "neither"),
    (lambda path: (path / "adapter_config.json").write_text("{"), AdapterRefused, "not valid JSON"),
])  # fmt: skip
def test_a_bad_adapter_harms_nobody(damage, kind, word, live):
    """With vLLM's own LoRA the engine hangs from then on."""
    live.put("one")
    good = live.request(load_inplace=True)
    live.check(live.generate(good), "one")
    damage(live.path)
    bad = LoRARequest("bad", 8, str(live.path))
    with pytest.raises(kind, match=word):
        live.generate(good, bad, None)
    with pytest.raises(kind, match=word):
        live.llm.llm_engine.add_lora(bad)
    assert not live.llm.llm_engine.has_unfinished_requests()
    live.check(live.generate(live.request(), None), "one", "base")


def test_the_worker_refuses_another_content(live):
    live.put("one")
    manager = manager_of(live.llm)
    path = stamp_path(str(live.path), "0" * 64)
    with pytest.raises(ValueError, match="has the hash .* the request is for 0000"):
        add_to(manager, LoRARequest("live", 77, path))
    assert 77 not in manager.list_adapters()


def test_many_versions_say_different_things(live):
    """So that the tests above can tell them apart."""
    said = {}
    for name in ("one", "two", "mix", "few"):
        live.put(name)
        outputs = live.generate(live.request(load_inplace=True))
        said[name] = tuple(tuple(completion(output)[0]) for output in outputs)
    assert len(set(said.values())) == 4


def test_an_engine_that_sleeps_loads_nothing(live, monkeypatch):
    live.put("few")
    live.check(live.generate(live.request()), "few")
    core = live.llm.llm_engine.engine_core.engine_core
    monkeypatch.setattr(type(core.model_executor), "is_sleeping", True)
    asked = LoRARequest("late", 40, str(live.root / "one"))
    with pytest.raises(AdapterRefused, match="the engine sleeps, .*; wake it up"):
        live.generate(asked)
    live.check(live.generate(live.request()), "few")  # which it has
    here = min(manager_of(live.llm).list_adapters())  # and another front end may ask for
    assert core.add_lora(LoRARequest("here", here, str(live.path)))
    monkeypatch.undo()
    live.check(live.generate(asked), "one")


def whole(hosted):
    """What an adapter on the host says, in one number."""
    router = hosted.router or {}
    tensors = [router[name] for name in sorted(router)]
    tensors += [t for packed in hosted.packed if packed for t in (packed.a, packed.b)]
    digest = hashlib.sha256(repr((hosted.kind, hosted.experts, hosted.config, hosted.scale)).encode())
    for tensor in tensors:
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("other", ["alike", "more", "few", "rank"])
def test_files_that_another_adapter_takes_the_place_of(live, other, tmp_path):
    """Whichever file is opened when it comes: one of the two, whole, or a refusal."""
    loader, base = manager_of(live.llm).loader, live.root / "base"
    options = {"num_experts": 4, "top_k": 2, "r": 4, "dtype": torch.float32}
    first, second = live.root / "few", live.root / "one"  # two LoRAs
    if other != "rank":
        first = make_random_adapter(base, tmp_path / "first", **options)
        second = live.root / other
    if other in ("alike", "more"):
        differs = {"alike": {"seed": 1, "lora_alpha": 3}, "more": {"num_experts": 8}}[other]
        second = make_random_adapter(base, tmp_path / other, **options | differs)
    place, opened, told = tmp_path / "place", os.open, []

    def opens(path, *args, **kwargs):
        if str(path).startswith(f"{place}/"):
            told.append(path)
            if len(told) == swap_at:
                shutil.rmtree(place)
                shutil.copytree(second, place)
        return opened(path, *args, **kwargs)

    either = {whole(loader.read(str(path))) for path in (first, second)}
    assert len(either) == 2
    refusals, swap_at = 0, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opens)
        while len(told) >= swap_at:
            swap_at, told[:] = swap_at + 1, []
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(first, place)
            try:
                assert whole(loader.read(str(place))) in either, f"of both: {told[swap_at - 1]}"
            except AdapterError:
                refusals += 1
    assert 4 < refusals < swap_at - 1
