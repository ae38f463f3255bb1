"""What a step launches: every kernel of a decode step's layer, and the kernels of a prefill, the
stock backbone beside ours.

    python -m benchmarks.timeline --model llama-2-7b --batches 1,128 --prefill 16x1000
    python -m benchmarks.timeline --report

torch's profiler listens inside the engine while it decodes from its CUDA graphs, and one step is
cut out; a prefill is one step of its own. `--report` writes docs/timeline.md and its pictures from
the newest result file alone. Without a GPU operators stand for kernels, which shows only that it
runs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_adafuse.cli.cmd_random import integers

from benchmarks import engine, record
from benchmarks.engine_options import shapes
from benchmarks.pages import ROOT, plot, read_results, table
from benchmarks.profile import COPIES, launch_profiler, listed
from benchmarks.prompts import Ids
from benchmarks.turns import timed

SHORT, LONG = 6, 18  # tokens of two generations: their difference is decoding alone
PAGE = ROOT / "docs" / "timeline.md"
HEAD = """\
# Timeline of a step

Written by `python -m benchmarks.timeline --report` from a file in `benchmarks/results/`; do not
edit.
Decoding: one step out of a replayed CUDA graph, as torch's profiler saw it, sampling included. A
layer is what runs from one attention kernel up to the next. Kernels may overlap or
leave gaps, so that their times do not add up to the step's, which goes from the first one's begin
to the last one's end. Profiling stretches short kernels; the times of whole steps are in
[benchmarks.md](benchmarks.md). Our kernels stand here by today's names.
"""
# Of kernels in older result files, what they are called now.
RENAMED = {
    "_stream_linear_kernel": "_decode_gemm_kernel",
    "_tile_linear_kernel": "_tma_gemm_kernel",
    "_residual_norm_kernel": "_add_norm_kernel",
    "_wide_expand_kernel": "_tma_expand_kernel",
}
SHOWN = 30  # kernels of a prefill by name, the longest first
GAPS = 10  # of a prefill, the longest first


@dataclass
class Options:
    """What to profile."""

    model: str = "llama-2-7b"
    layers: int | None = None
    engines: list[str] = field(default_factory=lambda: ["stock", "adafuse"])
    batches: list[int] = field(default_factory=lambda: [1, 128])
    prefill: list[tuple[int, int]] = field(default_factory=lambda: [(16, 1000)])
    prompt: int = 128
    experts: int = 8
    top_k: int = 2
    r: int = 16
    dtype: str = "bfloat16"
    memory: float = 0.4

    def engine_options(self) -> engine.Options:
        """Of `benchmarks.engine`, which starts the engines.

        Raises:
            ValueError: an unknown model or engine.
        """
        return engine.Options(**vars(self), repeats=1, settings=engine.FRESH)


Event = tuple[str, float, float]  # name, begin and duration in microseconds


def _anchor(short: list[Event], long: list[Event], steps: int) -> str:
    """The kernel that a decode step begins with: the first of those that run once in each.

    Such a kernel runs `steps` times more in the longer generation. Others do not run in every
    step, as the copy of a sequence's next block.

    Raises:
        ValueError: there is none.
    """
    counts, before = Counter(n for n, *_ in long), Counter(n for n, *_ in short)
    once = {name for name, count in counts.items() if count - before[name] == steps}
    if not once:
        more = len(long) - len(short)
        raise ValueError(f"{more} more kernels in {steps} more steps, but none runs once in each")
    last = {name: i for i, (name, *_) in enumerate(long) if name in once}
    return min(last, key=last.__getitem__)


def last_step(short: list[Event], long: list[Event], steps: int) -> list[Event]:
    """The kernels of a decode step: of those with the commonest kernels the last.

    Args:
        short, long: events of two generations, in order of time.
        steps: by which the second has more.

    Raises:
        ValueError: no kernel runs once in each step, so a step cannot be told.
    """
    anchor = _anchor(short, long, steps)
    places = [i for i, (name, *_) in enumerate(long) if name == anchor][-steps:]
    found = [long[i:j] for i, j in zip(places, places[1:])]
    # Counted, not compared in order: kernels that overlap may change places.
    forms = [frozenset(Counter(name for name, *_ in step).items()) for step in found]
    commonest = Counter(forms).most_common(1)[0][0]
    return _from_zero(next(s for s, form in zip(found[::-1], forms[::-1]) if form == commonest))


def _from_zero(events: list[Event]) -> list[Event]:
    return [(name, at - events[0][1], us) for name, at, us in events]


def span(events: list[Event]) -> float:
    """Microseconds from the first kernel's begin to the last one's end."""
    return max(at + us for _, at, us in events) - events[0][1]


def without_copies(events: list[Event]) -> list[Event]:
    """The kernels among them."""
    return [event for event in events if not event[0].startswith(COPIES)]


Gap = tuple[float, float, float, str, str]


def gaps(events: list[Event]) -> list[Gap]:
    """Where no kernel runs between the first and the last, in order of time.

    Args:
        events: kernels and copies in order of time.

    Returns:
        For each gap: microseconds from the first kernel's begin to the gap's, how many it takes,
        how many of copies begin in it; the short names of the kernels before it and after it.
    """
    first, *rest = without_copies(events)
    copies = [(at, us) for name, at, us in events if name.startswith(COPIES)]
    begin, found = first[1], []
    before, end = first[0], first[1] + first[2]
    for name, at, us in rest:
        if at > end:
            copied = sum(took for copy, took in copies if end <= copy < at)
            found.append((end - begin, at - end, copied, short_name(before), short_name(name)))
        if at + us > end:
            before, end = name, at + us
    return found


def totals(events: list[Event]) -> list[tuple[str, int, float]]:
    """Kernels by short name: launches and microseconds; the longest first."""
    launches: Counter[str] = Counter()
    times: dict[str, float] = {}
    for name, _, us in events:
        key = short_name(name)
        launches[key] += 1
        times[key] = times.get(key, 0.0) + us
    return sorted(((n, launches[n], t) for n, t in times.items()), key=lambda row: -row[2])


def one_layer(step: list[Event], layers: int) -> list[Event]:
    """A layer out of the middle of a step: from one attention kernel up to the next.

    Raises:
        ValueError: no kernel runs once in every layer.
    """
    counts = Counter(name for name, *_ in step)
    once = [name for name, *_ in step if counts[name] == layers]
    if not once:
        raise ValueError(f"no kernel runs {layers} times in a step, once a layer")
    anchor = next((name for name in once if re.search("flash|attention", name, re.I)), once[0])
    places = [i for i, (name, *_) in enumerate(step) if name == anchor]
    middle = max(0, layers // 2 - 1)
    end = places[middle + 1] if middle + 1 < len(places) else len(step)
    return _from_zero(step[places[middle] : end])


def short_name(name: str) -> str:
    """A kernel's name without its template arguments and its namespace."""
    name = re.sub(r"^void |\(anonymous namespace\)::|<.*|\(.*", "", name)
    return name.split("::")[-1].strip() or name


