"""Mixtures, of which one sees the past, a LoRA and the base in one batch, in modes of vLLM that take
engines of their own. They run where they are asked for:

    LORA_MODES=1 pytest tests/test_lora_modes.py
"""

import os
import re
import urllib.request

import pytest
import torch
from engines import assert_greedy_equals, engine, greedy, load_reference, make_pair
from loras import PATTERNS, make_lora
from test_engine_context import CONTEXT
from test_lora_server import OPTIONS, check, models, post
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.server import running_server, vllm_serve
from vllm_adafuse.tiny import real_prompts

pytestmark = pytest.mark.skipif(not os.environ.get("LORA_MODES"), reason="LORA_MODES is not set")

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directory, and references by name."""
    root = tmp_path_factory.mktemp("modes")
    base, _ = make_pair(root, r=[4, 20, 33, 8])
    (root / "adapter").rename(root / "mix")
    references = {
        "base": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(),
        "mix": load_reference(base, root / "mix"),
        "lora": make_lora(base, root / "lora", 1, **PATTERNS),
    }
    past = {"num_experts": 3, "top_k": 2, "r": 4, "dtype": torch.float32}
    make_random_adapter(base, root / "past", **past, **CONTEXT)
    references["past"] = load_reference(base, root / "past")
    return root, references


def test_ngrams_are_guessed(made):
    root, references = made
    names = "mix", "lora", "past"
    requests = [None, *(LoRARequest(n, i, str(root / n)) for i, n in enumerate(names, 1))]
    prompts = [f"{text} {text} {text}" for text in real_prompts(12, words=6)]
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 128, "disable_log_stats": False}
    with engine(root / "base", speculative_config=NGRAM, **options) as llm:
        named = [requests[i % 4] for i in range(len(prompts))]
        outputs = llm.generate(prompts, greedy(40), lora_request=named, use_tqdm=False)
        found = {metric.name: metric for metric in llm.get_metrics()}
    for i, name in enumerate(("base", *names)):
        assert_greedy_equals(outputs[i::4], references[name])
    assert found["vllm:spec_decode_num_accepted_tokens"].value > 0


def test_loads_reach_both_engines(made, tmp_path):
    """Data parallelism: whichever engine a request comes to has what was loaded over HTTP."""
    root, references = made
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_RPC_BASE_PATH": str(tmp_path)}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    options = [*OPTIONS, "--data-parallel-size", "2", "--api-server-count", "1"]
    loaded = [f"{name}={root / name}" for name in ("mix", "past")]
    command = vllm_serve(root / "base", *options, "--lora-modules", *loaded)
    with running_server(command, tmp_path / "log", env=env) as server:
        load = {"lora_name": "lora", "lora_path": str(root / "lora")}
        assert post(server, "/v1/load_lora_adapter", **load)[0] == 200
        for _ in range(3):
            check(server, references, ["base", "mix", "lora", "past"])
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            text = answer.read().decode()
        served = re.findall(r'^vllm:request_success_total{engine="(\d)".*"length".* (\S+)$', text, re.M)
        assert {number for number, count in served if float(count) > 3} == {"0", "1"}, served
        # Another content under the name: neither engine keeps the old one.
        assert post(server, "/v1/unload_lora_adapter", lora_name="lora")[0] == 200
        load["lora_path"] = str(root / "mix")
        assert post(server, "/v1/load_lora_adapter", **load)[0] == 200
        check(server, references | {"lora": references["mix"]}, ["lora", "base"])
        assert set(models(server)) == {"base", "mix", "lora", "past"}
