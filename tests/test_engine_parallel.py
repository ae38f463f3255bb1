"""Tensor and pipeline parallelism give what one process gives: the reference's tokens."""

import pytest
from engines import assert_greedy_equals, engine, greedy, load_reference, make_pair
from vllm_adafuse.tiny import real_prompts

PROMPTS = real_prompts(20)


@pytest.fixture(autouse=True)
def one_core_per_rank(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")


@pytest.mark.parametrize(
    "architecture, config, adapter",
    [
        # One key/value head: it is replicated over both ranks.
        ("LlamaForCausalLM", {"num_key_value_heads": 1}, {"r": [2, 4, 4, 3]}),
        (
            "Phi3ForCausalLM",
            {"tie_word_embeddings": True},
            {"target_modules": ["qkv_proj", "down_proj"]},
        ),
    ],
    ids=["llama-replicated-kv", "phi3-tied"],
)
def test_two_tensor_ranks(architecture, config, adapter, tmp_path):
    base, adapter = make_pair(tmp_path, architecture, config, **adapter)
    with engine(base, adapter, tensor_parallel_size=2) as llm:
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    assert_greedy_equals(outputs, load_reference(base, adapter))


def test_two_pipeline_stages(tmp_path):
    base, adapter = make_pair(tmp_path)
    options = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    with engine(base, adapter, pipeline_parallel_size=2, **options) as llm:
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    assert_greedy_equals(outputs, load_reference(base, adapter))
