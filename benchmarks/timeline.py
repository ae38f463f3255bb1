"""What one decode step launches: every kernel of a layer, the stock backbone beside ours.

    python -m benchmarks.timeline --model llama-2-7b --batches 1,128
    python -m benchmarks.timeline --report

torch's profiler listens inside the engine while it decodes from its CUDA graphs; the last whole
step is kept. `--report` writes docs/timeline.md and its pictures from the newest result file alone.
Without a GPU operators stand for kernels, which shows only that it runs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_adafuse.cli.cmd_random import integers

from benchmarks import engine, record
from benchmarks.profile import launch_profiler, listed
from benchmarks.report import ROOT, plot, read_results, table

SHORT, LONG = 6, 18  # tokens of two generations: their difference is decoding alone
PAGE = ROOT / "docs" / "timeline.md"
HEAD = """\
# Timeline of a decode step

Written by `python -m benchmarks.timeline --report` from a file in `benchmarks/results/`; do not
edit.
One step out of a replayed CUDA graph, as torch's profiler saw it. A layer is what runs from one
attention kernel up to the next. Profiling stretches short kernels; the times of whole steps are in
[benchmarks.md](benchmarks.md).
"""


@dataclass
class Options:
    """What to profile."""

    model: str = "llama-2-7b"
    layers: int | None = None
    engines: list[str] = field(default_factory=lambda: ["stock", "adafuse"])
    batches: list[int] = field(default_factory=lambda: [1, 128])
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
        return engine.Options(**vars(self), prefill=(1, 8), repeats=1)


Event = tuple[str, float, float]  # name, begin and duration in microseconds


def last_step(short: list[Event], long: list[Event], steps: int) -> list[Event]:
    """The kernels of the last decode step.

    Args:
        short, long: events of two generations, in order of time.
        steps: by which the second has more.

    Raises:
        ValueError: the generations do not differ by whole steps, so a step cannot be told.
    """
    more = len(long) - len(short)
    if more <= 0 or more % steps:
        raise ValueError(f"{more} more kernels in {steps} more steps, expected a multiple of it")
    count = more // steps
    step = long[-count:]
    begin = step[0][1]
    return [(name, at - begin, us) for name, at, us in step]


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
    layer = step[places[middle] : end]
    begin = layer[0][1]
    return [(name, at - begin, us) for name, at, us in layer]


def short_name(name: str) -> str:
    """A kernel's name without its template arguments and its namespace."""
    name = re.sub(r"^void |<.*|\(.*", "", name)
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


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per engine and batch: the kernels of a step and of a layer."""
    settings = options.engine_options()
    vocab = engine.SHAPES[options.model][-1]
    layers = options.layers or engine.SHAPES[options.model][3]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        engine.write_config(settings, root / "base")
        for kind in options.engines:
            one, _ = engine.start(kind, settings, root)
            for batch in options.batches:
                found = []
                for tokens in (SHORT, SHORT, LONG):  # the first warms up
                    one.llm.collective_rpc(_start)
                    engine.timed(one, batch, options.prompt, tokens, vocab, random.Random(1))
                    found.append(one.llm.collective_rpc(_stop)[0])
                step = last_step([*map(tuple, found[1])], [*map(tuple, found[2])], LONG - SHORT)
                layer = one_layer(step, layers)
                rows.append({"engine": kind, "batch": batch, "unit": "us", "layers": layers})
                rows[-1] |= {"kernels": len(step), "busy": sum(us for *_, us in step)}
                rows[-1] |= {"wall": step[-1][1] + step[-1][2], "layer": layer}
                print(
                    f"{kind:10} batch {batch:4}  {len(step)} kernels a step, {len(layer)} a layer, "
                    f"busy {rows[-1]['busy']:.0f} us",
                    flush=True,
                )
            one.llm.llm_engine.engine_core.shutdown()
    return rows


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
    for batch in dict.fromkeys(row["batch"] for row in result.rows):
        rows = [row for row in result.rows if row["batch"] == batch]
        picture = page.parent / "plots" / f"timeline-{batch}.svg"

        def draw(axes, rows=rows):
            for height, row in enumerate(rows):
                for i, (_, at, us) in enumerate(row["layer"]):
                    color = f"C{i % 10}"
                    axes.broken_barh([(at, us)], (height - 0.4, 0.8), color=color)
                axes.plot([], [], label=f"{row['engine']}: {len(row['layer'])} kernels")
            axes.set_yticks(range(len(rows)), [row["engine"] for row in rows])
            axes.set_xlabel("microseconds")

        plot(picture, draw, f"one layer at batch {batch}")
        parts += [f"## Batch {batch}\n", f"![a layer]({picture.relative_to(page.parent)})\n"]
        steps = [
            [r["engine"], str(r["kernels"]), f"{r['busy']:.0f}", f"{r['wall']:.0f}"] for r in rows
        ]
        parts.append(table(["engine", "kernels a step", "their time, µs", "step, µs"], steps))
        for row in rows:
            kernels = [
                [str(i + 1), f"`{short_name(name)}`", f"{at:.1f}", f"{us:.1f}"]
                for i, (name, at, us) in enumerate(row["layer"])
            ]
            header = ["", f"{row['engine']}: a layer", "begins, µs", "takes, µs"]
            parts.append(table(header, kernels))
    page.write_text("\n".join(parts))


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
    rows = measure(options)
    path = record.save("timeline", [{"options": vars(options)}, *rows], out, commit)
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
