"""Writes docs/paper.md and its plots from the files of benchmarks.paper and .switch alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.paper_rows import ROWS
from benchmarks.report import ROOT, Result, percent, plot, read_results, table

__all__ = ["ROOT", "write_report"]

# AdaFuse, arXiv 2603.11873, its table on Llama-2-7B and its abstract; not measured here.
CLAIMED_LAYER_WISE = (2.5, 9.5)  # times the backbone
CLAIMED_MERGE = 4.5 / 2.4  # times the backbone: naive merging layer by layer
CLAIMED_SWITCH = 0.29  # over the backbone
CLAIMED_FASTER = 2.4  # times faster than layer-wise
PUBLISHED = ("layer_wise_linear", "layer_wise_mlp", "mixlora_package")  # forms of layer-wise code

HEAD = """\
# The paper's table

Written by `python -m benchmarks.paper --report` from the files in `benchmarks/results/`; do not
edit. It sets AdaFuse (arXiv 2603.11873) beside the systems it is compared with, each as real code:
one stream, decoding, ms per token.

## What is compared

| row | what it is |
| --- | --- |
"""
ABOUT = {
    "backbone": "the bare model in transformers, eager",
    "static_lora": "PEFT's LoRA, one for all tokens, not merged",
    "layer_wise_linear": "MoLA's form: a router in every linear; softmax, top-k, renormalised; "
    "a loop over experts with masks, as its published layer has it",
    "layer_wise_gather": "the same, written as well as eager code can be: experts are gathered, "
    "no loop, no waiting",
    "layer_wise_mlp": "MixLoRA's form, our writing: a router per MLP, experts mixed at its output, "
    "plain LoRA on attention",
    "mixlora_package": "pip's package `mixlora` itself",
    "layer_merge": "naive merging: each layer adds its chosen experts to its weights, runs, "
    "subtracts them",
    "pre_gated": "one decision per token at the entrance, nothing fused: each linear gathers",
    "merge_all": "one decision, merged into all weights before the token, one product per linear",
    "switch": "AdaFuse as published: the same in one launch, `vllm_adafuse.kernels.switch`",
    "stock": "vLLM, the bare model",
    "lora": "vLLM's own LoRA, one static adapter",
    "layer_wise": "vLLM with this package: a router in every linear",
    "adafuse": "vLLM with this package: pre-gated, experts fused into the projections (SGMM)",
}
HOW = """
All rows have experts of the same number, rank and places, with random weights; a token's time ends
when the host has read it. Launches are kernels that reach the GPU in one decoding step, counted by
torch's profiler (inside a CUDA graph each one counts); "GPU busy" is the sum of their times. Memory
is the peak while decoding, the backbone included; in vLLM, what is held after loading.

```console
$ python -m benchmarks.paper                  # transformers, Llama-2-7B and Mistral-7B shapes
$ python -m benchmarks.paper --where vllm     # whole engines with CUDA graphs
$ python -m benchmarks.switch                 # the kernel alone
$ python -m benchmarks.paper --report         # this page
```

