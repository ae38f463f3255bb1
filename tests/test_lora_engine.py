"""Requests that choose their adapter: mixtures, PEFT LoRAs and the base in one batch of an engine
say what each says alone in plain transformers."""

import os
import shutil
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from engines import (
    assert_best_beam,
    assert_logprobs_equal,
    assert_same_completions,
    completion,
    engine,
    greedy,
    load_reference,
    make_pair,
)
from loras import (
    LORAS,
    MIXTURES,
    PAST,
    PROMPTS,
    Served,
    add_to,
    fuse_as_on_a_gpu,
    make_lora,
    manager_of,
)
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.patches.lora_requests import versions_of
from vllm_adafuse.serving import hosted, routes
from vllm_adafuse.serving.adapters import stamp_path
from vllm_adafuse.serving.hosted import Loader
from vllm_adafuse.serving.versions import AdapterRefused
from vllm_adafuse.serving.wrap.blocks import FusedNorm

TOGETHER = ["base", "mix", "mix8", "few", "patterns"]


@pytest.fixture(scope="module", params=["embeds", "fused"])
def served(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    base, _ = make_pair(root, num_experts=2, r=2)
    references = {"base": AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()}
    for name, options in (MIXTURES | PAST).items():
        make_random_adapter(base, root / name, **{"dtype": references["base"].dtype} | options)
        references[name] = load_reference(base, root / name)
    for seed, (name, options) in enumerate(LORAS.items()):
        references[name] = make_lora(base, root / name, seed, **options)
    names = [*MIXTURES, *LORAS, "huge", "lost", "wide", "wider", *PAST]
    options = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 128, "max_cpu_loras": 4}
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        if request.param == "fused":
            fuse_as_on_a_gpu(patch)
        else:  # vLLM embeds all tokens then, and hands the model no ids
            options["enable_prompt_embeds"] = True
        llm = stack.enter_context(engine(base, max_num_batched_tokens=256, **options))
        yield Served(llm, root, references, names, request.param == "fused")


def test_one_batch_of_base_mixtures_and_loras(served):
    outputs = served.generate(TOGETHER)
    served.check(TOGETHER, outputs)
    said = [[completion(o)[0] for o in served.generate([name], PROMPTS[:4])] for name in TOGETHER]
    assert all(said.count(one) == 1 for one in said)  # every adapter matters
    manager = manager_of(served.llm)
    assert {bank.is_fused for bank in manager.banks} == {served.fused}
    assert manager.list_adapters() == {1, 2, 3, 4}
    # Ranks 4, 20, 33, 8 of mix; eight experts; rank 8; rank 40.
    assert manager.pool.taken.pages == 7 + 8 + 1 + 3


@pytest.mark.parametrize("names", [TOGETHER, ["past", "base", "mix8"]], ids=["all", "past"])
def test_prompts_of_embeddings(served, names):
    """Of no token's, between others that vLLM embeds; prompts of ids in the same batch."""
    if served.fused:
        pytest.skip("this engine takes none")
    embed = served.references["base"].get_input_embeddings()
    draw, prompts = torch.Generator().manual_seed(0), []
    for i in range(2 * len(TOGETHER)):
        rows = embed(torch.randint(3, 400, (6 + i,), generator=draw)).detach()
        rows[::2] += torch.randn(rows[::2].shape, generator=draw) * rows.std()
        prompts.append({"prompt_embeds": rows})
    prompts[3::4] = [{"prompt_token_ids": [*range(9, 25)]}] * len(prompts[3::4])
    for i, (prompt, output) in enumerate(zip(prompts, served.generate(names, prompts), strict=True)):
        tokens, logprobs = completion(output)
        rows = prompt.get("prompt_embeds")
        rows = embed(torch.tensor(prompt["prompt_token_ids"])) if rows is None else rows
        with torch.no_grad():
            whole = torch.cat([rows, embed(torch.tensor(tokens))])[None]
            logits = served.references[names[i % len(names)]](inputs_embeds=whole).logits[0]
        expected = torch.log_softmax(logits[len(rows) - 1 : -1], -1)
        assert tokens == expected.argmax(-1).tolist()
        assert logprobs == pytest.approx(expected.amax(-1).tolist(), abs=1e-3)


def test_routers_asked_about_embeddings_follow_the_weights(served):
    routers = manager_of(served.llm).step.routers
    assert (routers is None) == served.fused
    if routers is None:
        return
    model = served.llm.apply_model(lambda model: model)[0]
    norm = model.model.layers[0].input_layernorm.weight
    for factor in (2, 0.5):
        norm.data.mul_(factor)
        model.reload_adapter()
        assert torch.equal(routers.norm_weight, norm)


