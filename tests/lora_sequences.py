"""Random sequences of what users do to an engine's adapters, every finished request held to the
reference of the content that it was sent with."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines import assert_greedy_tokens, greedy
from vllm.lora.request import LoRARequest
from vllm_adafuse.serving.versions import AdapterRefused

NAMES = "abcd"
# Prompts share prefixes: what is left of another content in the KV cache would be found.
PREFIXES = 3


class Sequences:
    """Drives an engine of this process.

    Args:
        llm: with LoRA enabled, small enough to preempt.
        contents: name -> directory of an adapter; each name of NAMES has one of them at a time.
        references: name -> what says the same, "base" among them.
        live: a directory for those that change.
        seed: of the sequence.
    """

    def __init__(self, llm, contents: dict[str, Path], references: dict, live: Path, seed: int):
        self.engine, self.contents, self.references = llm.llm_engine, contents, references
        self.live, self.draw = live, random.Random(seed)
        self.on_disk: dict[str, str] = {}
        # What a name stands for in the engine: the content of its last load.
        self.served: dict[str, str] = {}
        self.running: dict[str, tuple[str, list[int]]] = {}
        counted = "finished", "aborted", "tokens", "loads", "refused"
        self.counts = {name: 0 for name in counted}
        for name in NAMES:
            self.put(name)

    def put(self, name: str) -> None:
        """Another content under a name's path."""
        content = self.draw.choice(sorted(self.contents))
        shutil.rmtree(self.live / name, ignore_errors=True)
        shutil.copytree(self.contents[content], self.live / name)
        self.on_disk[name] = content

    def request(self, name: str, reload: bool) -> LoRARequest:
        """A user's request, and what it stands for from now on."""
        if reload or name not in self.served:
            self.served[name] = self.on_disk[name]
            self.counts["loads"] += 1
        path = str(self.live / name)
        return LoRARequest(name, 1 + NAMES.index(name), path, load_inplace=reload)

    def send(self, number: int) -> None:
        """A request of the base or of a name, perhaps with a reload, of any length."""
        draw = self.draw
        prefix = [7 + draw.randrange(PREFIXES)] * draw.choice([5, 40, 70])
        prompt = prefix + [draw.randrange(10, 900) for _ in range(draw.randint(1, 30))]
        name = draw.choice([None, *NAMES])
        lora = None if name is None else self.request(name, draw.random() < 0.3)
        tokens = draw.choice([1, 4, 12, 30])
        with self.refusals(name):
            self.engine.add_request(
                str(number), {"prompt_token_ids": prompt}, greedy(tokens), lora_request=lora
            )
            self.running[str(number)] = (self.served[name] if name else "base", prompt)

    @contextmanager
    def refusals(self, name: str | None) -> Iterator[None]:
        """What the host gave up while its files were there, and changed then, cannot be had."""
        try:
            yield
        except AdapterRefused as e:
            assert "its content has the hash" in str(e)
            assert self.on_disk[name] != self.served[name]
            self.counts["refused"] += 1

    def step(self) -> None:
        """One of the engine, and the checks of what it finished."""
        for output in self.engine.step():
            if not output.finished:
                continue
            content, prompt = self.running.pop(output.request_id)
            tokens = list(output.outputs[0].token_ids)
            assert_greedy_tokens(self.references[content], prompt, tokens, output.request_id)
            self.counts["finished"] += 1
            self.counts["tokens"] += len(tokens)

    def run(self, count: int) -> dict[str, int]:
        """So many things, each of a random kind, then what is left to the end."""
        draw = self.draw
        for number in range(count):
            kind = draw.choices(
                ["send", "step", "put", "add", "remove", "abort", "pin", "reset"],
                [8, 8, 3, 2, 1, 1, 1, 0.3],
            )[0]
            name = draw.choice(NAMES)
            if kind == "send":
                self.send(number)
            elif kind == "step":
                for _ in range(draw.randint(1, 6)):
                    self.step()
            elif kind == "put":
                self.put(name)
            elif kind == "add":
                with self.refusals(name):
                    assert self.engine.add_lora(self.request(name, draw.random() < 0.5))
            elif kind == "remove":
                listed = 1 + NAMES.index(name) in self.engine.list_loras()
                removed = self.engine.remove_lora(1 + NAMES.index(name))
                assert removed or not listed
                assert not removed or name in self.served
                self.served.pop(name, None)
            elif kind == "abort" and self.running:
                gone = draw.choice(sorted(self.running))
                self.engine.abort_request([gone])
                del self.running[gone]
                self.counts["aborted"] += 1
            elif kind == "pin" and name in self.served:
                with self.refusals(name):
                    self.engine.add_lora(self.request(name, False))
                    self.engine.pin_lora(1 + NAMES.index(name))
            elif kind == "reset" and not self.running:
                self.engine.reset_prefix_cache()
            shown = {1 + NAMES.index(name) for name in self.served}
            assert self.engine.list_loras() <= shown
        while self.engine.has_unfinished_requests():
            self.step()
        assert not self.running
        return self.counts
