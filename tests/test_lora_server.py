"""A real `vllm serve --enable-lora`: `model=` chooses a mixture, a PEFT LoRA or the base, and
adapters come and go over HTTP while others are served."""

import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from engines import assert_greedy_equals, load_reference, make_pair
from loras import FEW, PATTERNS, make_lora
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.digest import content_hash
from vllm_adafuse.offline.routing import OfflineRouter
from vllm_adafuse.server import running_server, vllm_serve
from vllm_adafuse.tiny import real_prompts

PROMPTS = real_prompts(9)
OPTIONS = (
    "--enforce-eager --dtype float32 --max-model-len 256 --gpu-memory-utilization 0.2 "
    "--served-model-name base --enable-lora --max-loras 3 --max-lora-rank 128 --max-cpu-loras 3"
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
        "VLLM_LORA_RESOLVER_CACHE_DIR": str(root / "resolved"),
    }  # fmt: skip
    (root / "resolved").mkdir()
    shutil.copytree(root / "few", root / "seen")
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
    # 3 x 128 ranks; four experts of 1, 2, 3 and 1 pages.
    assert "a pool of 24 pages of 16 ranks" in log and "mixture, 7 pages" in log


def error_of(answer):
    """Status, type and message of an answer that refuses."""
    status, text = answer
    error = json.loads(text)["error"]
    assert error["code"] == status
    return status, error["type"], error["message"]


def copy_of(root, name, damage=lambda path: None):
    """A copy of an adapter, damaged."""
    path = root / "copies" / name
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(root / "old", path)
    damage(path)
    return str(path)