def test_alone_and_in_company(served):
    for at, name in enumerate(TOGETHER):
        together = served.generate(TOGETHER)
        alone = served.generate([name], PROMPTS[at :: len(TOGETHER)])
        assert_same_completions(alone, together[at :: len(TOGETHER)])


def test_samples_of_one_prompt(served):
    names = ["base", "mix", "patterns"]
    options = {"n": 3, "temperature": 1.0}
    for name, output in zip(names, served.generate(names, PROMPTS[:3], **options), strict=True):
        assert len({tuple(sequence.token_ids) for sequence in output.outputs}) == 3
        assert_logprobs_equal(output, served.references[name])


def test_allowed_tokens(served):
    params = {"allowed_token_ids": [100, 101, 102], "logprobs": None}
    for output in served.generate(["base", "mix", "few"], PROMPTS[:3], **params):
        assert set(output.outputs[0].token_ids) <= {100, 101, 102}
    with pytest.raises(Exception, match="out-of-vocab token id"):
        served.generate(["few"], PROMPTS[:1], allowed_token_ids=[200000])
    assert not served.llm.llm_engine.has_unfinished_requests()


def test_beams(served):
    from vllm.sampling_params import BeamSearchParams

    names, ids = ["base", "mix", "patterns"], [[7, 8, 9, 10, *range(20, 32)]] * 3
    outputs = served.llm.beam_search(
        [{"prompt_token_ids": prompt} for prompt in ids],
        BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True),
        lora_request=[served.request(name) for name in names],
    )
    said = [output.sequences[0].tokens for output in outputs]
    for name, output in zip(names, outputs, strict=True):
        assert_best_beam(output, served.references[name], ids[0], 5)
    assert said[0] != said[1] != said[2] != said[0]


