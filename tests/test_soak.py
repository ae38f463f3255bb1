"""benchmarks.soak without an engine: what it takes for right, for wrong, and for growth."""

import json
import math
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import benchmark_package  # noqa: F401
import pytest
import torch
from engines import make_pair
from loras import FEW, make_lora

from benchmarks.soak import ask_health, growth, verdict
from benchmarks.soak_hostile import DAMAGES, hostile, make_damaged, requests
from benchmarks.soak_traffic import Tally, World, ask, disconnect, probe
from benchmarks.soak_truth import BASE, Names, Truth

PROMPTS = ["def area(width, height):", "The area of a rectangle is"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("soak")
    base, mixture = make_pair(root)
    peft = make_lora(base, root / "lora", 1, **FEW)
    contents = {"mix": mixture, "lora": root / "lora"}
    return SimpleNamespace(root=root, base=base, contents=contents, peft=peft)


@pytest.fixture
def truth(made):
    return Truth(made.base, made.contents, 1e-3, "cpu")


class Fake(ThreadingHTTPServer):
    """A server that answers a completion by the greedy tokens of what `says` has for its model."""

    def __init__(self, truth, says):
        self.truth, self.says, self.status = truth, says, 200
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        server, body = self.server, {}
        if server.status == 200:
            body = json.loads(sent)
        content = server.says.get(body.get("model"))
        status = 404 if body and content is None else server.status
        chunks = [{}]
        if content is not None:
            chat = "messages" in body
            text = body["messages"][0]["content"] if chat else body["prompt"]
            prompt = server.truth.prompt_ids(text, chat)
            ids = torch.tensor([prompt])
            new = server.truth.models[content].generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=body["max_tokens"],
                min_new_tokens=body["max_tokens"], eos_token_id=-1, do_sample=False,
            )[0, len(prompt) :].tolist()  # fmt: skip
            parts = [[token] for token in new] if body["stream"] else [new]
            chunks = [{"choices": [{"token_ids": part}]} for part in parts]
        self.send_response(status)
        streamed = body.get("stream") and content is not None
        kind = "text/event-stream" if streamed else "application/json"
        self.send_header("Content-Type", kind)
        self.end_headers()
        lines = (json.dumps(chunk) for chunk in chunks)
        text = "".join(f"data: {line}\n\n" for line in lines) + "data: [DONE]\n\n"
        self.wfile.write((text if streamed else json.dumps(chunks[0])).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def world(made, truth):
    server = Fake(truth, {BASE: BASE, "mix": "mix", "lora": "lora"})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    names = Names({name: name for name in truth.models}, list(truth.models))
    world = World(
        server.url, made.root, made.contents, names, truth, PROMPTS, Tally(), time.monotonic() + 60
    )
    yield world, server
    server.shutdown()


def test_right_tokens_are_right_in_all_ways(world):
    world, _ = world
    for seed in range(16):
        probe(world, random.Random(seed))
    assert not world.tally.faults
    ways = [what for what in world.tally.counts if what.startswith("probes")]
    assert len(ways) == 4 and world.truth.worst <= 1e-3 and world.truth.mistaken == 0


def test_tokens_of_another_content_are_wrong(world):
    world, server = world
    server.says |= {"mix": BASE, "lora": "mix", BASE: "lora"}
    for seed in range(6):
        probe(world, random.Random(seed))
    assert world.tally.counts["fault: wrong tokens"] == 6 == world.tally.failed
    assert "nats off" in world.tally.faults[0]


def test_errors_and_names_that_are_gone(world):
    world, server = world
    server.status = 503
    probe(world, random.Random(0))
    assert world.tally.counts["fault: status"] == 1
    server.status, server.says = 200, {}
    world.names.spans = {"guest": [[None, math.inf]]}
    probe(world, random.Random(0))
    assert world.tally.failed == 1
    world.names.spans = {"mix": [["mix", math.inf]]}
    probe(world, random.Random(0))
    assert world.tally.failed == 2


def test_a_change_under_way_allows_both_and_then_one():
    names = Names({"live": "old"}, [])
    before = time.monotonic()
    names.may_become("live", "new")
    assert names.possible("live", before) == {"old", "new"} and names.changing("live", before)
    names.settle("live", done=True)
    assert names.possible("live", before) == {"old", "new"}  # one that was under way
    after = time.monotonic()
    assert names.possible("live", after) == {"new"} and not names.changing("live", after)
    names.may_become("live", None)
    names.settle("live", done=False)
    assert names.possible("live", time.monotonic()) == {"new"}


def test_a_merged_lora_is_pefts(made, truth):
    ids = torch.tensor([truth.prompt_ids(PROMPTS[0], chat=False)])
    ours, theirs = truth.models["lora"](ids).logits, made.peft(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, truth.models[BASE](ids).logits, atol=1e-2)


def test_hostile_requests_are_to_be_refused(world, made, tmp_path):
    world, server = world
    wrong = requests(made.root, make_damaged(made.contents["lora"], tmp_path), tmp_path)
    assert len(wrong) > len(DAMAGES) + 30
    for status, faults in ((400, 0), (200, 1), (500, 2)):
        server.status = status
        server.says = {}
        path, body = "/v1/completions", b"{}" if status == 200 else b"{"
        hostile({"one": (path, body)})(world, random.Random(0))
        assert world.tally.counts["fault: hostile"] == faults
    assert world.tally.counts["hostile requests"] == 3


def test_a_client_that_leaves_is_no_fault(world):
    world, _ = world
    world.names.steady = ["mix"]
    disconnect(world, random.Random(1))
    assert world.tally.counts == {"disconnects": 1}
    assert ask(world.url, "/v1/completions", {"model": "no"}).status == 404


def test_growth_is_of_the_last_fifth_after_the_warm_up(world):
    world, _ = world
    samples = [(t, {"bytes": 100 if t > 20 else t}) for t in range(101)]
    assert growth(samples, "bytes", 25) == 0
    assert growth(samples[:81] + [(t, {"bytes": 103}) for t in range(81, 101)], "bytes", 25) > 0.02
    with pytest.raises(ValueError, match="too few"):
        growth(samples[:3], "bytes", 50)
    grown = [(t, {"bytes": 0, "by_process": {1: 100 + t, 2 + t: 10**6}}) for t in range(100)]
    row = verdict(world, grown, 25)
    assert row["bytes_last"] == 199  # processes that come and go are not counted
    assert [fault.split(":")[0] for fault in row["faults"]] == ["growth", "probes"]


@pytest.mark.parametrize("healthy, said, faults", [
    (True, "INFO: all is well", []), (True, "EngineDeadError", ["log"]),
    (False, "bytes \udcff", ["server"]), (False, "EngineDeadError", ["server", "log"]),
])  # fmt: skip
def test_a_server_that_is_ill_at_the_end(healthy, said, faults, tmp_path):
    log, tally = tmp_path / "log", Tally()
    log.write_bytes(said.encode("utf-8", "surrogateescape"))
    ask_health(SimpleNamespace(healthy=lambda: healthy, log=log), tally)
    assert [fault.split(":")[0] for fault in tally.faults] == faults