def _start(worker) -> None:
    worker.timeline = launch_profiler()
    worker.timeline.start()


def _stop(worker) -> list[Event]:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    worker.timeline.stop()
    return listed(worker.timeline)


def profiled(
    one: engine.Engine, count: int, length: int, tokens: int, vocab: int
) -> list[Event]:
    """The kernels and copies of `count` prompts of `length` ids that get `tokens` tokens each."""
    one.llm.collective_rpc(_start)
    timed(one, [(length, tokens)] * count, Ids(vocab, random.Random(1)))
    return [(name, at, us) for name, at, us in one.llm.collective_rpc(_stop)[0]]


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """One row per engine and batch, with the kernels of a decode step and of a layer, and one per
    engine and prefill, with its kernels by name."""
    settings = options.engine_options()
    vocab = engine.SHAPES[options.model][-1]
    layers = options.layers or engine.SHAPES[options.model][3]
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        engine.write_config(settings, root / "base")
        for kind in options.engines:
            one, _ = engine.start(kind, settings, root)
            for batch in options.batches:
                _, short, long = (  # the first warms up
                    without_copies(profiled(one, batch, options.prompt, tokens, vocab))
                    for tokens in (SHORT, SHORT, LONG)
                )
                step = last_step(short, long, LONG - SHORT)
                row = {"what": "decode", "batch": batch, "layer": one_layer(step, layers)}
                yield _row(kind, layers, step) | row
            for count, length in options.prefill:
                events = [profiled(one, count, length, 1, vocab) for _ in range(2)][-1]
                row = {"what": "prefill", "batch": count, "length": length}
                row["gaps"] = sorted(gaps(events), key=lambda gap: -gap[1])[:GAPS]
                kernels = without_copies(events)
                yield _row(kind, layers, kernels) | row | {"totals": totals(kernels)}
            one.stop()


def _row(kind: str, layers: int, events: list[Event]) -> dict[str, Any]:
    """What the rows of both kinds say; told on the screen too."""
    busy, wall = sum(us for *_, us in events), span(events)
    idle = sum(us for _, us, *_ in gaps(events))
    print(f"{kind:10} {len(events):5} kernels, {busy:9.0f} us in a step of {wall:9.0f}", flush=True)
    row = {"engine": kind, "layers": layers, "unit": "us"}
    return row | {"kernels": len(events), "busy": busy, "wall": wall, "idle": idle}


