"""Requests that a server is to refuse, by a 4xx, and go on."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.soak_traffic import World, ask

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def edited(**changes: Any) -> Callable[[Path], None]:
    """Other values in a config."""

    def damage(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(config | changes))

    return damage


def _replaced(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / file).write_bytes(content)


def _pickled(path: Path) -> None:
    os.remove(path / WEIGHTS)
    (path / "adapter_model.bin").write_bytes(pickle.dumps({}))


def _pipe(path: Path) -> None:
    os.remove(path / CONFIG)
    os.mkfifo(path / CONFIG)


def _huge_header(path: Path) -> None:
    (path / WEIGHTS).write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut": lambda path: os.truncate(path / WEIGHTS, 1000),
    "empty weights": _replaced(WEIGHTS, b""),
    "header of exabytes": _huge_header,
    "no weights": lambda path: os.remove(path / WEIGHTS),
    "no config": lambda path: os.remove(path / CONFIG),
    "broken JSON": _replaced(CONFIG, b"{"),
    "deep JSON": _replaced(CONFIG, b"[" * 100_000),
    "config of bytes": _replaced(CONFIG, b"\xff\xfe\x00"),
    "another rank": edited(r=4095),
    "another kind": edited(peft_type="IA3"),
    "DoRA": edited(use_dora=True),
    "a rank that is text": edited(r="many"),
    "a pickle": _pickled,
    "a pipe": _pipe,
}


def make_damaged(sound: Path, root: Path) -> dict[str, Path]:
    """A damaged copy of an adapter for each kind of damage."""
    made = {}
    for number, (name, damage) in enumerate(DAMAGES.items()):
        made[name] = root / f"damaged{number}"
        shutil.copytree(sound, made[name])
        damage(made[name])
    return made


def _load(path: Any, name: Any = "hostile", **more: Any) -> tuple[str, Any]:
    return LOAD, {"lora_name": name, "lora_path": str(path), **more}


def requests(root: Path, damaged: dict[str, Path], large: Path) -> dict[str, tuple[str, Any]]:
    """Paths and bodies, by what is wrong with them.

    Args:
        root: a folder of the test.
        damaged: adapters that are.
        large: one that the pool cannot hold.
    """
    file = next(iter(damaged.values())) / CONFIG
    some = {"model": "base", "prompt": "Hello", "max_tokens": 2}
    talk = {"model": "base", "max_tokens": 2}
    hello = [{"role": "user", "content": "Hello"}]
    wrong = {
        "directory that is not there": _load(root / "nowhere"),
        "directory that is a file": _load(file),
        "directory with a zero byte": _load("a\0b"),
        "directory of no name": _load(""),
        "directory of 100 000 letters": _load("a" * 100_000),
        "system's directory": _load("/proc/self"),
        "replacement that is not there": _load(root / "nowhere", "moving", load_inplace=True),
        "too large for the pool": _load(large),
        "name that is taken": _load(root / "place", "mix0"),
        "name of nothing": _load(root / "place", ""),
        "name that is a number": (LOAD, {"lora_name": 5, "lora_path": str(root)}),
        "load without a path": (LOAD, {"lora_name": "x"}),
        "load of a list": (LOAD, []),
        "load of no JSON": (LOAD, b"{"),
        "unload of what is not there": (UNLOAD, {"lora_name": "never"}),
        "unload of nothing": (UNLOAD, {}),
        "no such model": (COMPLETIONS, some | {"model": "never"}),
        "a model that is a number": (COMPLETIONS, some | {"model": 7}),
        "no JSON": (COMPLETIONS, b"{'model'"),
        "bytes": (COMPLETIONS, bytes(range(128, 256))),
        "deep JSON": (COMPLETIONS, b"[" * 100_000),
        "no prompt": (COMPLETIONS, {"model": "base"}),
        "a prompt that is an object": (COMPLETIONS, some | {"prompt": {"a": 1}}),
        "a prompt too long": (COMPLETIONS, some | {"prompt": "word " * 5000}),
        "a token that is not there": (COMPLETIONS, some | {"prompt": [10**7]}),
        "a token below zero": (COMPLETIONS, some | {"prompt": [-1]}),
        "tokens below zero": (COMPLETIONS, some | {"max_tokens": -5}),
        "a hot temperature": (COMPLETIONS, some | {"temperature": "hot"}),
        "a cold temperature": (COMPLETIONS, some | {"temperature": -1}),
        "top_p of 5": (COMPLETIONS, some | {"top_p": 5}),
        "no sequences": (COMPLETIONS, some | {"n": -1}),
        "logprobs of thousands": (COMPLETIONS, some | {"logprobs": 5000}),
        "no messages": (CHAT, talk),
        "messages of text": (CHAT, talk | {"messages": "Hello"}),
        "messages of no role": (CHAT, talk | {"messages": [{"content": "Hello"}]}),
        "chat of a model that is not there": (CHAT, talk | {"model": "no", "messages": hello}),
        "chat of a hot temperature": (CHAT, talk | {"messages": hello, "temperature": "hot"}),
        "no such page": ("/v1/nothing", {}),
    }
    return wrong | {f"adapter: {name}": _load(path) for name, path in damaged.items()}


def hostile(wrong: dict[str, tuple[str, Any]]) -> Callable[[World, random.Random], None]:
    """A client that sends such requests."""

    def hostile(world: World, draw: random.Random) -> None:
        name = draw.choice(sorted(wrong))
        path, body = wrong[name]
        answer = ask(world.url, path, body)
        world.tally.add("hostile requests")
        if not 400 <= answer.status < 500:
            world.tally.fault("hostile", f"{name}: {answer.status} {answer.text}")
        time.sleep(draw.random() * 0.5)  # else most of the machine's time would be theirs

    return hostile
