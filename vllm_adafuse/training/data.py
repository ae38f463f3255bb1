"""Training texts: jsonl files to blocks of tokens, with errors that name file and line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm_adafuse.config import show
from vllm_adafuse.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # label of a token without loss, as in torch's cross entropy
SHAPES = (
    '{"text": …}, {"messages": [{"role": …, "content": …}, …]} or '
    '{"prompt": …, "completion": …}'
)
MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Example:
    """One line of a file.

    Attributes:
        ids: its tokens.
        learn: for each token, whether it has loss.
        source: "file:line".
    """

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    source: str = field(default="", compare=False)


def read_jsonl(paths: Iterable[str | Path], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Reads and tokenizes files of JSON objects, one per line; empty lines are skipped.

    Args:
        paths: the files.
        tokenizer: of the backbone.

    Raises:
        AdapterError: with file and line of the first faulty lines.
    """
    examples, problems = [], []
    for path in paths:
        try:
            content = Path(path).read_bytes().split(b"\n")
        except OSError as e:
            raise AdapterError("training data", [f"{path}: cannot be read ({e.strerror})"]) from e
        for number, line in enumerate(content, 1):
            if not line.strip():
                continue
            try:
                made = _example(_parse(line), tokenizer)
                examples.append(replace(made, source=f"{path}:{number}"))
            except _Bad as e:
                problems.append(f"{path}:{number}: {e}")
            if len(problems) == MAX_PROBLEMS:
                raise AdapterError("training data", problems + ["… (stopped looking here)"])
    if problems:
        raise AdapterError("training data", problems)
    if not examples:
        raise AdapterError(
            "training data", [f"{', '.join(map(str, paths))}: no lines; expected {SHAPES}"]
        )
    return examples


class _Bad(ValueError):
    """What is wrong with a line."""


