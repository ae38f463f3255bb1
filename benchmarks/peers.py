"""Ours beside vLLM's own LoRA, plain and dual-stream, a merged checkpoint and the bare backbone.

    python -m benchmarks.peers --model llama-3-8b --loras 1,4 --prompt 32 --steps 8,72
    python -m benchmarks.peers --report benchmarks/results/peers-*.json --out docs/plots

Rows, of N LoRAs of rank r that requests name in turn:

    stock    the backbone, LoRA not enabled; also what a merged checkpoint costs, which is a backbone:
             of one LoRA only, all others need an engine each
    ours:N   this plugin's `--enable-lora`: one engine for every N, with room for the most
    vllm:N   vLLM's own LoRA manager, an engine for each N with room for N
    dual:N   the same with VLLM_LORA_ENABLE_DUAL_STREAM; left out where this vLLM or device has none

What is measured, and how, is as in `benchmarks.lora`; sizes with fewer sequences than LoRAs are left
out. Several runs, as one GPU does not hold an engine for each N, make one report.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_adafuse.cli.cmd_random import integers

from benchmarks import lora
from benchmarks.engine import VLLM_LORA
from benchmarks.engine_options import Size, name_of
from benchmarks.pages import new_figure, percent, read_file, save_figure, table
from benchmarks.turns import Engine, take_turns

DUAL = "VLLM_LORA_ENABLE_DUAL_STREAM"
LABELS = {"ours": "vllm-adafuse", "vllm": "vLLM's LoRA", "dual": "vLLM's LoRA, dual-stream"}
COLOURS = {"ours": "C0", "vllm": "C1", "dual": "C3"}


def has_dual_stream() -> bool:
    """Whether this vLLM can run LoRA on a second stream here."""
    from vllm import envs
    from vllm.platforms import current_platform

    return DUAL in envs.environment_variables and current_platform.is_cuda_alike()


def make_engines(options: argparse.Namespace, root: Path) -> dict[str, Engine]:
    """Row -> what is timed for it."""
    requests = lora.make_loras(options, root, max(options.loras))
    wanted: dict[str, dict[str, Any]] = {"stock": {}}

    def room(count: int) -> dict[str, Any]:
        return {
            "enable_lora": True, "max_loras": count, "max_lora_rank": lora.rank(options.r),
            "loads": requests[:count],
        }  # fmt: skip

    if "ours" in options.engines:
        wanted["ours"] = room(max(options.loras))
    for count in options.loras:
        theirs = room(count) | {"additional_config": VLLM_LORA}
        if "vllm" in options.engines:
            wanted[f"vllm:{count}"] = theirs
        if "dual" in options.engines:
            wanted[f"dual:{count}"] = theirs | {"env": {DUAL: "1"}}
    llms = lora.start_all(options, root, wanted)
    ours = llms.pop("ours", None)
    rows = {name: Engine(llm, _named(name, requests)) for name, llm in llms.items()}
    if ours is not None:
        names = [f"ours:{count}" for count in options.loras]
        rows |= {name: Engine(ours, _named(name, requests)) for name in names}
    return rows


def _named(row: str, requests: list) -> list | None:
    """The LoRAs of a row."""
    count = row.partition(":")[2]
    return requests[: int(count)] if count else None


def is_asked(row: str, size: Size) -> bool:
    """Whether every LoRA of a row has a sequence of the size."""
    return int(row.partition(":")[2] or 1) <= size[1]


def measure(options: argparse.Namespace) -> Iterator[dict]:
    """A row for each size and engine, and one for dual streams where there are none."""
    if "dual" in options.engines and not has_dual_stream():
        options.engines = [kind for kind in options.engines if kind != "dual"]
        print(f"dual     left out: {DUAL} is not to be had here", flush=True)
        yield {"what": "left out", "engine": "dual", "why": f"no {DUAL} in this vLLM, or no CUDA"}
    with tempfile.TemporaryDirectory() as scratch:
        engines = make_engines(options, Path(scratch))
        try:
            yield from take_turns(options, engines, is_asked)
        finally:
            for llm in {id(engine.llm): engine for engine in engines.values()}.values():
                llm.stop()


def figures(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, Size], dict[str, Any]]:
    """The newest row of each engine and size, in uniform ids."""
    return {
        (row["engine"], (row["what"], row["batch"], row["length"])): row
        for row in rows if row.get("ids") == "uniform"
    }  # fmt: skip


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table, of the rows of all files: a line for each count of LoRAs and manager."""
    by = figures(rows)
    columns = list(dict.fromkeys(size for _, size in by))
    lines = []
    for count in sorted({int(n) for row, _ in by if (n := row.partition(":")[2])}):
        merged = ["0 %" if count == 1 else "–"] * len(columns)
        lines.append([str(count), "a merged checkpoint", *merged])
        for kind, label in LABELS.items():
            found = [by.get((f"{kind}:{count}", size)) for size in columns]
            if any(found):
                cells = ["–" if row is None else percent(row["overhead"]) for row in found]
                lines.append([str(count), label, *cells])
    stock = [by.get(("stock", size)) for size in columns]
    lines.append(["", "stock", *("–" if r is None else f"{r['median']:.2f} ms" for r in stock)])
    text = table(["LoRAs", "", *map(name_of, columns)], lines)
    return text + (
        "\nTime over the backbone without LoRA, in the same run. A merged checkpoint is a backbone: "
        "it costs nothing more, and serves one LoRA an engine.\n"
    )


def draw(rows: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """The plot of decode steps, as SVG and PNG: a panel for each count of LoRAs."""
    by = figures(rows)
    counts = sorted({int(n) for row, _ in by if (n := row.partition(":")[2])})
    figure, axes = new_figure(1, len(counts), (2.2 * len(counts) + 1, 2.6))
    for axis, count in zip(axes[0], counts):
        for kind, label in LABELS.items():
            found = sorted(
                (size[1], 100 * row["overhead"]) for (name, size), row in by.items()
                if name == f"{kind}:{count}" and size[0] == "decode"
            )  # fmt: skip
            if found:
                axis.plot(*zip(*found), marker="o", markersize=3, color=COLOURS[kind], label=label)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_title(f"{count} LoRA{'s' * (count > 1)}", fontsize=9)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("sequences", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("decode step, % over stock", fontsize=8)
    axes[0][-1].legend(fontsize=7)
    paths = [out / "peers.svg", out / "peers.png"]
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(paths[1], dpi=110)
    save_figure(figure, paths[0])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lora.add_options(parser, batches="1,8,32,128", prefill="1x1500,8x700")
    parser.add_argument("--engines", default="ours,vllm,dual", type=lambda t: t.split(","))
    parser.add_argument("--loras", default="1,4,16,32", type=integers)
    parser.add_argument("--report", nargs="+", type=Path, metavar="FILE",
                        help="only the table and the plot of these result files")  # fmt: skip
    options = parser.parse_args()
    files = options.__dict__.pop("report")
    if files:
        rows = [row for path in sorted(files) for row in read_file(path).rows]
        print(report(rows))
        print(", ".join(map(str, draw(rows, options.out or Path()))))
        return
    if unknown := set(options.engines) - set(LABELS):
        parser.error(f"--engines has {', '.join(unknown)}, expected some of {', '.join(LABELS)}")
    rows = lora.run("peers", options, measure)
    print(report(rows))


if __name__ == "__main__":
    main()
