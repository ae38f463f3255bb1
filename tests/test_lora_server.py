"""A real `vllm serve --enable-lora`: `model=` chooses a mixture, a PEFT LoRA or the base, and
adapters come and go over HTTP while others are served."""

import json
import os
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from engines import assert_greedy_equals, load_reference, make_pair
from loras import FEW, PATTERNS, make_lora
from transformers import AutoModelForCausalLM
from vllm_adafuse.server import running_server, vllm_serve
from vllm_adafuse.tiny import real_prompts

PROMPTS = real_prompts(9)
OPTIONS = (
    "--enforce-eager --dtype float32 --max-model-len 256 --gpu-memory-utilization 0.2 "
    "--served-model-name base --enable-lora --max-loras 3 --max-lora-rank 64 --max-cpu-loras 3"
).split()


def post(server, path, **body):
    """(status, answer) of a POST."""
    request = urllib.request.Request(
        f"{server.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def complete(server, model, prompt):
    """A request's output in the shape of `LLM.generate`'s."""
    status, text = post(
        server, "/v1/completions", model=model, prompt=prompt, max_tokens=10, temperature=0,
        logprobs=1, ignore_eos=True, return_token_ids=True,
    )  # fmt: skip
    assert status == 200, text
    choice = json.loads(text)["choices"][0]
    tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    at = [{token: SimpleNamespace(logprob=value)} for token, value in zip(tokens, logprobs)]
    sequence = SimpleNamespace(token_ids=tokens, logprobs=at)
    return SimpleNamespace(
        prompt=prompt, prompt_token_ids=choice["prompt_token_ids"], outputs=[sequence]
    )


def models(server):
    with urllib.request.urlopen(f"{server.url}/v1/models") as answer:
        return {m["id"]: m for m in json.loads(answer.read())["data"]}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    base, mix = make_pair(root, r=[4, 20, 33, 8])
    references = {
        "base": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(),
        "mix": load_reference(base, mix),
        "few": make_lora(base, root / "few", 1, **FEW),
        "patterns": make_lora(base, root / "patterns", 2, **PATTERNS),
    }
    modules = [f"mix={mix}", f"few={root / 'few'}"]
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_RPC_BASE_PATH": str(tmp_path_factory.mktemp("s")), "VLLM_LOGGING_LEVEL": "INFO",
    }  # fmt: skip
    command = vllm_serve(base, *OPTIONS, "--lora-modules", *modules)
    with running_server(command, root / "serve.log", env=env) as server:
        yield server, references, root
    assert server.process.returncode == 0


def check(server, references, names):
    """All at once, each answer its own reference's."""
    asked = [(names[i % len(names)], prompt) for i, prompt in enumerate(PROMPTS)]
    with ThreadPoolExecutor(len(asked)) as pool:
        outputs = list(pool.map(lambda ask: complete(server, *ask), asked))
    for (name, _), output in zip(asked, outputs):
        assert_greedy_equals([output], references[name])


def test_model_chooses_and_adapters_come_and_go(served):
    server, references, root = served
    listed = models(server)
    assert set(listed) == {"base", "mix", "few"}
    assert listed["mix"]["parent"] == "base"
    assert listed["mix"]["root"] == str(root / "adapter")
    check(server, references, ["base", "mix", "few"])

    load = {"lora_name": "patterns", "lora_path": str(root / "patterns")}
    status, text = post(server, "/v1/load_lora_adapter", **load)
    assert status == 200, text
    check(server, references, ["patterns", "mix", "few", "base"])

    status, text = post(server, "/v1/unload_lora_adapter", lora_name="few")
    assert status == 200, text
    assert set(models(server)) == {"base", "mix", "patterns"}
    status, _ = post(server, "/v1/completions", model="few", prompt="a", max_tokens=1)
    assert status == 404

    # Another content under a known name: nothing of the old one is left, whatever was cached.
    post(server, "/v1/unload_lora_adapter", lora_name="patterns")
    os.rename(root / "patterns", root / "old"), os.rename(root / "few", root / "patterns")
    status, text = post(server, "/v1/load_lora_adapter", **load)
    assert status == 200, text
    check(server, references | {"patterns": references["few"]}, ["patterns", "mix"])
    log = (root / "serve.log").read_text("utf-8", errors="replace")
    # 3 x 64 ranks; four experts of 1, 2, 3 and 1 pages.
    assert "a pool of 12 pages of 16 ranks" in log and "mixture, 7 pages" in log
