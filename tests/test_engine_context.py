"""A served router that sees a request's past: tokens are the reference's, however they come."""

import pytest
import torch
from engines import (
    assert_best_beam,
    assert_greedy_equals,
    assert_greedy_tokens,
    assert_logprobs_equal,
    engine,
    greedy,
    load_reference,
    make_pair,
)
from test_engine_company import counter

CONTEXT = {"router_context": "mean", "router_context_scale": 4.0, "router_bias": True}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("context"), num_experts=6, **CONTEXT)


@pytest.fixture(scope="module")
def model(pair):
    return load_reference(*pair)


@pytest.fixture(scope="module")
def llm(pair):
    # Few blocks and few tokens a step: prompts come in chunks, and requests are preempted.
    options = {"num_gpu_blocks_override": 12, "block_size": 32, "max_num_batched_tokens": 48}
    with engine(*pair, max_num_seqs=8, disable_log_stats=False, **options) as llm:
        yield llm


@pytest.fixture
def seeds(llm):
    """(row, number of tokens) of what is seeded, as it happens."""
    router, found = model_of(llm).adafuse_router, []
    original = router.seed

    def seed(place, row, tokens):
        found.append((row, len(tokens.ids)))
        original(place, row, tokens)

    router.seed = seed
    yield found
    del router.seed


def model_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()


def prompts(*lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(2, 1000, (length,), generator=draw).tolist() for length in lengths]
    return [{"prompt_token_ids": prompt} for prompt in ids]


def test_chunks_and_mixed_batches(llm, model, seeds):
    assert_greedy_equals(llm.generate(prompts(3, 70, 1, 100, 20), greedy(10)), model)
    assert not seeds  # all from their first token on


def test_prefix_hits(llm, model, seeds):
    (first,) = prompts(80, seed=1)
    llm.generate([first], greedy(2))
    ids = first["prompt_token_ids"]
    others = [{"prompt_token_ids": ids[:64] + tail} for tail in ([5, 6, 7], [900, 3], ids[64:])]
    outputs = llm.generate(others, greedy(10))
    assert [output.num_cached_tokens for output in outputs] == [64, 64, 64]
    assert [length for _, length in seeds] == [64, 64, 64]
    assert_greedy_equals(outputs, model)


def test_preempted_requests_go_on(llm, model):
    # Three that grow to 5 blocks each, and 11 blocks in all.
    outputs = llm.generate(prompts(*[33] * 3, seed=2), greedy(110))
    assert_greedy_equals(outputs, model)
    assert counter(llm, "vllm:num_preemptions") > 0


def test_samples_of_one_prompt(llm, model):
    (output,) = llm.generate(prompts(40, seed=3), greedy(8, n=3, temperature=1.0, seed=7))
    found = {tuple(sequence.token_ids) for sequence in output.outputs}
    assert len(found) == 3
    assert_logprobs_equal(output, model)


def test_beams(llm, model):
    from vllm.sampling_params import BeamSearchParams

    (prompt,) = prompts(20, seed=4)
    (output,) = llm.beam_search([prompt], BeamSearchParams(beam_width=3, max_tokens=6, ignore_eos=True))
    assert_best_beam(output, model, prompt["prompt_token_ids"], 6)


def test_the_past_is_read(llm, model):
    """An engine that forgets sums says other words: the test of the tests above."""
    router = model_of(llm).adafuse_router
    (prompt,) = prompts(60, seed=5)
    (output,) = llm.generate([prompt], greedy(10))
    kept = router.c.clone()
    try:
        router.c.zero_()
        (other,) = llm.generate([{"prompt_token_ids": [9, *prompt["prompt_token_ids"]]}], greedy(10))
    finally:
        router.c.copy_(kept)
    assert_greedy_equals([output], model)
    with pytest.raises(AssertionError):
        assert_greedy_tokens(model, other.prompt_token_ids, list(other.outputs[0].token_ids))


def test_what_it_has_outlives_a_sleep(llm):
    """vLLM's sleep of level 2 keeps the buffers of the model, and nothing else."""
    model = model_of(llm)
    parts = model.adafuse_router, model.adafuse_router.route, model.adafuse_requests
    kept = {buffer.untyped_storage().data_ptr() for buffer in model.buffers()}
    needed = [t for part in parts for t in [*vars(part).values(), *part.buffers()]]
    needed = [t for t in needed if isinstance(t, torch.Tensor) and t.numel() > 1]
    assert len(needed) > 10
    assert all(tensor.untyped_storage().data_ptr() in kept for tensor in needed)


def test_a_dummy_step_moves_no_sums(llm, model):
    from vllm import SamplingParams

    core, (prompt,) = llm.llm_engine, prompts(30, seed=6)
    worker = core.engine_core.engine_core.model_executor.driver_worker.worker
    core.add_request("dummies", prompt, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    while core.has_unfinished_requests():
        for output in core.step():
            tokens = list(output.outputs[0].token_ids)
        worker.execute_dummy_batch()
    assert_greedy_tokens(model, prompt["prompt_token_ids"], tokens)
