"""The part of docs/benchmarks.md on whole engines: required figures, times, memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks import bars
from benchmarks.engine_options import Options, Size, name_of, sizes, too_large
from benchmarks.pages import Result, percent, plot, table

MIB = 1 << 20
# Issue 3's table: one H200, Llama-2-7B's shape, E = 8, r = 16, k = 2; overheads over stock vLLM.
MODEL, GPU, MIXTURE = "llama-2-7b", "H200", "E = 8, r = 16, k = 2"
SIZES = [("decode", n, 128) for n in (1, 8, 32, 128)] + [("prefill", 16, 1000)]
HEADER = ["", "batch 1", "8", "32", "128", "prefill 16 x 1000", "measured at"]
REQUIRED = [0.03, 0.04, 0.03, 0.02, 0.03]
PAPER = ["the paper, in its own runtime", "+29 %", "–", "–", "–", "–", "AAAI 2026"]
MEASURED = [  # engine, what it is compared with, what it is called
    ("lora", "stock", "vLLM's own LoRA, one static adapter, r = 16"),
    ("granite", "stock", "Granite Switch 0.1.1, 8 LoRAs, one active"),
    ("granite", "granite_bare", "the same over its own model without LoRAs"),
    ("layer_wise", "stock", "a router in every linear, in our kernels"),
    ("adafuse", "stock", "AdaFuse, 8 experts, top-2"),
]
LEAST_REPEATS = 5  # of a run that the table is made of
EXTRA_BOUND = 64 * MIB  # over banks and passports


def length_of(row: dict[str, Any], result: Result) -> int:
    """Tokens of each prompt; older files say it in their options alone."""
    if "length" in row:
        return row["length"]
    return result.options["prompt"] if row["what"] == "decode" else result.options["prefill"][1]


def asked(result: Result) -> list[Size]:
    """The sizes that a run was to measure."""
    options, prefill = result.options, result.options["prefill"]
    if isinstance(prefill[0], int):  # older files have one
        prefill = [prefill]
    return sizes(options | {"prefill": prefill})


def timed(result: Result) -> dict[tuple[int, str, Size], dict[str, Any]]:
    """Rows of times by group, engine (`NAME, text` with ids of text) and size; not of sizes that
    the run's cache did not hold."""
    large, found = too_large(result.options), {}
    for row in result.rows:
        if row["what"] in ("decode", "prefill", "mixed"):
            size = row["what"], row["batch"], length_of(row, result)
            text = ", text" if row.get("ids") == "text" else ""
            if size not in large:
                found[row.get("group", 0), row["engine"] + text, size] = row
    return found


def _overhead(
    runs: list[tuple[Result, dict]], kind: str, base: str, size: Size
) -> tuple[float, Result] | None:
    """Over another engine of the same turns, in the first run that has both; and that run.

    runs: with what is `timed` of them.
    """
    for result, rows in runs:
        for group in dict.fromkeys(group for group, *_ in rows):
            pair = [rows.get((group, name, size)) for name in (kind, base)]
            if None not in pair:
                return pair[0]["median"] / pair[1]["median"] - 1, result
    return None


def _verdict(value: float | None, limit: float) -> str:
    if value is None:
        return "not measured"
    return "met" if value <= limit else f"missed by {100 * (value - limit):.1f}"


def required_section(results: list[Result]) -> str:
    """The figures to reach beside the newest ones, which may be of several runs; empty where no
    run has one of ours.

    Args:
        results: of benchmarks.engine, oldest first.
    """
    fit = [
        (r, timed(r))
        for r in reversed(results)
        if (r.models, r.mixture) == (MODEL, MIXTURE) and GPU in r.gpu
        if r.options["repeats"] >= LEAST_REPEATS
    ]
    rows, ours = [PAPER], [None] * len(SIZES)
    for kind, base, name in MEASURED:
        found = [_overhead(fit, kind, base, size) for size in SIZES]
        runs = [r for r, _ in fit if any(one and one[1] is r for one in found)]
        ours = [one and one[0] for one in found]  # in the end those of the last, which is ours
        if runs:
            where = "; ".join(f"{r.content['commit']}, `{r.path.name}`" for r in runs)
            rows.append([name, *("–" if v is None else percent(v) for v in ours), where])
    if set(ours) == {None}:
        return ""
    rows.append(["**required**", *(f"≤ {100 * limit:.0f} %" for limit in REQUIRED), "issue 3"])
    verdicts = map(_verdict, ours, REQUIRED)
    rows.append(["AdaFuse against it", *verdicts, "points of percentage"])
    return (
        "\n## The figures to reach\n\nOverhead over the bare backbone in stock vLLM: one H200, "
        f"Llama-2-7B's shape, 32 layers, bf16, {MIXTURE}, all seven projections, random routes, "
        "full CUDA graphs. Each figure is of the newest run that has it, of those with "
        f"{LEAST_REPEATS} repeats or more, over an engine of the same turns.\n\n"
        f"{table(HEADER, rows)}"
    )


