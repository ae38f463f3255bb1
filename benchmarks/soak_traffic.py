"""Clients of a soaked server: probes whose tokens are known, other traffic, changes of adapters."""

from __future__ import annotations

import http.client
import json
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.soak_truth import Names, Truth

PATIENCE = 120.0  # seconds that an answer may take
FAULTS = 50  # that are kept in full


@dataclass
class Answer:
    """Of a server: `events` are those of a stream, or the one JSON document."""

    status: int
    events: list[Any]
    text: str


@dataclass
class Tally:
    """What was done and what went wrong, by all clients."""

    counts: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, what: str, number: int = 1) -> None:
        with self.lock:
            self.counts[what] += number

    def fault(self, kind: str, text: str) -> None:
        with self.lock:
            self.counts[f"fault: {kind}"] += 1
            if len(self.faults) < FAULTS:
                self.faults.append(f"{kind}: {text[:600]}")

    @property
    def failed(self) -> int:
        return sum(n for what, n in self.counts.items() if what.startswith("fault: "))


@contextmanager
def answer_to(
    url: str, path: str, body: Any, method: str = "POST"
) -> Iterator[http.client.HTTPResponse]:
    """An answer before it is read; closed early at the end of a `with` block, it is cut off.

    Args:
        url: of the server.
        path: below it.
        body: JSON, or bytes as they are.
        method: of the request.
    """
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=PATIENCE)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(method, path, data, {"Content-Type": "application/json"})
        yield connection.getresponse()
    finally:
        connection.close()


def ask(url: str, path: str, body: Any, method: str = "POST") -> Answer:
    """A whole answer; arguments as in `answer_to`."""
    with answer_to(url, path, body, method) as response:
        text = response.read().decode("utf-8", errors="replace")
    if response.getheader("Content-Type", "").startswith("text/event-stream"):
        lines = (line.removeprefix("data: ") for line in text.split("\n\n"))
        events = [json.loads(line) for line in lines if line.strip() not in ("", "[DONE]")]
        for event in events:  # the headers were gone by then
            if "error" in event:
                return Answer(int(event["error"].get("code") or 500), events, text)
        return Answer(response.status, events, text)
    try:
        return Answer(response.status, [json.loads(text)], text)
    except ValueError:
        return Answer(response.status, [], text)


def token_ids(answer: Answer) -> list[int]:
    """All tokens of an answer, streamed or not."""
    choices = (event["choices"][0] for event in answer.events if event.get("choices"))
    return [token for choice in choices for token in choice.get("token_ids") or ()]


@dataclass
class World:
    """What all clients share.

    Attributes:
        url: of the server.
        root: folder with the adapters.
        contents: adapter directories by content.
        names: what each model name means.
        truth: the references.
        prompts: texts.
        tally: of all clients.
        end: monotonic time of the last request.
        seeds: whether requests may have one: on a CPU vLLM's older model runner ends with an error.
        refused_while_changing: names whose files change in place: a request under way that needs
            them again may be refused.
    """

    url: str
    root: Path
    contents: dict[str, Path]
    names: Names
    truth: Truth
    prompts: list[str]
    tally: Tally
    end: float
    seeds: bool = True
    refused_while_changing: frozenset[str] = frozenset()

    def on(self) -> bool:
        return time.monotonic() < self.end


