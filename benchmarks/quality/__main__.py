"""Does a route decided once per token cost quality? One command, from text to table.

    python -m benchmarks.quality --size full --work /tmp/quality --jobs 4 --speed
    python -m benchmarks.quality --size toy --work /tmp/toy
    python -m benchmarks.quality --report

Pretrains a small Llama on text that this machine carries, adapts it by every method with every
seed, judges on held-out files, and writes one result file. Everything made is kept in --work, so
a run that is cut off, by --minutes or by accident, goes on where it was: call it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.quality.methods import methods
from benchmarks.quality.sizes import SIZES

RESULTS = Path(__file__).parent / "results"
NOT_DONE = 3


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
    add("--speed", action="store_true", help="also time each method in vLLM")
    add("--out", type=Path, default=RESULTS, help="folder of the result file")
    add("--commit", default="", help="of the measured code")
    add("--report", action="store_true", help="only write quality.md from the newest result")
    add("--docs", type=Path, default=Path(__file__).parents[2] / "docs", help="where it goes")
    add("--worker", help=argparse.SUPPRESS)
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


def result_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything in the work folder, as rows of a result file."""
    size, known = SIZES[args.size], methods(SIZES[args.size])
    rows: list[dict[str, Any]] = [
        {"options": {"size": args.size, "models": [f"llama-{args.size}"], "methods": args.methods,
                     **dataclasses.asdict(size)}},
        {"what": "corpus", **json.loads((args.work / "corpus.json").read_text())},
        {"what": "backbone", **json.loads((args.work / "base.json").read_text())},
    ]  # fmt: skip
    for name in args.methods:
        method = known[name]
        about = {"method": name, "label": method.label, "group": method.group,
                 "active_rank": method.active_rank, "total_rank": method.total_rank}  # fmt: skip
        rows.append({"what": "method", **about})
        for kind in ("tune", "run"):
            folder = args.work / ("runs" if kind == "run" else "tune")
            for file in sorted(folder.glob(f"{name}-s[0-9]*.json")):
                rows.append({"what": kind, **json.loads(file.read_text())})
    speed = args.work / "speed.json"
    if speed.exists():
        rows += [{"what": "speed", "method": n, "decode": r}
                 for n, r in json.loads(speed.read_text()).items()]  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.report:
        from benchmarks.quality.report import write

        print(f"wrote {write(args.out, args.docs)}")
        return 0
    from benchmarks.quality import tasks

    size, deadline = SIZES[args.size], time.time() + 60 * args.minutes
    if args.worker:
        tasks.run_worker(args.worker, size, args.methods, args.work)
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    begin = time.time()

    def say(text: str) -> None:
        print(f"[{time.time() - begin:6.1f} s] {text}", flush=True)

    if not (args.work / "corpus.json").exists():
        from benchmarks.quality.data import prepare

        say("gathering text")
        prepare(size, args.work, args.roots)
    if not (args.work / "base.json").exists():
        from benchmarks.quality.data import Data
        from benchmarks.quality.train import pretrain

        say("pretraining the backbone")
        pretrain(size, Data(size, args.work), args.work)
    options = {"size": args.size, "methods": args.methods, "jobs": args.jobs}
    done = True
    for kind, distilled in tasks.phases(size, args.methods):
        say(f"{'choosing learning rates' if kind == 'tune' else 'training'}"
            f"{' (distilled)' if distilled else ''}")  # fmt: skip
        done = tasks.run_phase(kind, distilled, options, args.work, deadline)
        if not done:
            break
    if done and args.speed:
        from benchmarks.quality.speed import measure

        say("timing in vLLM")
        done = measure(size, args.methods, args.work, deadline)
    if not done:
        say("time is up; call again to go on")
        return NOT_DONE
    path = record.save("quality", result_rows(args), args.out, args.commit)
    say("done")
    print(json.dumps({"saved": str(path)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
