"""A result file of the experiment, by method; how two methods compare."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scores:
    """One method over its seeds.

    Attributes:
        about: its row: label, group, ranks.
        runs: a row per seed.
        decode: batch -> figures of `speed`, or empty.
    """

    about: dict[str, Any]
    runs: list[dict[str, Any]]
    decode: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        return self.about["method"]

    @property
    def label(self) -> str:
        return self.about["label"]

    def perplexities(self, domain: str | None = None) -> list[float]:
        """Of each seed: of a domain, or of the mean loss over domains."""
        return [math.exp(r["domains"][domain]["loss"] if domain else r["loss"]) for r in self.runs]

    def perplexity(self, domain: str | None = None) -> float:
        return statistics.mean(self.perplexities(domain))

    def accuracy(self) -> float:
        return statistics.mean(r["accuracy"] for r in self.runs)


@dataclass(frozen=True)
class Comparison:
    """Two methods, over the seeds that both have: the same seed means the same batches.

    Attributes:
        ours, other: mean perplexities over these seeds.
        gaps: of each seed, ours over the other's, less 1.
    """

    ours: float
    other: float
    gaps: tuple[float, ...]

    @property
    def gap(self) -> float:
        """Of the means."""
        return self.ours / self.other - 1


def compare(ours: Scores, other: Scores) -> Comparison | None:
    """None where no seed is common."""
    a, b = ({r["seed"]: math.exp(r["loss"]) for r in m.runs} for m in (ours, other))
    seeds = sorted(set(a) & set(b))
    if not seeds:
        return None
    means = (statistics.mean(values[s] for s in seeds) for values in (a, b))
    return Comparison(*means, tuple(a[s] / b[s] - 1 for s in seeds))


class Result:
    """The rows of a result file, by what they are.

    Attributes:
        methods: those with a run at least.
        missing: labels of the others.
        seeds: how many were wanted of each method.
        not_timed: method -> error, of those that failed in vLLM.
        failed: task -> error, of trainings.
    """

    def __init__(self, content: dict[str, Any]):
        self.content, rows = content, content["rows"]
        self.options = rows[0]["options"]
        (self.corpus,) = [r for r in rows if r.get("what") == "corpus"]
        (self.backbone,) = [r for r in rows if r.get("what") == "backbone"]
        timed = {r["method"]: r["decode"] for r in rows if r.get("what") == "speed"}
        speed = {name: figures for name, figures in timed.items() if "error" not in figures}
        self.not_timed = {n: f["error"] for n, f in timed.items() if "error" in f}
        every = [
            Scores(r, [x for x in rows if x.get("what") == "run" and x["method"] == r["method"]],
                   speed.get(r["method"], {}))
            for r in rows if r.get("what") == "method"
        ]  # fmt: skip
        self.methods = [m for m in every if m.runs]
        self.missing = [m.label for m in every if not m.runs]
        self.seeds = len(self.options["seeds"])
        self.failed = {r["task"]: r["error"] for r in rows if r.get("what") == "failed"}
        self.domains = list(self.corpus["counts"])

    def group(self, name: str) -> list[Scores]:
        return [m for m in self.methods if m.about["group"] == name]

    def best(self, group: str) -> Scores | None:
        """The lowest perplexity of a group, among those with the most seeds."""
        some = self.group(group)
        most = max((len(m.runs) for m in some), default=0)
        return min((m for m in some if len(m.runs) == most), key=Scores.perplexity, default=None)

    def of(self, name: str) -> Scores | None:
        return next((m for m in self.methods if m.name == name), None)