def probe(world: World, draw: random.Random) -> None:
    """One greedy request in one of four ways, held against the references."""
    name, text = draw.choice(sorted(world.names.spans)), draw.choice(world.prompts)
    chat, stream = draw.random() < 0.4, draw.random() < 0.5
    count = draw.choice((4, 12, 24))
    body = {"model": name, "max_tokens": count, "temperature": 0, "stream": stream}
    body |= {"ignore_eos": True, "return_token_ids": True}
    body |= {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    path, since = "/v1/chat/completions" if chat else "/v1/completions", time.monotonic()
    answer = ask(world.url, path, body)
    possible = world.names.possible(name, since)
    way = f"{'chat' if chat else 'completion'}{', streamed' if stream else ''}"
    about = f"{name} ({way}, {count} tokens) of {text[:30]!r}: "
    if answer.status == 404 and None in possible:
        world.tally.add("requests of names that were not there")
        return
    if 400 <= answer.status < 500 and name in world.refused_while_changing:
        if world.names.changing(name, since):
            world.tally.add("requests refused while files changed")
            return
    if answer.status != 200:
        world.tally.fault("status", f"{about}{answer.status} {answer.text}")
        return
    tokens = token_ids(answer)
    world.tally.add(f"probes, {way}")
    prompt = world.truth.prompt_ids(text, chat)
    contents = {content for content in possible if content is not None}
    if len(tokens) != count or not world.truth.fits(contents, prompt, tokens):
        losses = world.truth.losses(prompt, tokens)
        world.tally.fault("wrong tokens", f"{about}{tokens}, of {contents}; nats off: {losses}")


def other_request(world: World, draw: random.Random) -> None:
    """A request with sampling and its options: the server is to answer, whatever it says."""
    body = {
        "model": draw.choice(world.names.steady), "prompt": " ".join(draw.sample(world.prompts, 2)),
        "max_tokens": draw.randrange(1, 60), "temperature": draw.choice((0.3, 1.0, 1.7)),
        "n": draw.choice((1, 1, 3)), "top_p": draw.choice((1.0, 0.8)),
        "seed": draw.randrange(1000) if world.seeds else None,
        "stop": draw.choice((None, [" the"], ["a", "e"])),
        "frequency_penalty": draw.choice((0.0, 0.5)),
    }  # fmt: skip
    # Not all at once: vLLM fails in a stream with the logprobs of an echoed prompt.
    body |= draw.choice(({"echo": True}, {"stream": True}, {"stream": True, "logprobs": 5},
                         {"logprobs": 0}))  # fmt: skip
    answer = ask(world.url, "/v1/completions", body)
    world.tally.add("other requests")
    if answer.status != 200:
        world.tally.fault("status", f"{body}: {answer.status} {answer.text}")


def disconnect(world: World, draw: random.Random) -> None:
    """A client that goes after some tokens, or before the first."""
    body = {"model": draw.choice(world.names.steady), "prompt": draw.choice(world.prompts), "max_tokens": 300,
            "ignore_eos": True, "stream": True, "temperature": 0}  # fmt: skip
    with answer_to(world.url, "/v1/completions", body) as response:
        for _ in range(draw.choice((0, 1, 6, 30))):
            response.readline()
    world.tally.add("disconnects")
    time.sleep(draw.random() * 0.3)


def change(world: World, draw: random.Random) -> None:
    """A load, an unload, or another content under a name that is served."""
    kind = draw.choice(("come and go", "by path", "in place"))
    {"come and go": _come_and_go, "by path": _by_path, "in place": _in_place}[kind](world, draw)
    time.sleep(draw.random() * 1.5)


def _asked(world: World, name: str, path: str, body: dict, what: str) -> None:
    answer = ask(world.url, path, body)
    world.names.settle(name, answer.status == 200)
    world.tally.add(what)
    if answer.status != 200:
        world.tally.fault("change", f"{what} {body}: {answer.status} {answer.text}")


def _now(world: World, name: str) -> str | None:
    return world.names.spans[name][-1][0]


def _come_and_go(world: World, draw: random.Random) -> None:
    if _now(world, "guest") is not None:
        world.names.may_become("guest", None)
        _asked(world, "guest", "/v1/unload_lora_adapter", {"lora_name": "guest"}, "unloads")
        return
    content = draw.choice(sorted(world.contents))
    world.names.may_become("guest", content)
    body = {"lora_name": "guest", "lora_path": str(world.contents[content])}
    _asked(world, "guest", "/v1/load_lora_adapter", body, "loads")


def _by_path(world: World, draw: random.Random) -> None:
    content = draw.choice(sorted(set(world.contents) - {_now(world, "moving")}))
    world.names.may_become("moving", content)
    body = {"lora_name": "moving", "lora_path": str(world.contents[content])}
    _asked(
        world, "moving", "/v1/load_lora_adapter", body | {"load_inplace": True},
        "replacements by path",
    )  # fmt: skip


def _in_place(world: World, draw: random.Random) -> None:
    content = draw.choice(sorted(set(world.contents) - {_now(world, "place")}))
    path, new, old = (world.root / f"place{end}" for end in ("", ".new", ".old"))
    shutil.copytree(world.contents[content], new)
    world.names.may_become("place", content)
    os.rename(path, old), os.rename(new, path), shutil.rmtree(old)
    body = {"lora_name": "place", "lora_path": str(path), "load_inplace": True}
    _asked(world, "place", "/v1/load_lora_adapter", body, "replacements in place")


def run_clients(world: World, clients: dict[Callable, int], seed: int) -> list[threading.Thread]:
    """Starts clients, each a thread that does the same until the world's end.

    Args:
        world: what they share.
        clients: how many of each.
        seed: of what they draw.
    """

    def loop(client: Callable, draw: random.Random) -> None:
        while world.on():
            try:
                client(world, draw)
            except (OSError, http.client.HTTPException) as e:
                world.tally.fault("connection", f"{client.__name__}: {type(e).__name__}: {e}")
                time.sleep(1)
            except Exception as e:
                world.tally.fault("client", f"{client.__name__}: {type(e).__name__}: {e}")

    threads = [
        threading.Thread(target=loop, args=(client, random.Random(f"{seed}/{number}/{kind}")))
        for kind, (client, count) in enumerate(clients.items())
        for number in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads
