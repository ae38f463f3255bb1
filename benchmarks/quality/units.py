"""Pieces of an experiment that run in several processes, each kept in a file of the work folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.quality.data import Data
from benchmarks.quality.sizes import Size

# Tokens a second of several trainings at once, as a share of what pretraining reached alone.
PACE = 0.75
SMALLEST_SHARE = 0.1  # of the steps, where time is short


@dataclass(frozen=True)
class Unit:
    """What a process needs to know.

    Attributes:
        experiment: its name.
        size: its.
        work: its folder.
        seed: of this piece.
        steps: of a LoRA of one domain; all other numbers of steps are multiples.
        deadline: nothing is begun after this time, in seconds of `time.time`.
    """

    experiment: str
    size: Size
    work: Path
    seed: int
    steps: int
    deadline: float

    @property
    def folder(self) -> Path:
        """Of what this seed makes."""
        return self.work / f"{self.experiment}-seed{self.seed}"


@cache
def corpus(size: Size, work: Path) -> Data:
    """The corpus, read once in a process."""
    return Data(size, work)


def keep(unit: Unit, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What `make` says, or what it said before; None after the deadline."""
    file = unit.folder / f"{name}.json"
    if file.is_file():
        return json.loads(file.read_text())
    if time.time() > unit.deadline:
        return None
    from benchmarks.quality.train import release

    begin = time.time()
    print(f"{time.strftime('%H:%M:%S')} seed {unit.seed} {name}", flush=True)
    unit.folder.mkdir(parents=True, exist_ok=True)
    try:
        found = make() | {"seed": unit.seed, "method": name}
    finally:
        release()
    found["task_seconds"] = time.time() - begin
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(file)
    return found


def plan_steps(unit: Unit, tokens: float) -> int:
    """How many steps there is time for; decided once and kept.

    Args:
        unit: any of the pieces; its folder has what pretraining says of this machine.
        tokens: of all pieces with all steps, in tokens trained on by a LoRA alone.
    """
    work, steps, seconds = unit.work, unit.size.steps, unit.deadline - time.time()
    file = work / f"{unit.experiment}-steps.json"
    if file.is_file():
        return json.loads(file.read_text())["steps"]
    pace = PACE * json.loads((work / "base.json").read_text())["tokens_per_s"]
    share = min(1.0, max(SMALLEST_SHARE, pace * seconds / tokens))
    content = {"steps": max(1, round(share * steps)), "of": steps, "seconds_left": seconds,
               "seconds_for_all_steps": tokens / pace}  # fmt: skip
    file.write_text(json.dumps(content))
    return content["steps"]


def ready() -> None:
    """Imports what pieces need, while there is something else to wait for."""
    import transformers  # noqa: F401

    import benchmarks.quality.requests  # noqa: F401


def warm(pool: Executor, jobs: int) -> None:
    """Starts the processes."""
    for _ in range(jobs if jobs > 1 else 0):
        pool.submit(ready)


def collect(
    pieces: dict[Future, str], say: Callable[[str], None], tell: Callable[[dict[str, Any]], str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """What pieces found, and what those that failed said.

    Args:
        pieces: their names.
        say: takes a line for people.
        tell: makes it of a finding.
    """
    found, failed = [], {}
    for piece in as_completed(pieces):
        name, error = pieces[piece], piece.exception()
        if error is not None:
            failed[name] = f"{type(error).__name__}: {error}"[:2000]
            say(f"{name} FAILED: {failed[name]}")
        elif (row := piece.result()) is not None:
            found.append(row)
            say(tell(row))
    return found, failed
