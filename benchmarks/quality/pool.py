"""Tasks in several processes at once, each as soon as what it needs is finished."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from benchmarks.quality.tasks import Plan, Task, perform

TRIES = 2


class Here(Executor):
    """An executor that runs what it is given at once, in this process."""

    def submit(self, function, *args) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*args))
        except Exception as e:  # as a process would: the caller asks for it
            future.set_exception(e)
        return future


def _begin(work: Path, threads: int) -> None:
    """A worker's start: a log of its own, its share of the cores."""
    log = os.open(work / f"worker-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    torch.set_num_threads(threads)


def open_executor(work: Path, jobs: int) -> Executor:
    """Processes with logs in a folder; with one job this process alone.

    Args:
        work: the folder.
        jobs: how many.
    """
    if jobs == 1:
        return Here()
    threads = max(1, (os.cpu_count() or 1) // (2 * jobs))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, spawn, _begin, (work, threads))


class Pool:
    """Runs tasks of a plan; kept open over phases, as a process takes seconds to start.

    Attributes:
        plan: whose tasks.
        jobs: processes; with 1, none but this one.
        say: takes a line for people.
    """

    def __init__(self, plan: Plan, jobs: int, say: Callable[[str], None]):
        self.plan, self.jobs, self.say = plan, jobs, say
        self._executor: Executor | None = None
        self._tries: dict[Task, int] = {}
        for old in (plan.work / "failed").glob("*.txt"):  # another call, another chance
            old.unlink()

    def _open(self) -> Executor:
        if self._executor is None:
            self._executor = open_executor(self.plan.work, self.jobs)
        return self._executor

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
        self._executor = None

    def run(
        self, tasks: list[Task], deadline: float, then: Callable[[], None] | None = None
    ) -> bool:
        """Runs tasks that have no file yet, the first ready one first.

        A task that fails is tried again; failing twice, it is left out and its error kept.

        Args:
            tasks: in the order of their importance.
            deadline: none is started that would end after this time.
            then: called after each task.

        Returns:
            Whether all have their files.
        """
        plan, work = self.plan, self.plan.work
        pending = [t for t in tasks if not t.over(work)]
        total, count = len(pending), 0
        running: dict[Future, Task] = {}
        while pending or running:
            while len(running) < self.jobs and (task := self._next(pending, deadline)):
                pending.remove(task)
                given = (task, plan.size, work, plan.rate(task), plan.steps(task))
                running[self._open().submit(perform, *given)] = task
            if not running:
                break  # no time, or what the others need is missing
            done, _ = wait(running, timeout=10, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                try:
                    row = future.result()
                except Exception as e:
                    self._failed(task, e, pending)
                    continue
                count += 1
                self.say(
                    f"{count:3} of {total}  {task.kind:4} {task.name:22} rates {row['lr']:g} x "
                    f"{row['router_rate']:g}  {row['steps']:5} steps  "
                    f"perplexity {math.exp(min(50, row['loss'])):.3f}  {row['task_seconds']:.1f} s"
                )
            if done and then:
                then()
        return all(t.file(work).exists() for t in tasks)

    def _next(self, pending: list[Task], deadline: float) -> Task | None:
        if not pending:
            return None
        now = time.time()
        if now > deadline:
            return None
        paces = self.plan._paces() if math.isfinite(deadline) else {}
        for task in pending:
            if self.plan.ready(task) and now + self.plan.expected(task, paces) <= deadline:
                return task
        return None

    def _failed(self, task: Task, error: Exception, pending: list[Task]) -> None:
        if isinstance(error, BrokenProcessPool):  # all its tasks end so, by no fault of theirs
            self.close()
        self._tries[task] = self._tries.get(task, 0) + 1
        text = "".join(traceback.format_exception(error))
        self.say(f"failed: {task.kind} {task.name}: {text.strip().splitlines()[-1][:300]}")
        if self._tries[task] < TRIES:
            pending.append(task)
            return
        file = task.failure(self.plan.work)
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
