"""Does a route decided once per token cost quality? One command, from text to table.

    python -m benchmarks.quality --size full --work /tmp/quality --jobs 8 --minutes 15 --speed
    python -m benchmarks.quality --size toy --work /tmp/toy
    python -m benchmarks.quality --report

Pretrains a small Llama on text that this machine carries, adapts it by every method with every
seed, judges on held-out files, and writes one result file. Everything made is kept in --work, so
a run that is cut off, by --minutes or by accident, goes on where it was: call it again. What is
there so far stands in --work/so-far as a result file, from the first training on.

With --minutes, pretraining and choosing rates get a share of the time each, and then all methods
as many steps as the rest is enough for, measured on this machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.quality.methods import methods
from benchmarks.quality.pool import Pool
from benchmarks.quality.sizes import SIZES
from benchmarks.quality.tasks import Plan

RESULTS = Path(__file__).parent / "results"
NOT_DONE = 3
# Of --minutes: the most that pretraining takes; of what is then left, that choosing rates takes.
# Timing has its engines to start: seconds, or a share of what is left where that is less.
PRETRAIN_SHARE, TUNE_SHARE, SPEED_SECONDS, SPEED_SHARE = 0.22, 0.25, 150, 0.35
KEEP_SECONDS = 20  # between two copies of the result so far


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="full")
    add("--work", type=Path, default=Path("/tmp/adafuse-quality"), help="folder that is kept")
    add("--roots", type=lambda t: [Path(p) for p in t.split(",")], help="folders to take text from")
    add("--methods", type=lambda t: t.split(","), help="only these, by comma")
    add("--jobs", type=int, default=1, help="trainings at once on the one GPU")
    add("--minutes", type=float, default=1e6, help="start nothing that would take longer")
    add("--gather", action="store_true", help="only gather the text, which needs no GPU")
    add("--partial", action="store_true", help="write a result file also of what is not finished")
    add("--speed", action="store_true", help="also time each method in vLLM")
    add("--out", type=Path, default=RESULTS, help="folder of the result file")
    add("--commit", default="", help="of the measured code")
    add("--composed", action="store_true", help="judge composed LoRAs instead, see composed.py")
    add("--together", action="store_true", help="or mixtures against one LoRA, see together.py")
    add("--text", type=Path, help="for these two: folder or archive of further domains' text")
    add("--domains", type=lambda t: tuple(t.split(",")), help="for these two: only these")
    add("--seeds", type=lambda t: tuple(map(int, t.split(","))), help="for these two: only these")
    add("--report", action="store_true", help="only write quality.md from the newest result")
    add("--docs", type=Path, default=Path(__file__).parents[2] / "docs", help="where it goes")
    args = parser.parse_args(argv)
    known = methods(SIZES[args.size])
    args.methods = args.methods or list(known)
    for name in args.methods:
        if name not in known:
            parser.error(f"--methods has {name}, expected some of {', '.join(known)}")
        if (teacher := known[name].teacher) and teacher not in args.methods:
            parser.error(f"--methods has {name}, which needs {teacher} beside it")
    if args.jobs < 1 or args.minutes <= 0:
        parser.error("--jobs and --minutes must be above 0")
    return args


def result_rows(args: argparse.Namespace, complete: bool) -> list[dict[str, Any]]:
    """Everything in the work folder, as rows of a result file."""
    size, known = SIZES[args.size], methods(SIZES[args.size])
    options = {"size": args.size, "models": [f"llama-{args.size}"], "methods": args.methods,
               "complete": complete, **dataclasses.asdict(size)}  # fmt: skip
    plan = args.work / "plan.json"
    if plan.exists():
        options |= {"plan": (chosen := json.loads(plan.read_text())), "steps": chosen["steps"]}
    rows: list[dict[str, Any]] = [
        {"options": options},
        {"what": "corpus", **json.loads((args.work / "corpus.json").read_text())},
        {"what": "backbone", **json.loads((args.work / "base.json").read_text())},
    ]
    for name in args.methods:
        method = known[name]
        about = {"method": name, "label": method.label, "group": method.group,
                 "active_rank": method.active_rank, "total_rank": method.total_rank}  # fmt: skip
        rows.append({"what": "method", **about})
        for kind in ("tune", "run"):
            folder = args.work / ("runs" if kind == "run" else "tune")
            for file in sorted(folder.glob(f"{name}-s[0-9]*.json")):
                rows.append({"what": kind, **json.loads(file.read_text())})
        speed = args.work / "speed" / f"{name}.json"
        if speed.exists():
            rows.append({"what": "speed", "method": name, "decode": json.loads(speed.read_text())})
    for file in sorted((args.work / "failed").glob("*.txt")):
        rows.append({"what": "failed", "task": file.stem, "error": file.read_text()[-2000:]})
    return rows


class Keeper:
    """Keeps `work/so-far` up to date, where a result file lies whatever happens later."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.last = args, 0.0

    def __call__(self) -> None:
        if time.time() - self.last < KEEP_SECONDS:
            return
        self.last = time.time()
        folder = self.args.work / "so-far"
        old = list(folder.glob("*.json"))
        record.save("quality", result_rows(self.args, False), folder, self.args.commit)
        for file in old:
            file.unlink()


