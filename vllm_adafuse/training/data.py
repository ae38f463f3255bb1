"""Training texts: jsonl files to blocks of tokens, with errors that name file and line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.training.chat import tokens_of
from vllm_adafuse.training.forms import Talk, Text, understand
from vllm_adafuse.training.jsonl import SHAPES, Bad, read_objects

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # label of a token without loss, as in torch's cross entropy
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
    paths, examples = list(paths), []
    faults: dict[str, list[str]] = {}  # what is wrong -> where
    for path in paths:
        for number, value in read_objects(path):
            source = f"{path}:{number}"
            try:
                if isinstance(value, Bad):
                    raise value
                examples.append(_example(value, tokenizer, source))
            except Bad as e:
                faults.setdefault(str(e), []).append(source)
            if sum(map(len, faults.values())) == MAX_PROBLEMS:
                raise AdapterError("training data", [*_said(faults), "… (stopped looking here)"])
    if faults:
        raise AdapterError("training data", _said(faults))
    if not examples:
        raise AdapterError(
            "training data", [f"{', '.join(map(str, paths))}: no lines; expected {SHAPES}"]
        )
    return examples


def _said(faults: dict[str, list[str]]) -> list[str]:
    """One problem for each fault: where it is first, what it is, and where else."""
    return [
        f"{first}: {said}" + (f" (so are {places(others)})" if others else "")
        for said, (first, *others) in faults.items()
    ]


def _example(value: dict[str, Any], tokenizer: PreTrainedTokenizerBase, source: str) -> Example:
    form = understand(value, chat=tokenizer.chat_template is not None)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if isinstance(form, Text):
        ids = tokenizer(form.text)["input_ids"] + end
        return Example(tuple(ids), (True,) * len(ids), source)
    if isinstance(form, Talk):
        ids, learn = tokens_of(form, tokenizer)
        return Example(tuple(ids), tuple(learn), source)
    # Apart, as a server tokenizes a prompt before it knows the completion.
    prompt = tokenizer(form.prompt)["input_ids"]
    completion = tokenizer(form.completion, add_special_tokens=False)["input_ids"]
    labels = (False,) * len(prompt) + (True,) * (len(completion) + len(end))
    return Example(tuple(prompt + completion + end), labels, source)


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
