"""Adapters that come, go and change under running requests: every token is of the content that its
request was sent with.

A long sequence: LORA_SEQUENCE=1000 pytest tests/test_lora_random.py
"""

import os

import pytest
import torch
from engines import assert_greedy_equals, engine, greedy, load_reference, make_pair
from lora_sequences import Sequences
from loras import FEW, MODULES, PATTERNS, make_lora, manager_of
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.tiny import real_prompts

LENGTH = int(os.environ.get("LORA_SEQUENCE", "60"))
WHOLE = {"r": 16, "lora_alpha": 24, "target_modules": MODULES}
LORAS = {"few": FEW, "patterns": PATTERNS, "whole": WHOLE}
MIXTURES = {"two": (2, 16), "three": (3, 8), "four": (4, 16)}
EXTRA_LORAS = {f"lora{i}": {"r": 8 + 8 * i, "lora_alpha": 16, "target_modules": MODULES[i:]}
               for i in range(3)}  # fmt: skip
EXTRA_MIXTURES = {"five": (5, 4), "six": (6, 4), "seven": (7, 4)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directories and references of all contents."""
    root = tmp_path_factory.mktemp("random")
    base, _ = make_pair(root, num_experts=2, r=2)
    references = {"base": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()}
    for seed, (name, config) in enumerate({**LORAS, **EXTRA_LORAS}.items()):
        references[name] = make_lora(base, root / name, seed, **config)
    for seed, (name, (experts, r)) in enumerate({**MIXTURES, **EXTRA_MIXTURES}.items()):
        make_random_adapter(
            base, root / name, num_experts=experts, top_k=2, r=r, seed=seed, dtype=torch.float32
        )
        references[name] = load_reference(base, root / name)
    return root, references


@pytest.fixture(scope="module")
def llm(made):
    """A pool of 4 pages, 2 adapters of a step, 3 on the host; few blocks of the KV cache; prompts in
    chunks of 64."""
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 32, "max_cpu_loras": 3}
    small = {"num_gpu_blocks_override": 12, "max_num_batched_tokens": 64, "max_num_seqs": 6}
    with engine(made[0] / "base", **options, **small) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _left_alone(request):
    """A test that fails leaves no requests to the next."""
    yield
    if "llm" in request.fixturenames:
        engine_ = request.getfixturevalue("llm").llm_engine
        engine_.abort_request(list(engine_.output_processor.external_req_ids))


def test_a_random_sequence(llm, made, tmp_path):
    root, references = made
    contents = {name: root / name for name in (*LORAS, *MIXTURES)}
    counts = Sequences(llm, contents, references, tmp_path, seed=LENGTH).run(LENGTH)
    assert counts["finished"] >= LENGTH / 10 and counts["loads"] >= LENGTH / 20, counts
    assert manager_of(llm).pool.taken.within(manager_of(llm).pool.size)


def run(llm, requests, tokens=12):
    """Adds (prompt, request) in turn, with a step between; finished outputs by order."""
    engine_, outputs = llm.llm_engine, {}
    for i, (prompt, lora) in enumerate(requests):
        engine_.add_request(str(i), prompt, greedy(tokens), lora_request=lora)
        outputs |= {o.request_id: o for o in engine_.step() if o.finished}
    while engine_.has_unfinished_requests():
        outputs |= {o.request_id: o for o in engine_.step() if o.finished}
    return [outputs[str(i)] for i in range(len(requests))]


def test_a_load_leaves_running_requests_their_adapter(llm, made):
    """vLLM 47724: a load under a running request gives it another tenant's adapter."""
    root, references = made
    engine_, prompts = llm.llm_engine, real_prompts(2)
    own = LoRARequest("tenant", 21, str(root / "few"))
    engine_.add_request("0", prompts[0], greedy(20), lora_request=own)
    done = []
    for i, name in enumerate(["whole", "two", "three", "patterns"]):
        done += [o for o in engine_.step() if o.finished]
        engine_.add_lora(LoRARequest(f"other{i}", 30 + i, str(root / name)))
    while engine_.has_unfinished_requests():
        done += [o for o in engine_.step() if o.finished]
    assert_greedy_equals(done, references["few"])


def test_rapid_alternation_over_a_shared_prefix(llm, made):
    """vLLM 38606; prompts in chunks of 64 tokens."""
    root, references = made
    names = ["few", "whole", "base", "two"]
    every = [
        None if name == "base" else LoRARequest(name, 40 + i, str(root / name))
        for i, name in enumerate(names)
    ]
    prefix = [11] * 70
    asked = [({"prompt_token_ids": [*prefix, 20 + i // 4]}, every[i % 4]) for i in range(24)]
    outputs = run(llm, asked, tokens=4)
    for i, name in enumerate(names):
        assert_greedy_equals(outputs[i::4], references[name])


def test_an_adapter_among_more_than_fit_says_what_it_says_alone(llm, made):
    """Whatever was used before."""
    root, references = made
    prompt = real_prompts(1)[0]
    names = ["few", "two", "patterns", "three", "whole", "few", "four", "few"]
    for i, name in enumerate(names):
        (output,) = run(llm, [(prompt, LoRARequest(name, 50 + i, str(root / name)))])
        assert_greedy_equals([output], references[name])


def test_sixty_four_requests_of_thirteen_adapters(made):
    """6 mixtures, 6 LoRAs and the base in one batch."""
    root, references = made
    names = ["base", *LORAS, *EXTRA_LORAS, *MIXTURES, *EXTRA_MIXTURES]
    every = [
        None if name == "base" else LoRARequest(name, 1 + i, str(root / name))
        for i, name in enumerate(names)
    ]
    prompts = real_prompts(64)
    options = {"enable_lora": True, "max_loras": 12, "max_lora_rank": 64, "max_num_seqs": 64}
    with engine(root / "base", **options) as llm:
        requests = [every[i % len(every)] for i in range(64)]
        outputs = llm.generate(prompts, greedy(8), lora_request=requests, use_tqdm=False)
        manager = manager_of(llm)
        assert len(manager.listed) == 12
    for i, name in enumerate(names):
        assert_greedy_equals(outputs[i :: len(names)], references[name])
