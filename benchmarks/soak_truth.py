"""What answers of a soaked server must say: every content in plain transformers and torch, and which
contents a name has had while a request was under way."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from vllm_adafuse.format.pretrained import load_tokenizer
from vllm_adafuse.offline import reference

BASE = "base"  # the content, and the model's name, of requests without an adapter


def merged_lora(base: Path, lora: Path, **options: Any):
    """A backbone with a PEFT LoRA's B A alpha / r added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, **options).eval()
    config = json.loads((lora / "adapter_config.json").read_text())
    tensors = load_file(lora / "adapter_model.safetensors", device=str(model.device))
    scale = config["lora_alpha"] / config["r"]
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    with torch.no_grad():
        for name in (n for n in tensors if n.endswith(suffix)):
            weight = model.get_parameter(name.removeprefix(prefix).replace(suffix, ".weight"))
            a, b = (tensors[name.replace("lora_A", f"lora_{side}")] for side in "AB")
            weight += scale * (b.to(weight.dtype) @ a.to(weight.dtype))
    return model


class Truth:
    """References of all contents, in float32.

    Args:
        base: the backbone's directory.
        contents: adapter directories by content; the base needs none.
        tolerance: nats by which a token may be less likely than the likeliest one: a near tie.
        device: that the references are on.

    Attributes:
        tokens: compared so far, the repeated ones included.
        worst: nats that a served token was less likely than the likeliest, of right answers.
        ties: different tokens that were right and not the likeliest.
        mistaken: answers held against a content that is not theirs, and found right all the same.
        held: answers that were held so.
    """

    def __init__(self, base: Path, contents: dict[str, Path], tolerance: float, device: str):
        options = {"dtype": torch.float32, "device_map": device}
        self.tokenizer = load_tokenizer(base)
        self.models = {
            BASE: AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, **options)
        }
        for content, path in contents.items():
            config = json.loads((path / "adapter_config.json").read_text())
            load = merged_lora if config.get("peft_type") == "LORA" else reference.load
            self.models[content] = load(base, path, **options)
        self.tolerance, self.lock = tolerance, threading.Lock()
        self.known: dict[tuple, float] = {}
        self.tokens, self.worst, self.ties, self.mistaken, self.held = 0, 0.0, 0, 0, 0
        self.draw = random.Random(0)

    def prompt_ids(self, text: str, chat: bool) -> list[int]:
        """Token ids of a prompt as a server makes them."""
        if not chat:
            return self.tokenizer(text)["input_ids"]
        message = [{"role": "user", "content": text}]
        shown = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer(shown, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def loss(self, content: str, prompt: Sequence[int], tokens: Sequence[int]) -> float:
        """The most nats by which one of the tokens is less likely than the likeliest; one at a
        time, as the references keep a batch's gates."""
        key = (content, tuple(prompt), tuple(tokens))
        if key not in self.known:
            model = self.models[content]
            ids = torch.tensor([[*prompt, *tokens]], device=model.device)
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
            lost = logits.amax(-1) - chosen
            self.known[key] = float(lost.amax())
            if self.known[key] <= self.tolerance:
                self.ties += int((lost > 0).sum())
        return self.known[key]

    def losses(self, prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, float]:
        """`loss` of every content; {} of no tokens."""
        with self.lock:
            return {content: self.loss(content, prompt, tokens) for content in self.models if tokens}

    def fits(self, contents: set[str], prompt: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether greedy tokens are those of one of the contents.

        Args:
            contents: that the request may have had.
            prompt: token ids.
            tokens: of the answer; none is wrong.
        """
        if not tokens:
            return False
        with self.lock:
            losses = [self.loss(content, prompt, tokens) for content in sorted(contents)]
            best = min(losses, default=math.inf)
            if best > self.tolerance:
                return False
            self.tokens, self.worst = self.tokens + len(tokens), max(self.worst, best)
            others = sorted(set(self.models) - contents)
            if others and self.draw.random() < 0.1:  # would another content have been found out?
                other = self.draw.choice(others)
                self.held += 1
                self.mistaken += self.loss(other, prompt, tokens) <= self.tolerance
            return True


class Names:
    """What each name means, and meant while a request was under way. None: nothing, a 404.

    Args:
        meanings: a content for each name.
        steady: names that are never changed.
    """

    def __init__(self, meanings: dict[str, str | None], steady: Sequence[str]):
        self.lock, self.steady = threading.Lock(), sorted(steady)
        # name -> [content, until]: inf while it may be had.
        self.spans: dict[str, list[list[Any]]] = {
            name: [[content, math.inf]] for name, content in meanings.items()
        }

    def may_become(self, name: str, content: str | None) -> None:
        """A change is about to be asked for."""
        with self.lock:
            self.spans[name].append([content, math.inf])

    def settle(self, name: str, done: bool) -> None:
        """The change was made, or refused: of what may be had one content stays."""
        with self.lock:
            now, open_ones = time.monotonic(), [s for s in self.spans[name] if s[1] == math.inf]
            for span in open_ones[:-1] if done else open_ones[1:]:
                span[1] = now

    def possible(self, name: str, since: float) -> set[str | None]:
        """What a request that was sent at a monotonic time may have had up to now."""
        with self.lock:
            return {content for content, until in self.spans[name] if until >= since}

    def changing(self, name: str, since: float) -> bool:
        """Whether the name has had more than one meaning since then."""
        with self.lock:
            return sum(until >= since for _, until in self.spans[name]) > 1
