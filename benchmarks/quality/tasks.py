"""The runs of the experiment, spread over processes, each kept in a file of its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.methods import Method, methods
from benchmarks.quality.sizes import SIZES, Size


@dataclass(frozen=True)
class Task:
    """One training: to choose a rate ("tune", judged on other text), or to be reported ("run")."""

    kind: str
    method: Method
    seed: int
    lr: float

    @property
    def name(self) -> str:
        rate = f"-lr{self.lr:g}" if self.kind == "tune" else ""
        return f"{self.method.name}-s{self.seed}{rate}"

    def file(self, work: Path) -> Path:
        return work / ("runs" if self.kind == "run" else "tune") / f"{self.name}.json"


def rates(method: Method, size: Size) -> list[float]:
    """Learning rates to try."""
    factor = size.full_rate if method.mixture is None else 1.0
    return [rate * factor for rate in size.rates]


def best_rate(method: Method, size: Size, work: Path) -> float:
    """The rate with the lowest loss on the text for choosing; the middle one if none was tried."""
    tried = {}
    for rate in rates(method, size):
        file = Task("tune", method, size.seeds[0], rate).file(work)
        if file.exists():
            tried[rate] = json.loads(file.read_text())["loss"]
    tried = {rate: loss for rate, loss in tried.items() if math.isfinite(loss)}
    every = rates(method, size)
    return min(tried, key=tried.get) if tried else every[len(every) // 2]


def phases(size: Size, names: list[str]) -> list[tuple[str, bool]]:
    """(kind, distilled) in order: teachers are finished before what is distilled from them."""
    made = methods(size)
    distilled = any(made[name].teacher for name in names)
    tune = len(size.rates) > 1
    return [
        (kind, late)
        for late in ((False, True) if distilled else (False,))
        for kind in (("tune", "run") if tune else ("run",))
    ]


def tasks_of(kind: str, distilled: bool, size: Size, names: list[str], work: Path) -> list[Task]:
    """The tasks of one phase, seeds inside methods."""
    made = [methods(size)[name] for name in names]
    made = [m for m in made if bool(m.teacher) == distilled]
    if kind == "tune":
        return [Task(kind, m, size.seeds[0], rate) for m in made for rate in rates(m, size)]
    return [Task(kind, m, seed, best_rate(m, size, work)) for m in made for seed in size.seeds]


def run_tasks(tasks: list[Task], size: Size, work: Path, deadline: float) -> None:
    """Runs tasks that have no file yet, until the time is up."""
    from benchmarks.quality.data import Data
    from benchmarks.quality.train import adapt

    data, longest = None, 0.0
    for task in tasks:
        file = task.file(work)
        if file.exists():
            continue
        if time.time() + 1.2 * longest > deadline:
            return
        begin = time.time()
        data = data or Data(size, work)
        print(task.name, flush=True)
        tune = task.kind == "tune"
        figures = adapt(
            task.method, task.seed, task.lr, size, data, work,
            None if tune else work / "runs" / task.name,
            max(1, size.steps // 2) if tune else size.steps,
            "valid" if tune else "held",
        )  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        figures |= {"method": task.method.name, "seed": task.seed, "lr": task.lr}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(figures))
        part.rename(file)
        longest = max(longest, time.time() - begin)


def run_phase(
    kind: str, distilled: bool, options: dict[str, Any], work: Path, deadline: float
) -> bool:
    """One phase in `jobs` processes, with a bar; whether all of it is done.

    Raises:
        RuntimeError: a process failed; the message ends with its log.
    """
    from tqdm import tqdm

    size, names, jobs = SIZES[options["size"]], options["methods"], options["jobs"]
    tasks = tasks_of(kind, distilled, size, names, work)

    def done() -> int:
        return sum(task.file(work).exists() for task in tasks)

    if done() == len(tasks):
        return True
    label = f"{'distilled, ' if distilled else ''}{'learning rates' if kind == 'tune' else 'runs'}"
    with tqdm(total=len(tasks), initial=done(), desc=label, disable=not sys.stderr.isatty()) as bar:
        if jobs == 1:
            for task in tasks:
                run_tasks([task], size, work, deadline)
                bar.update(done() - bar.n)
            return done() == len(tasks)
        workers = []
        for i in range(jobs):
            log = work / f"worker-{i}.log"
            command = [
                sys.executable, "-m", "benchmarks.quality", "--size", options["size"],
                "--work", str(work), "--methods", ",".join(names),
                "--worker", f"{kind}/{int(distilled)}/{i}/{jobs}/{deadline}",
            ]  # fmt: skip
            with open(log, "a") as out:
                threads = max(1, (os.cpu_count() or 1) // (2 * jobs))
                environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
                workers.append((subprocess.Popen(command, stdout=out, stderr=out,
                                                 env=environment), log))  # fmt: skip
        while any(process.poll() is None for process, _ in workers):
            time.sleep(1)
            bar.update(done() - bar.n)
        for process, log in workers:
            if process.returncode:
                raise RuntimeError(f"{log}:\n" + log.read_text()[-3000:])
        bar.update(done() - bar.n)
    return done() == len(tasks)


def run_worker(text: str, size: Size, names: list[str], work: Path) -> None:
    """What a process of `run_phase` does: every jobs-th task, from the i-th."""
    kind, distilled, i, jobs, deadline = text.split("/")
    tasks = tasks_of(kind, bool(int(distilled)), size, names, work)
    run_tasks(tasks[int(i) :: int(jobs)], size, work, float(deadline))
