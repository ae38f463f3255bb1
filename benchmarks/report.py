"""Draws the plots and writes docs/benchmarks.md, from the result files alone.

    python -m benchmarks.report

The newest file of each benchmark, model and set of engines is shown; all files that are kept are
listed with their commits. A file that no page shows any more is deleted: git has it.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from benchmarks import record
from benchmarks.engine_report import engine_section, required_section
from benchmarks.pages import ROOT, Result, newest, percent, plot, read_results, table

HEAD = """\
# Benchmarks

Written by `python -m benchmarks.report` from the files in `benchmarks/results/`; do not edit.
Medians; the files hold every repeat. An overhead is over the bare backbone of the same run.
"""


def kernels_section(result: Result, picture: Path) -> str:
    """The projections of one layer, summed."""
    rows = []
    for row in result.rows:
        bare, ours, torch = (row[name]["median"] for name in ("bare", "ours", "torch"))
        cells = [row["model"], str(row["tokens"]), row["projection"]]
        cells += [f"{bare:.1f}", f"{ours:.1f}", percent(ours / bare - 1), f"{torch:.1f}"]
        rows.append([*cells, f"{row['floor']:.1f}", f"{row['tb_s']:.2f}"])
    header = ["model", "tokens", "projection", "bare µs", "ours µs", "over", "torch µs", "floor µs"]

    def draw(axes):
        for model in dict.fromkeys(row["model"] for row in result.rows):
            tokens = list(dict.fromkeys(r["tokens"] for r in result.rows if r["model"] == model))
            for name in ("ours", "torch"):
                values = []
                for count in tokens:
                    some = [r for r in result.rows if (r["model"], r["tokens"]) == (model, count)]
                    some = [r for r in some if r["projection"] == "layer"] or some
                    total = sum(r[name]["median"] for r in some)
                    values.append(100 * (total / sum(r["bare"]["median"] for r in some) - 1))
                axes.plot(tokens, values, marker="o", label=f"{model}, {name}")
        axes.set_xscale("log", base=2)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel("tokens")
        axes.set_ylabel("% over the bare projections")

    plot(picture, draw, "the four projections of a layer, with experts")
    return table([*header, "TB/s"], rows) + f"\n![projections](plots/{picture.name})\n"


def serve_section(result: Result, picture: Path) -> str:
    """A server under load."""
    header = ["requests/s", "engine", "tokens/s", "TTFT ms", "p99", "TPOT ms", "p99"]
    names = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms")
    order = list(dict.fromkeys(row["rate"] for row in result.rows))
    rows = [
        [row["rate"], row["engine"], f"{row['output_throughput']:.0f}"]
        + [f"{row[name]:.2f}" for name in names]
        for row in sorted(result.rows, key=lambda row: order.index(row["rate"]))
    ]

    def draw(axes):
        for kind in dict.fromkeys(row["engine"] for row in result.rows):
            some = [row for row in result.rows if row["engine"] == kind]
            x = [row["output_throughput"] for row in some]
            axes.plot(x, [row["median_tpot_ms"] for row in some], marker="o", label=kind)
        axes.set_xlabel("output tokens per second")
        axes.set_ylabel("median time per output token, ms")

    plot(picture, draw, f"vllm serve under load, {result.models}")
    return table(header, rows) + f"\n![load](plots/{picture.name})\n"


SECTIONS = {
    "engine": ("Whole engines", engine_section),
    "serve": ("A server under load", serve_section),
    "kernels": ("Projections", kernels_section),
}

# Of docs/paper.md, timeline.md, quality.md, many-adapters.md, or told of in the pages on training.
ON_OTHER_PAGES = (
    "paper", "switch", "layer_linear", "layerwise", "timeline", "quality", "compose-experts",
    "training", "lora", "lora_load", "thresholds", "peers",
)  # fmt: skip


def picture_name(result: Result, taken: set[str]) -> str:
    """What a picture is of, so that a newer run of it takes its place; added to those taken."""
    engines = [] if result.kind != "engine" else [e for e in result.engines if e != "stock"]
    name = "-".join([result.kind, result.models, *engines])
    if name in taken:
        name += f"-{result.mixture}-{result.options.get('prompt', 0)}"
    taken.add(name)
    return re.sub(r"[^\w.]+", "-", name)


def write_report(results: list[Result], docs: Path) -> Path:
    """Writes docs/benchmarks.md and its plots.

    Raises:
        ValueError: no results.
    """
    results = [r for r in results if r.kind not in ON_OTHER_PAGES]
    if not results:
        raise ValueError("no result files; run benchmarks.engine, .kernels or .serve first")
    for result in results:
        if result.kind not in SECTIONS:
            raise ValueError(f"{result.path}: no section for benchmark {result.kind}")
    text = HEAD + required_section([r for r in results if r.kind == "engine"])
    names: set[str] = set()
    for kind, (heading, section) in SECTIONS.items():
        own = [result for result in newest(results) if result.kind == kind]
        text += f"\n## {heading}\n" if own else ""
        for result in own:
            picture = docs / "plots" / f"{picture_name(result, names)}.svg"
            text += f"\n{result.caption()}\n\n{section(result, picture)}"
    text += "\n## All result files\n\n"
    listed = [
        [r.path.name, r.content["commit"], r.models, f"`{r.command}`"]
        for r in results
    ]
    text += table(["file", "commit", "model", "command"], listed)
    path = docs / "benchmarks.md"
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    print(write_report(read_results(arguments.results), arguments.docs))


if __name__ == "__main__":
    main()