def train_all(args: argparse.Namespace, deadline: float, say: Callable[[str], None]) -> bool:
    """Chooses rates and trains every method with every seed; whether all is done."""
    size, keep = SIZES[args.size], Keeper(args)
    plan = Plan(size, args.methods, args.work)
    pool = Pool(plan, args.jobs, say)
    try:
        left = deadline - time.time()
        if tune := plan.tune(late=False):
            say(f"choosing learning rates: {len(tune)} trainings")
            pool.run(tune, time.time() + TUNE_SHARE * left)
        say(f"choices that all tried: {len(plan.tried(False))} of {len(size.choices)}")
        left = deadline - time.time()
        kept = min(SPEED_SECONDS, SPEED_SHARE * left) if args.speed else 0
        steps = plan.choose_steps(left - kept, args.jobs)
        runs = plan.runs(late=False) + plan.runs(late=True)
        # What the distilled ones wait for, then the main methods, then the rest.
        runs.sort(key=lambda t: not plan.methods[t.method].main)
        tasks = plan.tune(late=True) + runs
        say(f"training: {len(runs)} runs of {steps} steps, {left:.0f} s left")
        done = pool.run(tasks, deadline, keep)
    finally:
        pool.close()
    return done


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.report:
        from benchmarks.quality.report import write

        print(f"wrote {write(args.out, args.docs)}")
        return 0
    size, begin = SIZES[args.size], time.time()
    deadline = begin + 60 * args.minutes
    args.work.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')} {time.time() - begin:6.1f} s] {text}", flush=True)

    if args.composed or args.together:
        from benchmarks.quality.drive import drive

        name = "composed" if args.composed else "together"
        return drive(args, importlib.import_module(f"benchmarks.quality.{name}"), say)
    if not (args.work / "corpus.json").exists():
        from benchmarks.quality.data import prepare

        say("gathering text")
        prepare(size, args.work, args.roots)
    if args.gather:
        say("the text is gathered")
        return 0
    if not (args.work / "base.json").exists():
        from benchmarks.quality.data import Data
        from benchmarks.quality.train import pretrain, release

        say("pretraining the backbone")
        pretrain(size, Data(size, args.work), args.work, PRETRAIN_SHARE * 60 * args.minutes)
        release()
        base = json.loads((args.work / "base.json").read_text())
        say(f"backbone: {base['parameters']:,} parameters, {base['steps']} steps, perplexity "
            f"{math.exp(base['loss']):.3f}")  # fmt: skip
    done = train_all(args, deadline, say)
    path = None
    if done or (args.partial and list(args.work.glob("runs/*.json"))):  # whatever timing does
        complete = done and not args.speed
        path = record.save("quality", result_rows(args, complete), args.out, args.commit)
    if args.speed:
        from benchmarks.quality.speed import measure_all

        done &= measure_all(args.size, args.methods, args.work, deadline, say)
        if path:
            record.save("quality", result_rows(args, done), commit=args.commit, path=path)
    if not done:
        say("not all is done; call again to go on")
    if path:
        print(json.dumps({"saved": str(path)}), flush=True)
    return 0 if done else NOT_DONE


if __name__ == "__main__":
    sys.exit(main())
