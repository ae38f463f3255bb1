"""What `benchmarks.engine` measures: models, engines and sizes; and what their caches must hold."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_adafuse.cli.cmd_random import integers

from benchmarks.prompts import OUTPUTS, PROMPTS, everyday

SHAPES = {
    "llama-2-7b": ("LlamaForCausalLM", 4096, 11008, 32, 32, 32, 32000),
    "llama-3-8b": ("LlamaForCausalLM", 4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": ("LlamaForCausalLM", 8192, 28672, 80, 64, 8, 128256),
    "llama-3.2-3b": ("LlamaForCausalLM", 3072, 8192, 28, 24, 8, 128256),
    "mistral-7b": ("MistralForCausalLM", 4096, 14336, 32, 32, 8, 32000),
    "llama-2-13b": ("LlamaForCausalLM", 5120, 13824, 40, 40, 40, 32000),
    "qwen2.5-7b": ("Qwen2ForCausalLM", 3584, 18944, 28, 28, 4, 152064),
    "qwen3-8b": ("Qwen3ForCausalLM", 4096, 12288, 36, 32, 8, 151936),
    "qwen2.5-0.5b": ("Qwen2ForCausalLM", 896, 4864, 24, 14, 2, 151936),
    "tiny": ("LlamaForCausalLM", 128, 256, 2, 4, 2, 1000),
}

BLOCK = 16  # tokens; what vLLM gives a sequence of the cache at a time
Size = tuple[str, int, int]  # decode, prefill or mixed, sequences, tokens of each prompt (mixed: 0)

GRANITE = ("granite", "granite_bare")
# Our engines, and keys of their adapters; of those that requests name.
OURS = {
    "adafuse": {}, "layer_wise": {"routing": "layer_wise"}, "context": {"router_context": "mean"},
}  # fmt: skip
OURS |= {"pages": OURS["adafuse"], "pages_context": OURS["context"]}
PAGES = ("pages", "pages_context")


@dataclass
class Options:
    """What to measure; checked at construction."""

    model: str = "llama-2-7b"
    layers: int | None = None
    engines: list[str] = field(default_factory=lambda: ["stock", "adafuse"])
    batches: list[int] = field(default_factory=lambda: [1, 8, 32, 128])
    prefill: list[tuple[int, int]] = field(default_factory=lambda: [(16, 1000)])
    prompt: int = 128
    steps: tuple[int, int] = (8, 136)
    repeats: int = 5
    experts: int = 8
    top_k: int = 2
    r: int = 16
    dtype: str = "bfloat16"
    quantization: str | None = None
    memory: float = 0.4
    cache: float | None = None
    group: int | None = None
    tp: int = 1
    mixed: int = 0
    ids: list[str] = field(default_factory=lambda: ["uniform"])
    text_ids: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.model not in SHAPES:
            raise ValueError(f"model is {self.model}, expected one of {', '.join(SHAPES)}")
        for kind in self.engines:
            self.mixture(kind)
        if len(set(self.engines)) < len(self.engines):
            raise ValueError(f"engines has {', '.join(self.engines)}, expected each one once")
        if self.group is not None and self.group < 2:
            raise ValueError(f"group is {self.group}, expected at least 2: an engine and the first")
        check_ids(self.ids, self.text_ids)
        if large := too_large(vars(self)):
            size, need = max(large.items(), key=lambda item: item[1])
            raise ValueError(
                f"cache is {self.cache:g} GiB, expected at least {math.ceil(100 * need) / 100:g}: "
                f"the keys and values of {name_of(size)}, all sequences at once"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return longest(vars(self))

    @property
    def groups(self) -> list[list[str]]:
        """Which engines live at the same time; the first is in every group."""
        first, others = self.engines[:1], self.engines[1:]
        size = (self.group or len(self.engines)) - 1
        return [first + others[at : at + size] for at in range(0, len(others), size)] or [first]

    def mixture(self, kind: str) -> tuple[int, int, int] | None:
        """(E, r, k) of an engine of ours; None for the others.

        Raises:
            ValueError: not an engine's name.
        """
        if kind in ("stock", "lora", *GRANITE):
            return None
        if kind in OURS:
            return self.experts, self.r, self.top_k
        name, _, numbers = kind.partition(":")
        parts = numbers.split("/")
        if name not in OURS or len(parts) != 3 or not all(part.isdigit() for part in parts):
            raise ValueError(
                f"engine {kind}: expected stock, lora, granite, {', '.join(OURS)}, or one of the "
                f"last {len(OURS)} with experts, rank and top-k, as in pages:E/r/k"
            )
        return int(parts[0]), int(parts[1]), int(parts[2])


def shapes(text: str) -> list[tuple[int, int]]:
    """"16x1000,1x512" -> [(16, 1000), (1, 512)]: prompts, and the tokens of each.

    Raises:
        argparse.ArgumentTypeError: of another form.
    """
    parts = [part.split("x") for part in text.split(",")]
    if not all(len(part) == 2 and all(n.isdigit() and int(n) for n in part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: expected PROMPTSxTOKENS,… such as 16x1000,1x512")
    return [(int(count), int(length)) for count, length in parts]


def check_ids(kinds: list[str], text_ids: str | None) -> None:
    """Whether token ids of these kinds are to be had.

    Raises:
        ValueError: a kind is unknown, or there is no file for real text.
    """
    if not kinds or (unknown := set(kinds) - {"uniform", "text"}):
        raise ValueError(f"ids has {', '.join(unknown) if kinds else 'nothing'}, "
                         "expected uniform, text or both")  # fmt: skip
    if "text" in kinds and text_ids is None:
        raise ValueError("ids has text: name the file with --text-ids; "
                         "python -m benchmarks.prompts writes one")  # fmt: skip


def sizes(options: Mapping[str, Any]) -> list[Size]:
    """What a run of these options measures, in order."""
    decode = [("decode", batch, options["prompt"]) for batch in options["batches"]]
    found = decode + [("prefill", count, length) for count, length in options["prefill"]]
    return found + ([("mixed", options["mixed"], 0)] if options.get("mixed") else [])


def name_of(size: Size) -> str:
    what, count, length = size
    return f"{count} mixed requests" if what == "mixed" else f"{what} {count} x {length}"


def longest(options: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence of a run of these options, and a few to spare."""
    found = [length for _, length in options["prefill"]]
    found += [options["prompt"] + options["steps"][1]] if options["batches"] else []
    found += [PROMPTS[-1] + OUTPUTS[-1]] if options.get("mixed") else []
    return max(found) + 8


