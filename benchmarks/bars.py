"""Issue 23's figures to reach, and how far a run is from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.engine_options import Options, Size, shapes

Cell = tuple[str, int, int]  # what, sequences, tokens of each prompt (decode and mixed: 0)
COLUMNS = [("decode", n, 0) for n in (1, 3, 8, 20, 50, 100, 200)] + [
    ("prefill", *shape) for shape in shapes("1x300,1x1500,8x700")
] + [("mixed", 400, 0)]  # fmt: skip
HEADS = ["1", "3", "8", "20", "50", "100", "200", "1x300", "1x1500", "8x700", "400 mixed"]

# Full models in bf16; (E, r, k) -> percent over stock.
MODELS = ("llama-3-8b", "qwen3-8b", "qwen2.5-7b", "mistral-7b")
FULL = {
    (8, 16, 2): [-3, -1, 0, 1, 1, 2, 3, 4, 4, 3, 2],
    (64, 16, 2): [0, 6, 14, 22, 30, 36, 38, 25, 25, 20, 18],
    (8, 64, 2): [3, 8, 14, 15, 12, 14, 16, 15, 15, 12, 12],
}
# The shape of 70B, 20 layers, on two GPUs, E 8 r 16 k 2.
SHARDED = [2, 2, 3, 4, 3, 3, 4, 5, 4, 4, 3]

ENOUGH, FURTHEST = 9, 3.0  # a row is met with so many cells, none further off (points)
HOST = 3.0  # percent of CPU time over stock's, in a step of any size


def bars_of(options: Options, kind: str) -> list[float] | None:
    """Of an engine's row, in the order of COLUMNS; None where the issue has no such row."""
    mixture = options.mixture(kind) if kind.startswith("adafuse") else None
    if mixture is None or options.dtype != "bfloat16" or options.quantization:
        return None
    if (options.model, options.layers, options.tp) == ("llama-3-70b", 20, 2):
        return SHARDED if mixture == (8, 16, 2) else None
    if options.model in MODELS and options.layers is None and options.tp == 1:
        return FULL.get(mixture)
    return None


def cell_of(row: dict[str, Any]) -> Size:
    """The column of a row of times."""
    return row["what"], row["batch"], row["length"] if row["what"] == "prefill" else 0


def verdict(found: dict[Cell, float], bars: list[float]) -> str:
    """Whether a row is met; of one that lacks cells, how those that it has are.

    found: points of percentage, of columns that were measured.
    """
    off = {cell: found[cell] - bar for cell, bar in zip(COLUMNS, bars) if cell in found}
    met = sum(points <= 0 for points in off.values())
    worst = max(off.values(), default=0.0)
    told = f"{met} of {len(off)} cells met"
    if worst > 0:
        told += f", the furthest missed by {worst:.1f}"
    if len(off) < len(COLUMNS):
        return f"{told}; {len(COLUMNS) - len(off)} cells not measured"
    return f"row {'met' if met >= ENOUGH and worst <= FURTHEST else 'MISSED'}: {told}"


def tables(
    options: Options, rows: Iterable[dict[str, Any]]
) -> list[tuple[str, list[list[str]], str]]:
    """For every engine with figures to reach and kind of ids: a title, lines of cells (bars, found,
    verdicts, CPU time of a step over stock's) in the order of HEADS behind a name, and the verdict.

    rows: of times; the last of a size counts.
    """
    by: dict[tuple[str, str], dict[Cell, dict[str, Any]]] = {}
    for row in rows:
        if "overhead" in row and "ids" in row:  # older files are of other settings than vLLM's own
            by.setdefault((row["engine"], row["ids"]), {})[cell_of(row)] = row
    made = []
    for (kind, ids), cells in by.items():
        if (bars := bars_of(options, kind)) is None:
            continue
        found = {cell: 100 * cells[cell]["overhead"] for cell in COLUMNS if cell in cells}
        if not found:
            continue
        hosts = {c: 100 * v["host_overhead"] for c, v in cells.items() if "host_overhead" in v}
        missed = {
            cell: found[cell] - bar for cell, bar in zip(COLUMNS, bars) if cell in found
        }  # fmt: skip
        words = ["–" if cell not in found else "met" if missed[cell] <= 0
                 else f"by {missed[cell]:.1f}" for cell in COLUMNS]  # fmt: skip
        lines = [
            ["bar", *(f"≤ {bar:g}" for bar in bars)],
            ["found, %", *(f"{found[c]:+.1f}" if c in found else "–" for c in COLUMNS)],
            ["missed", *words],
            [f"host, % (≤ {HOST:g})", *(f"{hosts[c]:+.1f}" if c in hosts else "–" for c in COLUMNS)],
        ]
        made.append((f"{options.model}, {kind}, {ids} ids", lines, verdict(found, bars)))
    return made


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """What a run prints of its rows, the first of which has its options."""
    options, printed = Options(**rows[0]["options"]), []
    for title, cells, told in tables(options, rows[1:]):
        printed += [f"{title}: {told}"]
        for line in [["", *HEADS], *cells]:
            printed.append(f"  {line[0]:<14}" + "".join(f"{cell:>10}" for cell in line[1:]))
    return printed
