"""Experiments of pieces (composed, together): text, backbone, pieces, result file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
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
END_SECONDS = 15  # that the last pieces, begun before, take beyond the deadline


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
        units = [Unit(size, work, seed, size.steps, deadline) for seed in size.seeds]
        steps = experiment.steps_of(units)
        say(f"{steps} steps of {size.steps}, {deadline - time.time():.0f} s left")
        units = [dataclasses.replace(u, steps=steps) for u in units]
        rows, failed, done, report = experiment.experiment(units, pool, say)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    name = experiment.__name__.rsplit(".", 1)[-1]
    options = {"size": args.size, "models": [f"llama-{args.size}"], "complete": done,
               **dataclasses.asdict(size), "steps": steps}  # fmt: skip
    content: list[dict[str, Any]] = [
        {"options": options}, {"what": "corpus", **data.info}, {"what": "backbone", **base},
        *({"what": "run", **row} for row in rows),
        *({"what": "failed", "task": task, "error": error} for task, error in failed.items()),
    ]  # fmt: skip
    path = record.save(name, content, args.out, args.commit)
    print(report, flush=True)
    if not done:
        say("not all is done; call again to go on")
    print(json.dumps({"saved": str(path)}), flush=True)
    return 0 if done else NOT_DONE