def edit(**changes):
    def damage(path):
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def test_bad_adapters_are_told_why_and_harm_nobody(served):
    """`old` and `few` are from the test above."""
    server, references, root = served
    bad = {
        "cut": (lambda p: os.truncate(p / "adapter_model.safetensors", 100), "not a sound"),
        "dora": (edit(use_dora=True), "use_dora"),
        "ranks": (edit(r=41), "expected [41, 128]"),
        "kind": (edit(peft_type="IA3"), '`peft_type` is "IA3"'),
    }
    body = {"max_tokens": 200, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    ended = threading.Event()

    def ask_until_ended():
        """Status and tokens of one request after the other."""
        answers = []
        while not answers or not ended.is_set():
            status, text = post(
                server, "/v1/completions", model="mix", prompt=PROMPTS[0], **body
            )
            answers.append((status, json.loads(text)["choices"][0]["token_ids"]))
        return answers

    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(ask_until_ended)
        try:
            nowhere = {"lora_name": "bad", "lora_path": str(root / "nowhere")}
            status, kind, message = error_of(post(server, "/v1/load_lora_adapter", **nowhere))
            assert (status, kind) == (404, "NotFoundError") and "no such directory" in message
            for name, (damage, word) in bad.items():
                load = {"lora_name": "bad", "lora_path": copy_of(root, name, damage)}
                status, kind, message = error_of(post(server, "/v1/load_lora_adapter", **load))
                assert (status, kind) == (400, "BadRequestError"), name
                assert word in message and "cannot be used:" in message, message
        finally:
            ended.set()
    (status, tokens), *others = beside.result()
    assert status == 200 and len(tokens) == 200
    assert all(other == (200, tokens) for other in others)
    assert "bad" not in models(server) and server.healthy()
    check(server, references, ["mix", "base"])
    assert "Traceback" not in (root / "serve.log").read_text("utf-8", errors="replace")


def test_a_reload_in_place(served):
    server, references, root = served
    load = {"lora_name": "live", "lora_path": copy_of(root, "live")}
    assert post(server, "/v1/load_lora_adapter", **load)[0] == 200
    status, _, message = error_of(post(server, "/v1/load_lora_adapter", **load))
    assert status == 400 and "already been loaded" in message  # vLLM's own
    check(server, references | {"live": references["patterns"]}, ["live", "mix"])
    shutil.rmtree(load["lora_path"])
    status, _, _ = error_of(post(server, "/v1/load_lora_adapter", **load, load_inplace=True))
    assert status == 404
    check(server, references | {"live": references["patterns"]}, ["live"])  # as it was
    shutil.copytree(root / "patterns", load["lora_path"])  # the content of `few`
    assert post(server, "/v1/load_lora_adapter", **load, load_inplace=True)[0] == 200
    check(server, references | {"live": references["few"]}, ["live", "base"])
    assert models(server)["live"]["root"] == load["lora_path"]


def test_an_adapter_that_cannot_be_read_again_is_the_requests_fault(served):
    """It had to make room, its name stands for it still, and its files are gone by then."""
    server, references, root = served
    for name in ("gone", "one", "two", "three"):  # --max-cpu-loras is 3
        load = {"lora_name": name, "lora_path": copy_of(root, name)}
        assert post(server, "/v1/load_lora_adapter", **load)[0] == 200
        complete(server, name, "a")
    shutil.rmtree(root / "copies" / "gone")
    answer = post(server, "/v1/completions", model="gone", prompt="a", max_tokens=1)
    status, kind, message = error_of(answer)
    assert (status, kind) == (400, "BadRequestError") and "cannot be used:" in message, message
    assert server.healthy()
    check(server, references | {"three": references["patterns"]}, ["three", "base"])


def test_the_file_system_resolver(served):
    server, references, root = served
    shutil.copytree(root / "patterns", root / "resolved" / "found")
    check(server, references | {"found": references["few"]}, ["found", "mix"])
    shutil.copytree(root / "adapter", root / "resolved" / "mixed")
    check(server, references | {"mixed": references["mix"]}, ["mixed", "base"])
    listed = models(server)["found"]
    assert (listed["root"], listed["parent"]) == (str(root / "resolved" / "found"), "base")
    for name, damage, word in (
        ("dora", edit(use_dora=True), "use_dora"),
        ("json", lambda p: (p / "adapter_config.json").write_text("{"), "a resolver cannot read"),
    ):
        shutil.copytree(copy_of(root, name, damage), root / "resolved" / name)
        answer = post(server, "/v1/completions", model=name, prompt="a", max_tokens=1)
        status, _, message = error_of(answer)
        assert status == 400 and word in message, message
    answer = post(server, "/v1/completions", model="nowhere", prompt="a", max_tokens=1)
    assert error_of(answer)[0] == 404
    check(server, references, ["mix", "base"])


def test_metrics_follow_adapters_as_they_come_and_are_used(served):
    server, _, root = served

    def scrape():
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            families = text_string_to_metric_families(answer.read().decode())
        ours = (s for f in families for s in f.samples if s.name.startswith("adafuse_"))
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for s in ours}

    def changed(key):
        return after.get(key, 0) - before.get(key, 0)

    before = scrape()
    own = str(root / "seen")
    assert post(server, "/v1/load_lora_adapter", lora_name="seen", lora_path=own)[0] == 200
    bad = post(server, "/v1/load_lora_adapter", lora_name="none", lora_path=str(root / "none"))
    output, mixed = (complete(server, name, PROMPTS[0]) for name in ("seen", "mix"))
    after = scrape()
    prompt = ("adafuse_tokens_total", (("adapter", "seen"), ("kind", "prompt")))
    generation = ("adafuse_tokens_total", (("adapter", "seen"), ("kind", "generation")))
    assert (changed(prompt), changed(generation)) == (len(output.prompt_token_ids), 10)
    assert changed(("adafuse_requests_total", (("adapter", "seen"), ("reason", "length")))) == 1
    assert bad[0] == 404
    assert changed(("adafuse_adapter_refusals_total", (("reason", "AdapterAbsent"),))) == 1
    ids = torch.tensor([*mixed.prompt_token_ids, *mixed.outputs[0].token_ids])
    chosen = OfflineRouter(load_adapter(root / "adapter"), root / "base").routes(ids)[0]
    for expert, tokens in enumerate(torch.bincount(chosen.flatten(), minlength=4).tolist()):
        labels = (("adapter", "mix"), ("expert", f"{expert}"))
        assert changed(("adafuse_expert_tokens_total", labels)) == tokens
    engine = (("engine", "0"),)
    assert changed(("adafuse_adapter_load_seconds_count", engine)) >= 1
    assert 0 < after["adafuse_pool_pages_used", engine] <= after["adafuse_pool_pages", engine] == 24
    digest = content_hash(root / "seen")
    named = (("adapter", "seen"), ("content", digest), ("engine", "0"), ("kind", "lora"))
    assert after["adafuse_adapter_info", named] == 1
    assert post(server, "/v1/unload_lora_adapter", lora_name="seen")[0] == 200
    deadline = time.monotonic() + 30
    while ("adafuse_adapter_info", named) in scrape():  # an engine forgets soon, not at once
        assert time.monotonic() < deadline
        time.sleep(0.1)
