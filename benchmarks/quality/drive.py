"""Experiments of pieces (composed, together): text, backbone, pieces, result file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import record
from benchmarks.quality.data import CORPUS_FILE, Data, prepare
from benchmarks.quality.pool import open_executor
from benchmarks.quality.sizes import SIZES
from benchmarks.quality.train import pretrain, release
from benchmarks.quality.units import Unit, warm

NOT_DONE = 3
PRETRAIN_SHARE = 0.27  # of --minutes, at most
END_SECONDS = 30  # that the last pieces, begun before, take beyond the deadline
KEEP_SECONDS = 20  # between two copies of the result so far


def drive(args: argparse.Namespace, experiment: ModuleType, say: Callable[[str], None]) -> int:
    """Runs an experiment as far as --minutes go, and writes its result file in any case.

    Args:
        args: of the command line.
        experiment: a module with `RECIPE`, `steps_of` and `experiment`.
        say: takes a line for people.

    Returns:
        0, or NOT_DONE if something is left to do.
    """
    size, work = SIZES[args.size], args.work
    if args.seeds:
        size = dataclasses.replace(size, seeds=args.seeds)
    deadline = time.time() + 60 * args.minutes - END_SECONDS
    work.mkdir(parents=True, exist_ok=True)
    if not (work / CORPUS_FILE).is_file():
        say("gathering text")
        recipe = dataclasses.replace(experiment.RECIPE, text=args.text, only=args.domains or ())
        prepare(size, work, args.roots, recipe)
    data = Data(size, work)
    for domain, parts in data.info["counts"].items():
        said = ", ".join(f"{part} {n['bytes']:,}" for part, n in parts.items())
        say(f"text {domain}: bytes {said}")
    if args.gather:
        return 0
    pool = open_executor(work, args.jobs)
    try:
        warm(pool, args.jobs)
        if not (work / "base.json").is_file():
            say("pretraining the backbone")
            seconds = PRETRAIN_SHARE * 60 * args.minutes if args.minutes < 1e6 else None
            pretrain(size, data, work, seconds)
            release()
        base = json.loads((work / "base.json").read_text())
        say(f"backbone: {base['parameters']:,} parameters, {base['steps']} steps, "
            f"{base['tokens_per_s']:,.0f} tokens/s, perplexity {math.exp(base['loss']):.3f}")  # fmt: skip
        name = experiment.__name__.rsplit(".", 1)[-1]
        units = [Unit(name, size, work, seed, size.steps, deadline) for seed in size.seeds]
        steps = experiment.steps_of(units)
        say(f"{steps} steps of {size.steps}, {deadline - time.time():.0f} s left")
        units = [dataclasses.replace(u, steps=steps) for u in units]
        file = _File(args, name, [
            {"options": {"size": args.size, "models": [f"llama-{args.size}"], "complete": False,
                         **dataclasses.asdict(size), "steps": steps}},
            {"what": "corpus", **data.info}, {"what": "backbone", **base},
        ])  # fmt: skip

        def heard(text: str) -> None:
            say(text)
            if time.time() - file.saved > KEEP_SECONDS:
                found = [json.loads(path.read_text())
                         for u in units for path in sorted(u.folder.glob("*.json"))]  # fmt: skip
                file.save([row for row in found if "plain" in row], {})

        rows, failed, done, report = experiment.experiment(units, pool, heard)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    file.head[0]["options"]["complete"] = done
    path = file.save(rows, failed)
    print(report, flush=True)
    if not done:
        say("not all is done; call again to go on")
    print(json.dumps({"saved": str(path)}), flush=True)
    return 0 if done else NOT_DONE


class _File:
    """The result file, replaced by each later state of it.

    Attributes:
        head: rows before those of pieces.
        saved: when it was written last, in seconds of `time.time`.
    """

    def __init__(self, args: argparse.Namespace, name: str, head: list[dict[str, Any]]):
        self.args, self.name, self.head = args, name, head
        self.path: Path | None = None
        self.saved = time.time()

    def save(self, rows: list[dict[str, Any]], failed: dict[str, str]) -> Path:
        """Writes it and returns its path."""
        content = [
            *self.head, *({"what": "run", **row} for row in rows),
            *({"what": "failed", "task": task, "error": error} for task, error in failed.items()),
        ]  # fmt: skip
        self.path = record.save(
            self.name, content, self.args.out, self.args.commit, path=self.path
        )
        self.saved = time.time()
        return self.path
