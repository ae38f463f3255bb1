"""The served model on a GPU writes its KV cache itself, and answers as when vLLM does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from engines import load_reference, logprobs_of
from test_gpu_engine import gpu_pair, graphs

pytestmark = pytest.mark.gpu

# One step of 1600 tokens, steps of 16; then some single requests.
PROMPTS = [[3 + (i * 31 + j * 7) % 90 for j in range(100)] for i in range(16)]
SINGLES = [prompt[:40] for prompt in PROMPTS[:3]]

# Twice: with the projection's own writes, or without; counts are those of the requests' steps.
APART = """
import json, sys
sys.path.insert(0, sys.argv[1])
import conftest
from engines import completion, greedy
from test_gpu_engine import gpu_engine
from test_gpu_kv_cache import PROMPTS, SINGLES
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl
from vllm_adafuse.serving import wrap
from vllm_adafuse.serving.wrap import hooks

ours, updates = json.loads(sys.argv[5]), []
stock = FlashAttentionImpl.do_kv_cache_update
def counted(*arguments):
    updates.append(1)
    return stock(*arguments)
FlashAttentionImpl.do_kv_cache_update = counted
if not ours:
    hooks.can_write = lambda attention: False

def claims(model):
    caches = [bank.cache for bank in wrap.banks_of(model) if bank.cache]
    return len(caches), sum(cache.claims for cache in caches)

def answers(prompts):
    prompts = [{"prompt_token_ids": ids} for ids in prompts]
    return llm.generate(prompts, greedy(max_tokens=24), use_tqdm=False)

with gpu_engine(sys.argv[2], sys.argv[3], **json.loads(sys.argv[4])) as llm:
    layers, before = llm.apply_model(claims)[0]
    updates.clear()
    outputs = answers(PROMPTS)
    for prompt in SINGLES:
        outputs += answers([prompt])
    after = llm.apply_model(claims)[0][1]
rows = [completion(output) for output in outputs]
print("RESULT", json.dumps([rows, layers, before, after - before, len(updates)]))
"""


def serve(base, adapter, options, ours: bool, **env) -> list:
    """[tokens, logprobs] of all requests; layers that can write, claims before and during requests,
    and vLLM's updates during them."""
    options = {"enable_prefix_caching": False} | options
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | env
    arguments = [os.path.dirname(__file__), str(base), str(adapter)]
    arguments += [json.dumps(options), json.dumps(ours)]
    command = [sys.executable, "-P", "-c", APART, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def piecewise() -> dict:
    config = {"mode": 3, "cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [16, 64]}
    return {"enforce_eager": False, "compilation_config": config}


def modes(graph_mode: str) -> dict[str, dict]:
    """Options of an engine by name; graph_mode: which steps a whole graph is for."""
    return {
        "eager": {"enforce_eager": True},
        "captured": graphs(mode=0, cudagraph_mode=graph_mode),
        "compiled": graphs(mode=3, backend="eager", cudagraph_mode=graph_mode),
        "inductor": graphs(mode=3, cudagraph_mode=graph_mode),
        "piecewise": piecewise(),
        "default": {"enforce_eager": False},
    }


# Replays of V1's graphs of mixed steps give other answers than eager steps in vLLM 0.26, adapter or
# not: docs/testing.md.
RUNNERS = {"0": modes("FULL_DECODE_ONLY"), "1": modes("FULL")}


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("mode", RUNNERS["0"])
def test_answers_are_those_of_vllms_own_update(mode, runner, tmp_path):
    base, adapter = gpu_pair(tmp_path)
    env, options = {"VLLM_USE_V2_MODEL_RUNNER": runner}, RUNNERS[runner][mode]
    rows, layers, before, during, updates = serve(base, adapter, options, True, **env)
    want, none, *_, all_updates = serve(base, adapter, options, False, **env)
    assert rows == want and none == 0
    # Two wrong answers may be the same.
    reference = load_reference(base, adapter, dtype=torch.bfloat16, device_map="cuda")
    for prompt, (tokens, logprobs) in zip(PROMPTS + SINGLES, rows, strict=True):
        there = logprobs_of(reference, prompt, tokens).gather(1, torch.tensor(tokens)[:, None])
        assert (torch.tensor(logprobs) - there[:, 0]).abs().mean() < 0.05
    assert layers > 0 and during > 0 and during % layers == 0
    if mode == "piecewise":  # small steps are replays without the update
        assert 0 < updates < all_updates
    else:
        assert updates == 0 or mode == "default"
    if mode in ("captured", "compiled", "inductor"):
        assert before > 0