def is_unsteady(row: dict[str, Any]) -> bool:
    """Whether more than a fifth of a size's turns lie further than 5 % from their median."""
    median, times = row["median"], row["all"]
    return 5 * sum(abs(t - median) > 0.05 * median for t in times) > len(times)


def engine_section(result: Result, picture: Path) -> str:
    """Times, memory and a plot of one run."""
    by = timed(result)
    columns = list(dict.fromkeys(size for *_, size in by))
    # An engine of several groups, the first, has a row in each.
    names = list(dict.fromkeys((group, kind) for group, kind, _ in by))
    first = names[0][1] if names else ""
    rows, unsteady = [], False
    for name in names:
        cells = [name[1]]
        for size in columns:
            row = by.get((*name, size))
            stock = row is None or row["engine"] == first
            more = "" if stock else f" ({percent(row['overhead'])})"
            if row is not None and is_unsteady(row):
                more, unsteady = more + " ~", True
            cells.append("–" if row is None else f"{row['median']:.3f} ms{more}")
        rows.append(cells)
    header = ["engine", *map(name_of, columns)]
    mixed = "; or of all requests" if any(what == "mixed" for what, *_ in columns) else ""
    text = (
        "Milliseconds of a decode step, batch x tokens of its prompts; of a prefill, prompts x "
        f"tokens{mixed}. Overheads are over `{first}` of the same turns.\n\n{table(header, rows)}"
    )
    if unsteady:
        text += "\n~ More than one turn in five lies further than 5 % from the median.\n"
    if large := too_large(result.options):
        needs = (f"{name_of(size)} ({need:.1f} GiB)" for size, need in large.items())
        text += (
            f"\nLeft out, as the cache of {result.options['cache']:g} GiB did not hold all their "
            f"keys and values at once: {', '.join(needs)}.\n"
        )
    missing = [size for size in asked(result) if size not in columns and size not in large]
    if missing:
        text += f"\nThe run was cut off before {', '.join(map(name_of, missing))}.\n"
    for row in result.rows:
        if row["what"] == "failed":
            text += f"\n`{row['engine']}` did not start: {row['error'].splitlines()[0]}\n"
    known = {field.name for field in dataclasses.fields(Options)}
    options = Options(**{k: v for k, v in result.options.items() if k in known} | {"cache": None})
    for title, lines, told in bars.tables(options, result.rows):
        text += f"\nIssue 23's figures to reach, {title}: {told}.\n\n{table(['', *bars.HEADS], lines)}"
    text += memory_table(result)
    others = [name for name in names if name[1].removesuffix(", text") != first]
    if not others:
        return text

    def draw(axes):
        width = 0.8 / len(others)
        for i, name in enumerate(others):
            at = [x for x, size in enumerate(columns) if (*name, size) in by]
            values = [100 * by[(*name, columns[x])]["overhead"] for x in at]
            axes.bar([x + i * width for x in at], values, width, label=name[1])
        middle = width * (len(others) - 1) / 2
        labels = [name_of(size).replace(" ", "\n", 1) for size in columns]
        axes.set_xticks([x + middle for x in range(len(columns))], labels, fontsize=8)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylabel(f"% over {first}")

    plot(picture, draw, f"overhead of whole engines, {result.models}")
    return text + f"\n![overhead]({picture.parent.name}/{picture.name})\n"


def _mib(count: float | None) -> str:
    return "–" if count is None else f"{count / MIB:,.1f}"


def memory_table(result: Result) -> str:
    """What each engine holds on the device, against the first."""
    starts = [row for row in result.rows if row["what"] == "start"]
    if not starts:
        return ""
    base, rows = starts[0], []
    for row in starts:
        over = row["model_bytes"] - base["model_bytes"]
        parts = [row.get("bank_bytes"), row.get("passport_bytes")]
        known = row is not base and None not in parts and sum(parts) > 0
        peak = None
        if known and "step_bytes" in base:
            peak = over + row["step_bytes"] - base["step_bytes"] - sum(parts)
        cells = [row["engine"], f"{row['start_s']:.0f} s", f"{row['model_bytes']:,}"]
        cells += ["–" if row is base else _mib(over), *(_mib(part) for part in parts)]
        rows.append([*cells, _mib(over - sum(parts) if known else None), _mib(peak)])
    header = ["engine", "start", "loaded, bytes", "over the first, MiB", "experts", "passports"]
    return (
        f"\nMemory. Bound of the rest, and of the rest at the peak of a step: "
        f"{EXTRA_BOUND // MIB} MiB.\n\n"
        + table([*header, "rest", "rest at the peak"], rows)
    )
