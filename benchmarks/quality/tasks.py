"""The trainings of the experiment: which there are, in what order, at which rate, how long."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import Method, methods
from benchmarks.quality.sizes import Size

TUNE_SHARE = 0.4  # of the steps of a run, to choose a rate
FEWEST = 0.3  # of the steps of a size, where time is limited
DISTILLED_COST = 1.6  # of a step, times that of the teacher
PACKING = 1.15  # workers do not end at the same time


@dataclass(frozen=True)
class Task:
    """One training: to choose a rate ("tune", judged on other text), or to be reported ("run").

    Attributes:
        kind: see above.
        method: its name.
        seed: of weights and batches.
        rate: index of the choice of rates to try; None in a run, which takes the best.
    """

    kind: str
    method: str
    seed: int
    rate: int | None = None

    @property
    def name(self) -> str:
        return f"{self.method}-s{self.seed}" + ("" if self.rate is None else f"-r{self.rate}")

    def file(self, work: Path) -> Path:
        """Its figures, once it is finished."""
        return work / ("runs" if self.kind == "run" else "tune") / f"{self.name}.json"

    def failure(self, work: Path) -> Path:
        """Why it is not, once it failed twice."""
        return work / "failed" / f"{self.kind}-{self.name}.txt"

    def over(self, work: Path) -> bool:
        return self.file(work).exists() or self.failure(work).exists()


class Plan:
    """The tasks of a work folder, as far as they are known there.

    Attributes:
        size, names, work: of the experiment.
        methods: name -> method, of those to compare.
    """

    def __init__(self, size: Size, names: list[str], work: Path):
        self.size, self.names, self.work = size, names, work
        self.methods = {name: methods(size)[name] for name in names}

    def _ordered(self, late: bool) -> list[Method]:
        some = [m for m in self.methods.values() if bool(m.teacher) == late]
        return sorted(some, key=lambda m: not m.main)  # what matters most goes first

    def choices(self, method: Method) -> dict[int, tuple[float, float]]:
        """Index -> (rate, that of the routers as its multiple), to try."""
        factor = self.size.full_rate if method.mixture is None else 1.0
        routed = method.mixture is not None and method.mixture.num_experts > 1
        made: dict[int, tuple[float, float]] = {}
        for i, (rate, routers) in enumerate(self.size.choices):
            if routed or rate * factor not in [r for r, _ in made.values()]:
                made[i] = rate * factor, routers
        return made

    def tune(self, late: bool) -> list[Task]:
        """To choose rates: every method with one choice, then with the next.

        Args:
            late: of what is distilled, which has to wait for its teachers.
        """
        count = len(self.size.choices)
        return [
            Task("tune", m.name, self.size.seeds[0], i)
            for i in range(count if count > 1 else 0)
            for m in self._ordered(late)
            if i in self.choices(m)
        ]

    def runs(self, late: bool) -> list[Task]:
        return [Task("run", m.name, seed) for m in self._ordered(late) for seed in self.size.seeds]

    def ready(self, task: Task) -> bool:
        """Whether what it needs is finished."""
        method = self.methods[task.method]
        if not method.teacher:
            return True
        if not Task("run", method.teacher, task.seed).file(self.work).exists():
            return False
        return task.kind == "tune" or all(t.over(self.work) for t in self.tune(True))

    def tried(self, late: bool) -> list[int]:
        """Indices of choices that every method has tried: none is tuned more than others."""
        tasks = self.tune(late)
        return [
            i for i in range(len(self.size.choices))
            if tasks and all(t.over(self.work) for t in tasks if t.rate == i)
        ]  # fmt: skip

    def rate(self, task: Task) -> tuple[float, float]:
        """(rate, that of the routers as its multiple); in a run those with the lowest loss, the
        first if none was tried."""
        method = self.methods[task.method]
        choices = self.choices(method)
        if task.rate is not None:
            return choices[task.rate]
        losses = {}
        for i in self.tried(bool(method.teacher)):
            file = Task("tune", method.name, self.size.seeds[0], i).file(self.work)
            loss = json.loads(file.read_text())["loss"] if file.exists() else math.inf
            if math.isfinite(loss):
                losses[i] = loss
        return choices[min(losses, key=losses.get) if losses else 0]

    def steps(self, task: Task) -> int:
        """Of its training; see `choose_steps`."""
        if task.kind == "tune":
            return max(1, round(TUNE_SHARE * self.size.steps))
        file = self.work / "plan.json"
        return json.loads(file.read_text())["steps"] if file.exists() else self.size.steps

    def _paces(self) -> dict[str, float]:
        """Seconds per step of each method, as far as one of its tasks is finished."""
        paces: dict[str, list[float]] = {}
        for folder in ("tune", "runs"):
            for file in (self.work / folder).glob("*.json"):
                row = json.loads(file.read_text())
                paces.setdefault(row["method"], []).append(row["task_seconds"] / row["steps"])
        return {name: sum(values) / len(values) for name, values in paces.items()}

    def expected(self, task: Task, paces: dict[str, float] | None = None) -> float:
        """Seconds that a task will take; 0 if nothing is known yet."""
        paces = self._paces() if paces is None else paces
        teacher = self.methods[task.method].teacher
        if task.method in paces:
            pace = paces[task.method]
        elif teacher in paces:
            pace = DISTILLED_COST * paces[teacher]
        else:
            pace = max(paces.values(), default=0.0)
        return pace * self.steps(task)

    def choose_steps(self, seconds: float, jobs: int) -> int:
        """The steps of every run, so that all runs fit; kept in the work folder.

        Args:
            seconds: that are left for them.
            jobs: tasks at once, as many as when their speed was measured.
        """
        file = self.work / "plan.json"
        if file.exists():
            return json.loads(file.read_text())["steps"]
        paces = self._paces()
        tasks = self.tune(True) + self.runs(False) + self.runs(True)
        longest = [self.expected(t, paces) for t in tasks if not t.over(self.work)]
        wall = PACKING * sum(longest) / jobs
        share = min(1.0, max(FEWEST, seconds / wall)) if wall else 1.0
        steps = max(1, round(share * self.size.steps))
        content = {"steps": steps, "seconds_left": seconds, "seconds_for_all_steps": wall,
                   "choices_tried": len(self.tried(False))}  # fmt: skip
        file.write_text(json.dumps(content))
        return steps


_DATA: dict[Path, Any] = {}


def perform(
    task: Task, size: Size, work: Path, rate: tuple[float, float], steps: int
) -> dict[str, Any]:
    """Runs a task, in this process, and writes its file."""
    from benchmarks.quality.data import Data
    from benchmarks.quality.train import adapt, release

    begin = time.time()
    data = _DATA[work] = _DATA.get(work) or Data(size, work)
    print(f"{time.strftime('%H:%M:%S')} {task.kind} {task.name}, rates {rate}", flush=True)
    try:
        figures = adapt(
            methods(size)[task.method], task.seed, rate, size, data, work,
            work / "runs" / task.name if task.kind == "run" else None,
            steps, "held" if task.kind == "run" else "valid",
        )  # fmt: skip
    finally:
        release()
    figures |= {"method": task.method, "seed": task.seed, "lr": rate[0],
                "router_rate": rate[1], "task_seconds": time.time() - begin}  # fmt: skip
    file = task.file(work)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(figures))
    part.rename(file)
    return figures