def too_large(options: Mapping[str, Any]) -> dict[Size, float]:
    """Sizes that the cache of a run does not hold, and the GiB of keys and values that they need.

    Some of their sequences would wait for others, or be thrown out and computed again: no time of
    such a step is one of its size. None where vLLM chooses the cache itself.
    """
    if (cache := options.get("cache")) is None:
        return {}
    return {size: need for size, need in cache_needs(options).items() if need > cache}


def cache_needs(options: Mapping[str, Any]) -> dict[Size, float]:
    """GiB of keys and values of each size of a run, all sequences at once."""
    _, hidden, _, layers, heads, kv_heads, _ = SHAPES[options["model"]]
    width = 4 if options["dtype"] in ("float", "float32") else 2  # bytes
    a_token = 2 * (options["layers"] or layers) * kv_heads * (hidden // heads) * width
    a_token /= options.get("tp", 1)
    found = {}
    for size in sizes(options):
        what, count, length = size
        if what == "mixed":
            tokens = [sum(request) for request in everyday(count)]
        else:
            tokens = [length + (options["steps"][1] if what == "decode" else 8)] * count
        found[size] = sum(math.ceil(n / BLOCK) for n in tokens) * BLOCK * a_token / (1 << 30)
    return found


def add_work(parser: argparse.ArgumentParser, batches: str, prefill: str) -> None:
    """The options that say what is measured, with the defaults of two of them."""
    add = parser.add_argument
    add("--batches", default=batches, type=integers)
    add("--prefill", default=prefill, type=shapes, help="PROMPTSxTOKENS,…")
    add("--mixed", default=0, type=int, metavar="N", help="also N requests of everyday lengths")
    add("--prompt", default=128, type=int, help="tokens before decoding")
    add("--steps", default="8,136", type=integers, help="short and long generation")
    add("--repeats", default=5, type=int)
    add("--ids", default=["uniform"], type=lambda t: t.split(","), help="uniform, text or both")
    add("--text-ids", help="ids of real text, for text: see benchmarks.prompts")