def write_report(results: Path, page: Path) -> None:
    """The page and its pictures, from the newest result file.

    Raises:
        ValueError: there is no result file of this benchmark.
    """
    own = [r for r in read_results(results) if r.content["benchmark"] == "timeline"]
    if not own:
        raise ValueError(f"no result file of benchmarks.timeline in {results}; measure first")
    result = own[-1]
    parts = [HEAD, result.caption() + "\n"]
    decode = [row for row in result.rows if row.get("what", "decode") == "decode"]
    for batch in dict.fromkeys(row["batch"] for row in decode):
        rows = [row for row in decode if row["batch"] == batch]
        picture = page.parent / "plots" / f"timeline-{batch}.svg"
        parts += [f"## Decoding, batch {batch}\n", _steps(rows), _picture(rows, batch, picture)]
        for row in rows:
            kernels = [
                [str(i + 1), f"`{short_name(name)}`", f"{at:.1f}", f"{us:.1f}"]
                for i, (name, at, us) in enumerate(row["layer"])
            ]
            header = ["", f"{row['engine']}: a layer", "begins, µs", "takes, µs"]
            parts.append(table(header, kernels))
    prefill = [row for row in result.rows if row.get("what") == "prefill"]
    for count, length in dict.fromkeys((row["batch"], row["length"]) for row in prefill):
        rows = [row for row in prefill if (row["batch"], row["length"]) == (count, length)]
        parts += [f"## Prefill, {count} x {length} tokens\n", _steps(rows)]
        for row in rows:
            shown, rest = row["totals"][:SHOWN], row["totals"][SHOWN:]
            if rest:
                others = f"{len(rest)} others", sum(n for _, n, _ in rest), sum(t for *_, t in rest)
                shown = [*shown, others]
            kernels = [[f"`{name or 'unnamed'}`", str(n), f"{us:.1f}"] for name, n, us in shown]
            parts.append(table([f"{row['engine']}: kernel", "launches", "µs"], kernels))
            if row.get("gaps"):
                parts.append(_gaps(row))
    text = "\n".join(parts)
    for old, new in RENAMED.items():
        text = text.replace(f"`{old}`", f"`{new}`")
    page.write_text(text)


def _steps(rows: list[dict[str, Any]]) -> str:
    """The engines' steps beside one another; when no kernel ran, where the file knows it."""
    header = ["engine", "kernels a step", "their time, µs", "step, µs"]
    cells = [[r["engine"], str(r["kernels"]), f"{r['busy']:.0f}", f"{r['wall']:.0f}"] for r in rows]
    if all("idle" in row for row in rows):
        header.append("no kernel runs, µs")
        cells = [[*line, f"{row['idle']:.0f}"] for line, row in zip(cells, rows)]
    return table(header, cells)


def _gaps(row: dict[str, Any]) -> str:
    """An engine's longest gaps."""
    header = [f"{row['engine']}: no kernel after", "and before", "begins, µs", "takes, µs"]
    header.append("copies in it, µs")
    cells = []
    for at, us, copied, *kernels in row["gaps"]:
        names = [f"`{name or 'unnamed'}`" for name in kernels]
        cells.append([*names, f"{at:.0f}", f"{us:.1f}", f"{copied:.1f}"])
    return table(header, cells)


def _picture(rows: list[dict[str, Any]], batch: int, picture: Path) -> str:
    """Draws the engines' layers one above the other."""

    def draw(axes):
        for height, row in enumerate(rows):
            for i, (_, at, us) in enumerate(row["layer"]):
                axes.broken_barh([(at, us)], (height - 0.4, 0.8), color=f"C{i % 10}")
            axes.plot([], [], label=f"{row['engine']}: {len(row['layer'])} kernels")
        axes.set_yticks(range(len(rows)), [row["engine"] for row in rows])
        axes.set_xlabel("microseconds")

    plot(picture, draw, f"one layer at batch {batch}")
    return f"![a layer]({picture.parent.name}/{picture.name})\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Options()
    parser.add_argument("--report", action="store_true", help="write docs/timeline.md and stop")
    parser.add_argument("--model", default=defaults.model, choices=engine.SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers, while working")
    parser.add_argument("--engines", default=defaults.engines, type=lambda t: t.split(","))
    parser.add_argument("--batches", default=defaults.batches, type=integers)
    parser.add_argument("--prefill", default=defaults.prefill, type=shapes)
    parser.add_argument("--prompt", default=defaults.prompt, type=int)
    parser.add_argument("--experts", default=defaults.experts, type=int)
    parser.add_argument("--top-k", default=defaults.top_k, type=int)
    parser.add_argument("--r", default=defaults.r, type=int)
    parser.add_argument("--memory", default=defaults.memory, type=float)
    parser.add_argument("--dtype", default=defaults.dtype)
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default="", help="of the measured code")
    arguments = vars(parser.parse_args())
    out, commit = arguments.pop("out"), arguments.pop("commit")
    if arguments.pop("report"):
        write_report(out or record.RESULTS, PAGE)
        return
    options = Options(**arguments)
    rows: list[dict[str, Any]] = [{"options": vars(options)}]
    path = None
    for row in measure(options):  # kept as they come: starting an engine is long
        rows.append(row)
        path = record.save("timeline", rows, out, commit, path)
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
