"""A prompt's output does not depend on what else is in the batch, nor on how it is scheduled."""

import pytest
import torch
from engines import (
    assert_greedy_equals,
    assert_same_completions,
    engine,
    greedy,
    load_reference,
    make_pair,
)
from vllm_adafuse.tiny import real_prompts

PROMPTS = real_prompts(33, words=40)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"), config={"max_position_embeddings": 1024})


@pytest.fixture(scope="module")
def llm(pair):
    with engine(*pair, enable_prompt_embeds=True, disable_log_stats=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def together(llm):
    """All prompts in one batch."""
    return llm.generate(PROMPTS, greedy(), use_tqdm=False)


def counter(llm, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == name)


def test_the_batch_equals_the_reference(together, pair):
    assert_greedy_equals(together, load_reference(*pair))


def test_alone_equals_in_company(llm, together):
    alone = [llm.generate([prompt], greedy(), use_tqdm=False)[0] for prompt in PROMPTS[:6]]
    assert_same_completions(alone, together[:6])


def test_prefix_cache_hits_change_nothing(llm, together):
    again = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    assert sum(output.num_cached_tokens for output in again) > 100
    assert_same_completions(again, together)


def test_prompt_embeddings_take_the_same_routes(llm, pair, together):
    embedding = load_reference(*pair).model.embed_tokens
    for output in together[:6]:
        with torch.no_grad():
            embeds = embedding(torch.tensor(output.prompt_token_ids))
        by_embeds = llm.generate([{"prompt_embeds": embeds}], greedy(), use_tqdm=False)
        assert_same_completions(by_embeds, [output], tolerance=1e-5)


def test_seeded_sampling_is_the_same_in_company(llm):
    params = greedy(n=4, temperature=1.0, seed=7)
    alone = llm.generate(PROMPTS[:1], params, use_tqdm=False)[0]
    # Others are greedy: vLLM's CPU runner cannot split the prefill of a seeded request.
    everyone = [params] + [greedy()] * (len(PROMPTS) - 1)
    company = llm.generate(PROMPTS, everyone, use_tqdm=False)[0]
    samples = [list(sequence.token_ids) for sequence in alone.outputs]
    assert samples == [list(sequence.token_ids) for sequence in company.outputs]
    assert len({tuple(sample) for sample in samples}) == 4


def test_chunked_prefill(pair, together):
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_prefix_caching": False}
    assert max(len(output.prompt_token_ids) for output in together) > 16
    with engine(*pair, **options) as llm:
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    assert_same_completions(outputs, together)


def test_preemption(pair, together):
    options = {"num_gpu_blocks_override": 3, "block_size": 128, "disable_log_stats": False}
    with engine(*pair, **options) as llm:
        outputs = llm.generate(PROMPTS[:8], greedy(max_tokens=100), use_tqdm=False)
        assert counter(llm, "vllm:num_preemptions") > 0
    assert_same_completions(outputs, together[:8])
    assert_greedy_equals(outputs, load_reference(*pair))  # also what came after it
