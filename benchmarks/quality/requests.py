"""Requests without a label: of one domain, such as change it half-way, and chat-templated ones.

All are blocks of equal length with labels. Of a chat-templated request the system prompt, the same
for all, and the marks of the template carry no loss: they are given, not predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.quality.data import Data
from benchmarks.quality.train import DEVICE, autocast

KINDS = ("plain", "switched", "chat")
SYSTEM_SHARE = 3 / 8  # of a chat-templated request
SAID_SHARE = 1 / 4  # of a block: what a classifier in front gets to read of the request's text
PARTS = 8  # of a block, whose losses are kept apart
IGNORED = -100


@dataclass(frozen=True)
class Requests:
    """Requests of one kind and one (first) domain.

    Attributes:
        ids: int64 [N, length].
        domains: int64 [N, 2], the place of the domain of the first and of the second half.
        start: where the request's own text begins.
    """

    ids: torch.Tensor
    domains: torch.Tensor
    start: int = 0

    @property
    def labels(self) -> torch.Tensor:
        """The ids, IGNORED before the request's own text."""
        labels = self.ids.clone()
        labels[:, : self.start] = IGNORED
        return labels

    def said(self) -> torch.Tensor:
        """What is known of a request before it is answered, without the template."""
        return self.ids[:, self.start :][:, : max(1, int(SAID_SHARE * self.ids.shape[1]))]

    def split(self, count: int) -> list[Requests]:
        """In batches."""
        parts = zip(self.ids.split(count), self.domains.split(count))
        return [Requests(ids, domains, self.start) for ids, domains in parts]


class Desk:
    """Makes requests of the corpus.

    Attributes:
        data: the corpus.
        head: the template up to the request's text, [tokens].
    """

    def __init__(self, data: Data, work: Path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(work / "base", trust_remote_code=False)
        self.data = data
        system, user = (
            torch.tensor(tokenizer.encode(text, add_special_tokens=False))
            for text in ("<|system|>\n", "\n<|user|>\n")
        )
        # English where there is some: of text that nothing is trained on.
        source = data.tokens["prose" if "prose" in data.domains else data.domains[0], "valid"]
        room = max(1, int(SYSTEM_SHARE * data.size.length) - len(system) - len(user))
        self.head = torch.cat([system, source[:room].long(), user])[: data.size.length // 2]

    def shape(self, kind: str, first: torch.Tensor, second: torch.Tensor, domains: Any) -> Requests:
        """Requests of blocks of text.

        Args:
            kind: of KINDS.
            first, second: int64 [N, length], text of the domain at first and of the later one.
            domains: int64 [N, 2], theirs.
        """
        if kind == "plain":
            return Requests(first, domains[:, [0, 0]])
        if kind == "switched":
            half = first.shape[1] // 2
            return Requests(torch.cat([first[:, :half], second[:, half:]], 1), domains)
        head = self.head.expand(len(first), -1)
        ids = torch.cat([head, first[:, : first.shape[1] - head.shape[1]]], 1)
        return Requests(ids, domains[:, [0, 0]], head.shape[1])

    def batch(
        self, count: int, rng: torch.Generator, kinds: tuple[str, ...] = KINDS
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels [count, length] to train on: kinds and domains at random."""
        data, made = self.data, []
        picked = torch.randint(len(kinds), (count,), generator=rng)
        domains = torch.randint(len(data.domains), (count, 2), generator=rng)
        for kind, own in ((kind, domains[picked == i]) for i, kind in enumerate(kinds)):
            if len(own):
                first, second = (
                    torch.cat([data.windows(data.domains[d], "adapt", 1, rng) for d in half])
                    for half in own.T.tolist()
                )
                made.append(self.shape(kind, first, second, own))
        return torch.cat([r.ids for r in made]), torch.cat([r.labels for r in made])

    def judged(self, split: str = "held", most: int | None = None) -> dict[str, list[Requests]]:
        """kind -> a set of requests for each (first) domain, the same each time."""
        data = self.data
        blocks = [data.judged(domain, split)[:most] for domain in data.domains]
        made: dict[str, list[Requests]] = {kind: [] for kind in KINDS}
        for a, first in enumerate(blocks):
            b = (a + 1) % len(blocks)
            count = min(len(first), len(blocks[b]))
            for kind in KINDS:
                domains = torch.tensor([[a, b]]).expand(count, -1)
                made[kind].append(self.shape(kind, first[:count], blocks[b][:count], domains))
        return made


Before = Callable[[Requests], None]


@torch.no_grad()
def judge(
    model: Any, requests: dict[str, list[Requests]], batch: int, before: Before | None = None
) -> dict[str, Any]:
    """kind -> "loss" (mean over domains), "domains" (of each), "parts" (of each PARTS-th).

    Args:
        model: in any mode.
        requests: as `Desk.judged` makes them.
        batch: requests at once.
        before: is told each batch, as moved to the device.
    """
    model.eval()
    found = {}
    for kind, sets in requests.items():
        losses, parts = [], []
        for own in sets:
            length = own.ids.shape[1] - 1
            total = torch.zeros(length, dtype=torch.double)
            for part in own.split(batch):
                part = Requests(part.ids.to(DEVICE), part.domains.to(DEVICE), part.start)
                if before is not None:
                    before(part)
                with autocast(model):
                    logits = model(input_ids=part.ids).logits[:, :-1]
                loss = cross_entropy(
                    logits.flatten(0, 1).float(), part.ids[:, 1:].flatten(), reduction="none"
                )
                total += loss.view(-1, length).sum(0).double().cpu()
            each = total[max(0, own.start - 1) :] / len(own.ids)
            losses.append(each.mean().item())
            parts.append([p.mean().item() for p in each.tensor_split(PARTS)])
        count = len(losses)
        found[kind] = {
            "loss": sum(losses) / count,
            "domains": losses,
            "parts": [sum(column) / count for column in zip(*parts)],
        }
    return found