`static_lora` and `mixlora_package` need the packages `peft` and `mixlora`; without them they are
left out, and the page says so. A model of any shape in `benchmarks.engine` can be named, and
`--model tiny` runs everything without a GPU.
"""


def _latest(results: list[Result]) -> dict[tuple[str, str], Result]:
    """(where, model) -> the newest file that has it."""
    found = {}
    for result in results:
        if result.content["benchmark"] == "paper":
            for row in result.rows:
                found[row["where"], row["model"]] = result
    return found


def _measured(result: Result, where: str, model: str) -> dict[str, dict[str, Any]]:
    return {
        r["row"]: r for r in result.rows if (r["where"], r["model"]) == (where, model)
    }


def _cells(row: dict[str, Any], first: bool) -> list[str]:
    if "skipped" in row:
        return [f"`{row['row']}`", row["skipped"], *[""] * 5]
    busy = f"{row['device_us'] / 1e3:.2f} ms" if "device_us" in row else ""
    memory = f"{row['peak_bytes'] / 1e9:.2f} GB" if row.get("peak_bytes") else ""
    return [
        f"`{row['row']}`",
        f"{row['median']:.2f} ms",
        f"{row['min']:.2f} to {row['max']:.2f}",
        "" if first else percent(row["overhead"]),
        f"{row['kernels']:,}" if "kernels" in row else "",
        busy,
        memory,
    ]


def _main_table(rows: dict[str, dict[str, Any]]) -> str:
    header = ["row", "per token", "range", "over", "launches", "GPU busy", "memory"]
    return table(header, [_cells(row, i == 0) for i, row in enumerate(rows.values())])


def _draw(path: Path, rows: dict[str, dict[str, Any]], title: str) -> None:
    """Time over launches: if launching is what costs, the rows stand on a line."""
    done = [row for row in rows.values() if "median" in row and "kernels" in row]

    def draw(axes):
        for i, row in enumerate(done):
            marker = "osD^vP*X<>"[i % 10]
            label = f"{row['row']}, {row['median']:.1f} ms"
            axes.plot(row["kernels"], row["median"], marker, label=label, linestyle="none")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("kernel launches per token")
        axes.set_ylabel("ms per token")

    plot(path, draw, title)


def _verdicts(rows: dict[str, dict[str, Any]]) -> str:
    """The paper's claims beside what was found."""
    done = {name: row for name, row in rows.items() if "median" in row}
    base, lines = done["backbone"], []
    times = {name: row["median"] / base["median"] for name, row in done.items()}
    published = [times[name] for name in PUBLISHED if name in times]
    if published:
        low, high = min(published), max(published)
        above, below = high > CLAIMED_LAYER_WISE[1], low < CLAIMED_LAYER_WISE[0]
        word = {(0, 0): "yes", (1, 0): "higher", (0, 1): "lower", (1, 1): "wider"}[above, below]
        claim = "{} to {} times the backbone".format(*CLAIMED_LAYER_WISE)
        lines.append(["layer-wise, as published", claim, f"{low:.1f} to {high:.1f} times", word])
    if "layer_wise_gather" in times:
        found = f"{times['layer_wise_gather']:.1f} times"
        lines.append(["layer-wise, by gathering", "not in it", found, ""])
    if "layer_merge" in times:
        word = "better" if times["layer_merge"] <= CLAIMED_MERGE else "worse"
        found = f"{times['layer_merge']:.1f} times"
        claim = f"{CLAIMED_MERGE:.1f} times the backbone"
        lines.append(["naive merging per layer", claim, found, word])
    if "switch" in times:
        over = times["switch"] - 1
        word = "yes, or better" if over <= CLAIMED_SWITCH else "no"
        lines.append(["fused switch", percent(CLAIMED_SWITCH), percent(over), word])
    for name in (*PUBLISHED, "layer_wise_gather") if "switch" in times else ():
        if name in times:
            faster = times[name] / times["switch"]
            word = "yes, or better" if faster >= CLAIMED_FASTER else "no"
            claim = f"{CLAIMED_FASTER} times faster"
            lines.append([f"switch over `{name}`", claim, f"{faster:.1f} times", word])
    return table(["claim", "paper", "here", "agrees"], lines)


def _why(rows: dict[str, dict[str, Any]]) -> str:
    """What the launches and the GPU's busy time say of the figures."""
    done = {name: row for name, row in rows.items() if "device_us" in row and "median" in row}
    if "backbone" not in done:
        return ""
    base, text = done["backbone"], []
    idle = 1 - base["device_us"] / 1e3 / base["median"]
    if idle > 0.25:
        text.append(
            f"The GPU is idle for {100 * idle:.0f} % of the bare backbone's time: the host "
            "launches more slowly than the GPU works. What a row costs is then what it launches, "
            "which is the paper's explanation."
        )
    else:
        text.append(
            f"The GPU is busy for {100 * (1 - idle):.0f} % of the bare backbone's time: on this "
            "machine launching is not what limits it, unlike in the paper's explanation."
        )
    if "switch" in done:
        more = (done["switch"]["device_us"] - base["device_us"]) / 1e3
        seen = done["switch"]["median"] - base["median"]
        text.append(
            f"The switch gives the GPU {more:.2f} ms more work per token, since it moves every "
            f"adapted weight twice; {seen:.2f} ms of it show."
        )
        if seen < 0.5 * more:
            text.append(
                "The rest hides in time in which the GPU would have waited. Inside a CUDA graph "
                "there is no such time, and merging would cost all of it: that is why the engine "
                "adds the experts to the projections instead of merging them."
            )
    return " ".join(text) + "\n"


