"""A router at a later layer (`router.layer`): served as the reference decides, in every mode."""

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

PROMPTS = real_prompts(16, words=40)


def test_alone_in_company_and_from_the_prefix_cache(tmp_path):
    """On Gemma 2, whose embedding is scaled; the router reads the states without a norm."""
    options = {"router_layer": 2, "router_input": "embedding", "lora_alpha": 32}
    base, adapter = make_pair(
        tmp_path, "Gemma2ForCausalLM", {"max_position_embeddings": 1024}, **options
    )
    with engine(base, adapter) as llm:
        together = llm.generate(PROMPTS, greedy(), use_tqdm=False)
        alone = [llm.generate([prompt], greedy(), use_tqdm=False)[0] for prompt in PROMPTS[:3]]
        again = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    assert_same_completions(alone, together[:3])
    assert sum(output.num_cached_tokens for output in again) > 100
    assert_same_completions(again, together)
    assert_greedy_equals(together, load_reference(base, adapter))


def test_compiled_and_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_prefix_caching": False}
    base, adapter = make_pair(tmp_path, router_layer=1)
    with engine(base, adapter, enforce_eager=False, **options) as llm:
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    model = load_reference(base, adapter)
    assert_greedy_equals(outputs, model)
    # The decision sees context: one token takes several routes.
    routes: dict[int, set] = {}
    for output in outputs:
        model(torch.tensor([output.prompt_token_ids]))
        for token, gates in zip(output.prompt_token_ids, model.adafuse.gates[0]):
            routes.setdefault(token, set()).add(tuple(gates.nonzero()[:, 0].tolist()))
    assert max(map(len, routes.values())) > 1


def test_two_pipeline_stages(tmp_path, monkeypatch):
    """The router stands in the second stage: nothing is decided in the first."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    base, adapter = make_pair(tmp_path, config={"num_hidden_layers": 4}, router_layer=2)
    with engine(base, adapter, pipeline_parallel_size=2, **options) as llm:
        outputs = llm.generate(PROMPTS[:8], greedy(), use_tqdm=False)
    assert_greedy_equals(outputs, load_reference(base, adapter))


def test_a_layer_of_another_form_is_refused():
    from types import SimpleNamespace

    from vllm_adafuse.serving.wrap.hooks import route_at

    class Layer(torch.nn.Module):
        def forward(self, hidden_states, positions):
            return hidden_states

    with pytest.raises(RuntimeError, match="Layer of this vLLM takes hidden_states, positions"):
        route_at(Layer(), SimpleNamespace())