def _parse(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise _Bad(f"is not UTF-8 ({e.reason} at byte {e.start}); save the file as UTF-8") from e
    except (ValueError, RecursionError) as e:
        raise _Bad(f"is not JSON ({e}); expected one object per line, {SHAPES}") from e
    if not isinstance(value, dict):
        raise _Bad(f"holds {show(value)}, expected an object, {SHAPES}")
    return value


def _string(value: dict[str, Any], key: str) -> str:
    if not isinstance(value[key], str) or not value[key]:
        raise _Bad(f"`{key}` is {show(value[key])}, expected a text that is not empty")
    return value[key]


def _example(value: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Example:
    kinds = [kind for kind in (("text",), ("messages",), ("prompt", "completion"))
             if any(key in value for key in kind)]  # fmt: skip
    if len(kinds) != 1:
        keys = ", ".join(show(key)[1:-1] for key in value) or "none"
        raise _Bad(f"has the keys {keys}; expected exactly one of {SHAPES}")
    if missing := [key for key in kinds[0] if key not in value]:
        raise _Bad(f"`{missing[0]}` is missing; expected {SHAPES}")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if kinds[0] == ("text",):
        ids = tokenizer(_string(value, "text"))["input_ids"] + end
        return Example(tuple(ids), (True,) * len(ids))
    if kinds[0] == ("messages",):
        return _chat(value["messages"], tokenizer)
    # Apart, as a server tokenizes a prompt before it knows the completion.
    prompt = tokenizer(_string(value, "prompt"))["input_ids"]
    completion = tokenizer(_string(value, "completion"), add_special_tokens=False)["input_ids"]
    learn = (False,) * len(prompt) + (True,) * (len(completion) + len(end))
    return Example(tuple(prompt + completion + end), learn)


def _chat(messages: Any, tokenizer: PreTrainedTokenizerBase) -> Example:
    """A conversation by the tokenizer's chat template; loss on what the assistant says."""
    if tokenizer.chat_template is None:
        raise _Bad(
            "`messages` needs a tokenizer with a chat template, and this one has none; write the "
            "text yourself as `text`, or as `prompt` and `completion`"
        )
    fine = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
        for m in messages
    )  # fmt: skip
    if not fine:
        raise _Bad(f"`messages` is {show(messages)}, expected a list of objects with the texts "
                   "`role` and `content`")  # fmt: skip
    if all(m["role"] != "assistant" for m in messages):
        raise _Bad("`messages` has none of role assistant; there is nothing to learn")

    def render(upto: int, ask: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages[:upto], tokenize=False, add_generation_prompt=ask
            )
        except Exception as e:  # templates are programs of the tokenizer's makers
            raise _Bad(f"the chat template refuses `messages` ({e})") from e

    text, spans = render(len(messages), False), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i:
            before, after = render(i, True), render(i + 1, False)
            if not (text.startswith(before) and text.startswith(after)):
                raise _Bad("the chat template writes earlier turns anew when later ones follow; "
                           "end `messages` at the assistant's first reply, or use `prompt` and "
                           "`completion`")  # fmt: skip
            spans.append((len(before), len(after)))
    if not spans:
        raise _Bad("`messages` begins with the assistant's only reply; put what it answers first")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learn = tuple(
        any(start < last and first <= start for first, last in spans)
        for start, _ in encoded["offset_mapping"]
    )
    return Example(tuple(encoded["input_ids"]), learn)


def places(sources: Iterable[str], most: int = 12) -> str:
    """a.jsonl:1, a.jsonl:2, a.jsonl:4, b.jsonl:7 -> "a.jsonl:1-2, 4, b.jsonl:7".

    Args:
        sources: "file:line" each, in any order.
        most: ranges to show.
    """
    ends: list[list[Any]] = []  # file, first and last line
    for path, line in sorted({(s.rpartition(":")[0], int(s.rpartition(":")[2])) for s in sources}):
        if ends and ends[-1][0] == path and ends[-1][2] == line - 1:
            ends[-1][2] = line
        else:
            ends.append([path, line, line])
    shown, last = [], None
    for path, a, b in ends[:most]:
        shown.append(("" if path == last else f"{path}:") + (f"{a}" if a == b else f"{a}-{b}"))
        last = path
    return ", ".join(shown) + (f" and {len(ends) - most} more" if len(ends) > most else "")


def split(examples: Sequence[Example], held_out: float) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, by a hash of their tokens: equal lines stay together.

    Args:
        examples: all.
        held_out: share to hold out, from 0 to below 1; above 0, at least one example.

    Raises:
        AdapterError: nothing is left to train on.
    """
    if not held_out:
        return list(examples), []

    def place(example: Example) -> int:
        return int.from_bytes(hashlib.sha256(repr(example.ids).encode()).digest()[:8], "big")

    order = sorted({place(example) for example in examples})
    cut = set(order[: max(1, round(len(order) * held_out))])
    kept = [e for e in examples if place(e) not in cut]
    if not kept:
        raise AdapterError(
            "training data",
            [f"{len(order)} different lines, of which none is left after holding out; give more, "
             "or hold out 0"],
        )  # fmt: skip
    return kept, [e for e in examples if place(e) in cut]


@dataclass
class _Row:
    """A block before it is filled up: its tokens, labels, and which examples are in it."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    examples: list[int] = field(default_factory=list)
    learnt: list[int] = field(default_factory=list)

    def add(self, example: int, ids: list[int], labels: list[int]) -> None:
        """Appends a part of an example."""
        if any(t != IGNORE for t in labels[0 if self.ids else 1 :]):
            self.learnt.append(example)
        self.examples.append(example)
        self.ids += ids
        self.labels += labels


def _fill(examples: Sequence[Example], length: int, pack: bool) -> list[_Row]:
    rows: list[_Row] = []
    for number, example in enumerate(examples):
        ids = list(example.ids)
        labels = [t if learn else IGNORE for t, learn in zip(ids, example.learn)]
        labels[0] = IGNORE
        if not pack:
            rows.append(_Row())
            rows[-1].add(number, ids[:length], labels[:length])
            continue
        while ids:
            if not rows or len(rows[-1].ids) == length:
                rows.append(_Row())
            room = length - len(rows[-1].ids)
            rows[-1].add(number, ids[:room], labels[:room])
            ids, labels = ids[room:], labels[room:]
    return rows


class Blocks(torch.utils.data.Dataset):
    """Examples as blocks of at most `length` tokens.

    An item holds int64 input_ids, labels and attention_mask, [length]. An example's first token
    has no loss: nothing of its own comes before it.

    Attributes:
        left_out: blocks without a token with loss, which are not there.
        unlearnt: sources of the examples that these blocks teach nothing of.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        length: int,
        pack: bool,
        pad: int,
        every: bool = False,
    ):
        """
        Args:
            examples: what to learn.
            length: tokens of a block.
            pack: fill blocks with one example after the other; else one example a block, cut
                at `length`.
            pad: token id that fills up the rest.
            every: keep blocks without a token with loss too.
        """
        rows = _fill(examples, length, pack)
        kept = [row for row in rows if every or any(t != IGNORE for t in row.labels[1:])]
        self.left_out = len(rows) - len(kept)
        taught = {source for row in kept for source in row.learnt}
        self.unlearnt = [e.source for i, e in enumerate(examples) if i not in taught]
        self.sources = [[examples[i].source for i in row.examples] for row in kept]
        count = len(kept)
        self.ids = torch.full((count, length), pad)
        self.labels = torch.full((count, length), IGNORE)
        self.mask = torch.zeros((count, length), dtype=torch.long)
        for i, row in enumerate(kept):
            self.ids[i, : len(row.ids)] = torch.tensor(row.ids)
            self.labels[i, : len(row.ids)] = torch.tensor(row.labels)
            self.mask[i, : len(row.ids)] = 1

    @property
    def tokens(self) -> int:
        """Tokens with loss."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def sources_of(self, ids: torch.Tensor) -> list[str]:
        """Sources of the examples in some of these blocks.

        Args:
            ids: int64 [batch, length], blocks' input_ids.
        """
        found: dict[str, None] = {}
        for row in ids.cpu():
            for i in (self.ids == row).all(1).nonzero().flatten().tolist():
                found |= dict.fromkeys(self.sources[i])
        return list(found)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.labels[i], "attention_mask": self.mask[i]}
