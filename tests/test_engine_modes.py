"""Random backbones, compiled graphs and their cache, and a plugin that stays out of the way."""

import json
import os
import subprocess
import sys

import pytest
import torch
from engines import (
    assert_greedy_equals,
    assert_same_completions,
    completion,
    engine,
    greedy,
    load_reference,
    make_pair,
)
from safetensors.torch import load_file
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.serving import wrap
from vllm_adafuse.tiny import real_prompts

PROMPTS = real_prompts(8)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def test_dummy_backbone_still_loads_the_adapter(pair):
    base, adapter = pair

    def banks(model):
        router = wrap.router_of(model)
        loaded = {
            name: (bank.lora_a[part].clone(), bank.lora_b.clone())
            for bank in wrap.banks_of(model)
            for part, name in enumerate(bank.names)
        }
        return loaded, router.weight.clone(), router.passport_ids.clone(), model.model.norm.weight

    with engine(base, adapter, load_format="dummy") as llm:
        loaded, router, passports, norm = llm.apply_model(banks)[0]
        assert len(llm.generate(PROMPTS, greedy(), use_tqdm=False)) == len(PROMPTS)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert torch.equal(router, tensors["router.weight"])
    for name, (lora_a, lora_b) in loaded.items():
        assert torch.equal(lora_a, tensors[f"{name}.lora_A"])
        b = tensors[f"{name}.lora_B"].transpose(0, 1)
        starts = range(len(lora_b) - len(b) + 1)
        assert any(torch.equal(lora_b[start : start + len(b)], b) for start in starts)
    assert len(loaded) == 21
    assert passports.unique().tolist() == [0, 1, 2, 3]
    assert not torch.equal(norm, load_file(base / "model.safetensors")["model.norm.weight"])


GENERATE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import conftest
from engines import completion, engine, greedy
from vllm_adafuse.tiny import real_prompts
base, adapter, options = json.loads(sys.argv[2])
with engine(base, adapter, **options) as llm:
    model = llm.apply_model(lambda model: type(model).__name__)[0]
    outputs = llm.generate(real_prompts(8), greedy(), use_tqdm=False)
print("RESULT", json.dumps([model, [completion(output) for output in outputs]]))
"""


def generate(base, adapter=None, env=(), **options) -> tuple[str, list]:
    """Model class, and tokens and logprobs of PROMPTS, from a fresh process."""
    arguments = json.dumps([str(base), adapter and str(adapter), options])
    command = [sys.executable, "-c", GENERATE, os.path.dirname(__file__), arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | dict(env))
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def generate_here(base, adapter=None, **options) -> tuple[str, list]:
    """The same from this process."""
    with engine(base, adapter, **options) as llm:
        model = llm.apply_model(lambda model: type(model).__name__)[0]
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    return model, [list(completion(output)) for output in outputs]


def test_without_an_adapter_the_plugin_changes_nothing(pair):
    model, completions = generate_here(pair[0])
    assert model == "LlamaForCausalLM"
    plain, without = generate(pair[0], env={"VLLM_PLUGINS": "none"}.items())
    assert plain == model
    both = (as_outputs(found, pair[0]) for found in (completions, without))
    assert_same_completions(*both, tolerance=1e-5)


def test_compiled_graphs_and_their_cache(pair, tmp_path, monkeypatch):
    """First start, second start from the cache, and another adapter on the same backbone."""
    base, adapter = pair
    other = make_random_adapter(base, tmp_path / "other", num_experts=3, r=2, seed=9)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    for start, run in ((generate_here, adapter), (generate, adapter), (generate_here, other)):
        name, completions = start(base, run, enforce_eager=False)
        assert name == "AdaFuseLlamaForCausalLM"
        assert_completions_equal(completions, base, run)


def as_outputs(completions, base) -> list:
    """Tokens and logprobs of PROMPTS in the shape of `LLM.generate`'s outputs."""
    from types import SimpleNamespace

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    outputs = []
    for prompt, (tokens, logprobs) in zip(PROMPTS, completions, strict=True):
        at = [{token: SimpleNamespace(logprob=value)} for token, value in zip(tokens, logprobs)]
        sequence = SimpleNamespace(token_ids=tokens, logprobs=at)
        ids = tokenizer(prompt).input_ids
        outputs.append(SimpleNamespace(prompt=prompt, prompt_token_ids=ids, outputs=[sequence]))
        assert completion(outputs[-1])[0] == tokens
    return outputs


def assert_completions_equal(completions, base, adapter):
    assert_greedy_equals(as_outputs(completions, base), load_reference(base, adapter))