def test_all_that_adapters_have_on_the_device_outlives_a_sleep(served):
    """vLLM's sleep of level 2 keeps the buffers of the model, and nothing else."""
    manager, model = manager_of(served.llm), served.llm.apply_model(lambda model: model)[0]
    kept = {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    needed = [tensor for bank in manager.banks for tensor in (bank.lora_a, bank.lora_b)]
    needed += [t for t in vars(manager.step).values() if isinstance(t, torch.Tensor) and t.numel() > 1]
    needed += manager.step.buffers()
    assert len(needed) > 2 * len(manager.banks)
    assert all(tensor.untyped_storage().data_ptr() in kept for tensor in needed)


def test_more_adapters_than_fit_come_and_go(served):
    every = ["mix", "mix8", *LORAS]
    for turn in range(2):
        for at in range(0, len(every), 2 + turn):
            names = ["base", *every[at : at + 2 + turn]]
            served.check(names, served.generate(names, PROMPTS[:6]))
    manager = manager_of(served.llm)
    assert len(manager.hosted) == 4  # max_cpu_loras
    assert manager.pool.taken.within(manager.pool.size)


def test_a_pinned_adapter_stays(served):
    engine_, manager = served.llm.llm_engine, manager_of(served.llm)
    assert engine_.add_lora(served.request("few"))
    assert engine_.pin_lora(3)
    place = manager.pool.placed[3]
    for name in ("mix", "mix8", "patterns", "third", "fourth"):
        served.generate([name], PROMPTS[:1])
        assert 3 in manager.hosted and manager.pool.placed[3] == place
    served.check(["few", "third"], served.generate(["few", "third"], PROMPTS[:4]))
    with pytest.raises(Exception, match="99 is not registered"):
        engine_.pin_lora(99)
    assert engine_.remove_lora(3) and 3 not in engine_.list_loras()
    assert not engine_.remove_lora(3)
    served.check(["few"], served.generate(["few"], PROMPTS[:2]))  # read again


def test_a_pin_brings_back_what_had_to_make_room(served):
    engine_, manager = served.llm.llm_engine, manager_of(served.llm)
    try:
        for name in ("mix", "mix8", "few", "patterns"):  # --max-cpu-loras
            assert engine_.add_lora(served.request(name))
            assert engine_.pin_lora(served.request(name).lora_int_id)
        assert engine_.add_lora(served.request("third")) and 5 not in manager.hosted
        assert engine_.pin_lora(5) and manager.pool.pinned == {1, 2, 3, 4, 5}
        served.check(["third", "mix"], served.generate(["third", "mix"], PROMPTS[:4]))
        assert len(manager.hosted) == 5
    finally:
        for adapter in range(1, 6):
            engine_.remove_lora(adapter)


def test_steps_without_adapters_route_nothing(served, monkeypatch):
    from vllm_adafuse.kernels import page_projection
    from vllm_adafuse.serving import ops
    from vllm_adafuse.serving.page_step import PageStep

    def fail(*arguments):
        raise AssertionError("a step without adapters ran our kernels")

    monkeypatch.setattr(PageStep, "route", fail)
    monkeypatch.setattr(ops, "sgmm", fail)
    monkeypatch.setattr(page_projection, "projection", fail)
    monkeypatch.setattr(page_projection, "projection_norm", fail)
    served.check(["base"], served.generate(["base"], PROMPTS[:2]))
    with pytest.raises(AssertionError, match="ran our kernels"):
        manager_of(served.llm).step.has_adapters.fill_(True)
        manager_of(served.llm).step.route(None)


def test_a_worker_refuses_what_is_not_what_the_request_is_for(served):
    manager = manager_of(served.llm)
    for path, message in (
        (stamp_path(str(served.root / "few"), "0" * 64), "the request is for 0000000000000000"),
        (str(served.root / "base"), "adapter"),
    ):
        before = manager.list_adapters()
        with pytest.raises(AdapterError, match=message):
            add_to(manager, LoRARequest("other", 77, path))
        assert manager.list_adapters() == before


def test_an_adapter_that_does_not_fit_names_both_options(served):
    base = served.root / "base"
    make_random_adapter(base, served.root / "huge", num_experts=33, top_k=2, r=16)
    for ask in (
        lambda: served.llm.llm_engine.add_lora(served.request("huge")),
        lambda: served.generate(["huge"]),
    ):
        with pytest.raises(AdapterError) as refused:
            ask()
        message = str(refused.value)
        for part in ("takes 33 pages", "pool has 32", "--max-lora-rank", "--max-loras"):
            assert part in message
        assert "528 or more (it is 512)" in message
    served.check(TOGETHER, served.generate(TOGETHER, PROMPTS[:5]))


def test_adapters_that_do_not_fit_together_take_turns(served):
    """Each alone is as large as the pool, or nearly so."""
    base, names = served.root / "base", ["wide", "wider", "few"]
    for name, experts in (("wide", 31), ("wider", 32)):
        if not (served.root / name).exists():
            make_random_adapter(
                base, served.root / name, num_experts=experts, top_k=2, r=16, seed=experts,
                target_modules=["q_proj"], dtype=torch.float32,
            )  # fmt: skip
        served.references[name] = load_reference(base, served.root / name)
    served.check(names, served.generate(names, PROMPTS[:9]))


def test_an_adapter_whose_files_are_gone(served):
    """Those that the worker has stay; what it had to give up is refused before a step needs it."""
    if not (served.root / "lost").exists():
        shutil.copytree(served.root / "third", served.root / "lost")
    served.references["lost"] = served.references["third"]
    served.check(["lost"], served.generate(["lost"], PROMPTS[:2]))
    manager, others = manager_of(served.llm), ["mix", "mix8", "few", "patterns"]
    os.rename(served.root / "lost", served.root / "moved")
    served.generate(others, PROMPTS[:4])
    # Others make room for it, which can be read again: --max-cpu-loras is 4.
    lost = served.request("lost").lora_int_id
    assert lost in manager.hosted and len(manager.hosted) == 4
    served.check(["lost", "few"], served.generate(["lost", "few"], PROMPTS[:4]))
    os.rename(served.root / "moved", served.root / "lost")
    served.llm.llm_engine.remove_lora(served.request("lost").lora_int_id)
    served.generate(["lost"], PROMPTS[:1])
    served.generate(others, PROMPTS[:4])
    assert lost not in manager.hosted and len(manager.hosted) == 4
    os.rename(served.root / "lost", served.root / "moved")
    with pytest.raises(AdapterRefused, match="no such directory"):
        served.generate(["few", "lost", "base"], PROMPTS[:3])
    assert not served.llm.llm_engine.has_unfinished_requests()
    served.check(["few", "base"], served.generate(["few", "base"], PROMPTS[:4]))
    os.rename(served.root / "moved", served.root / "lost")
    served.check(["lost"], served.generate(["lost"], PROMPTS[:2]))


def test_an_adapter_that_goes_while_its_requests_wait_says_nothing(served):
    """Nobody could be told any more; others are served on, and nobody gets the base."""
    path, manager = served.root / "lost", manager_of(served.llm)
    served.generate(["lost"], PROMPTS[:1])
    manager.remove_adapter(served.request("lost").lora_int_id)  # unknown to the front end
    shutil.rmtree(path)
    outputs = served.generate(["lost", "few", "base"], PROMPTS[:9])
    served.check(["few"], outputs[1::3])
    served.check(["base"], outputs[2::3])
    for output in outputs[::3]:
        tokens, logprobs = completion(output)
        assert set(tokens) == {0} and len(set(logprobs)) == 1  # all tokens are as likely
    # What such requests left in the KV cache must not serve later ones.
    shutil.copytree(served.root / "third", path)
    with pytest.raises(AdapterError, match="load it under another name"):
        served.llm.llm_engine.add_lora(served.request("lost"))
    with pytest.raises(AdapterError, match="load it under another name"):
        served.generate(["lost"], PROMPTS[:1])


def test_steps_go_on_while_an_adapter_is_read(served, monkeypatch):
    engine_, manager, read = served.llm.llm_engine, manager_of(served.llm), Loader.read
    may_end, readers = threading.Event(), []

    def slow_read(self, path):
        readers.append(threading.current_thread())
        assert may_end.wait(60)
        return read(self, path)

    monkeypatch.setattr(Loader, "read", slow_read)
    engine_.remove_lora(served.request("third").lora_int_id)
    stamped = versions_of(engine_).stamp(served.request("third"))
    try:
        engine_.add_request("runs", PROMPTS[0], greedy(6), lora_request=None)
        done = []
        while engine_.has_unfinished_requests():
            assert not manager.add_adapter(stamped)
            done += [output for output in engine_.step() if output.finished]
    finally:
        may_end.set()
    served.check(["base"], done)
    add_to(manager, stamped)
    assert len(readers) == 1 and readers[0] is not threading.current_thread()
    served.check(["third"], served.generate(["third"], PROMPTS[:2]))


def test_steps_go_on_while_passports_are_stamped(served, monkeypatch):
    """A piece of the vocabulary at a time; whoever drops the adapter meanwhile drops what there is
    of it, and a step that needs it has all of it."""
    if not served.fused:
        pytest.skip("with prompt embeddings there are no passports")
    engine_, manager = served.llm.llm_engine, manager_of(served.llm)
    monkeypatch.setattr(hosted, "PIECES_AT_ONCE", 1)
    monkeypatch.setattr(routes, "PASSPORT_CHUNK", 32)
    stamped = versions_of(engine_).stamp(served.request("mix8"))

    def add_some(calls):
        """Begins anew, and asks so often once the files are read."""
        engine_.remove_lora(served.request("mix8").lora_int_id)
        manager.reads.start(stamped.lora_int_id, stamped.lora_path).result()
        return [manager.add_adapter(stamped) for _ in range(calls)]

    assert add_some(2) == [False, False] and stamped.lora_int_id in manager.coming
    manager.remove_adapter(stamped.lora_int_id)
    assert not manager.coming and stamped.lora_int_id not in manager.hosted
    begun = add_some(2) and manager.coming[stamped.lora_int_id]
    manager.stamp_again()  # the backbone's weights are others: what was read is of use, no more
    assert [a is b for a, b in zip(manager.coming[stamped.lora_int_id], begun)] == [True, False]
    add_some(2)
    engine_.add_request("runs", PROMPTS[0], greedy(6), lora_request=None)
    done = []
    while engine_.has_unfinished_requests():
        assert not manager.add_adapter(stamped)
        done += [output for output in engine_.step() if output.finished]
    served.check(["base"], done)
    manager.name_step([stamped], np.array([stamped.lora_int_id]), np.array([1]), np.array([0]))
    assert stamped.lora_int_id in manager.active and not manager.coming
    add_to(manager, stamped)
    served.check(["mix8"], served.generate(["mix8"], PROMPTS[:2]))


def test_the_backbones_weights_are_loaded_anew(served):
    """Fused weights and norms that took others' places among them."""
    norms = [m for m in served.llm.apply_model(lambda model: list(model.modules()))[0]
             if isinstance(m, FusedNorm)]  # fmt: skip
    assert bool(norms) == served.fused
    fused = [bank for bank in manager_of(served.llm).banks if bank.is_fused]
    for weight in [norm.weight for norm in norms] + [bank.weight for bank in fused]:
        weight.data.zero_()
    served.llm.collective_rpc("reload_weights")
    served.check(TOGETHER, served.generate(TOGETHER))


def test_an_adapter_is_on_its_pages_before_a_step_needs_it(served):
    """Where there is room beside those of the steps that run."""
    engine_, manager = served.llm.llm_engine, manager_of(served.llm)
    served.generate(["few", "patterns"], PROMPTS[:2])
    assert manager.active == {3, 4}
    engine_.remove_lora(5), engine_.add_lora(served.request("third"))
    assert 5 in manager.pool.placed and 5 not in manager.listed
    assert {3, 4} <= manager.listed
    place = manager.pool.placed[5]
    assert manager.step.directory[0, list(place.pages)].tolist() == [-1] * len(place.pages)
    served.check(["few", "third"], served.generate(["few", "third"], PROMPTS[:4]))
    assert manager.pool.placed[5] == place