def _kernel_section(results: list[Result]) -> str:
    found = [r for r in results if r.content["benchmark"] == "switch"]
    if not found:
        return "\nNo result file of `benchmarks.switch` yet.\n"
    result = found[-1]
    facts = result.content["rows"][0]
    timed = [r for r in result.rows if r["what"] == "switch" and "median" in r]
    timed.sort(key=lambda r: r["median"])
    lines = [
        [
            f"`{r['cut']}`", f"{r['median']:,.0f} µs", f"{r['bytes_per_s'] / 1e12:.2f} TB/s",
            f"{100 * r['share_of_copy']:.1f} %", str(r.get("kernels", "")),
            f"{r['error_in_roundings']:.3f}",
        ]
        for r in timed
    ]  # fmt: skip
    text = (
        f"\n{result.caption()}\n\n{facts['linears']} linears, {facts['weights']:,} weights; a "
        f"switch must move {facts['moved_bytes']:,} bytes. Copying moves "
        f"{facts['copy_bytes_per_s'] / 1e12:.2f} TB/s in the same run. It keeps "
        f"{facts['pristine_bytes']:,} bytes for the second copy of the weights. Errors are in "
        "units of the float64 result rounded once.\n\n"
    )
    header = ["rows/cols/strip/warps/stages", "time", "moved", "of the copy", "launches", "error"]
    text += table(header, lines)
    drifts = [r for r in result.rows if r["what"] == "drift"]
    if drifts:
        header = ["switches", "rounding of one merge", "switch", "adding and subtracting"]
        lines = [
            [f"{r['switches']:,}"]
            + [f"{r[name]:.2e}" for name in ("rounding_of_one", "switch", "add_subtract")]
            for r in drifts
        ]
        text += "\nRelative error of one linear after many switches:\n\n" + table(header, lines)
    return text


def write_report(folder: Path, docs: Path) -> Path:
    """Writes docs/paper.md; without result files it says what is compared and how to run it."""
    names = [*ROWS, "stock", "lora", "layer_wise", "adafuse"]
    text = HEAD + "".join(f"| `{name}` | {ABOUT[name]} |\n" for name in names) + HOW
    results = read_results(folder) if folder.is_dir() else []
    latest = _latest(results)
    titles = {"transformers": "In transformers, eager", "vllm": "Inside vLLM, CUDA graphs"}
    for where, title in titles.items():
        text += f"\n## {title}\n"
        mine = {key: result for key, result in latest.items() if key[0] == where}
        if not mine:
            text += "\nNo result file yet.\n"
        elif lacking := sorted({model for _, model in latest} - {model for _, model in mine}):
            text += f"\nNo result file of {', '.join(lacking)} yet; more on whole engines is in "
            text += "[benchmarks.md](benchmarks.md).\n"
        for (_, model), result in sorted(mine.items()):
            rows = _measured(result, where, model)
            picture = docs / "plots" / f"paper-{where}-{model}.svg"
            name = f"{model}, {title[0].lower()}{title[1:]}"
            text += f"\n### {model}\n\n{result.caption()}\n\n{_main_table(rows)}"
            _draw(picture, rows, name)
            text += f"\n![time over launches](plots/{picture.name})\n"
            if where == "transformers":
                text += f"\n{_verdicts(rows)}\n{_why(rows)}"
    text += "\n## The switch kernel\n" + _kernel_section(results)
    path = docs / "paper.md"
    docs.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
