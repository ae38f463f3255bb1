"""The drawings of docs/quality.md; each function returns the line that shows its picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from benchmarks.pages import new_figure, save_figure
from benchmarks.quality.scores import Result, Scores
from benchmarks.quality.verdict import NEAR

COLOURS = {"all weights": "black", "static": "tab:gray", "layer-wise": "tab:orange",
           "pre-gated": "tab:blue"}  # fmt: skip
MARKERS = "osD^v<>Ph*X"


def _save(figure: Any, path: Path, title: str) -> str:
    save_figure(figure, path)
    return f"![{title}](plots/{path.name})\n"


def _colour(method: Scores) -> str:
    return COLOURS[method.about["group"]]


def draw_quality(result: Result, folder: Path) -> str:
    """Perplexity of each method, a dot a seed, and what is allowed beside layer-wise mixtures."""
    methods = result.methods[::-1]
    figure, ((axes,),) = new_figure(1, 1, (7, 0.7 + 0.26 * len(methods)))
    for y, m in enumerate(methods):
        values = m.perplexities()
        axes.plot([min(values), max(values)], [y, y], color=_colour(m), linewidth=1)
        axes.plot(values, [y] * len(values), "o", color=_colour(m), markersize=5, alpha=0.8)
    if best := result.best("layer-wise"):
        limit = best.perplexity() * (1 + NEAR)
        axes.axvline(limit, color=COLOURS["layer-wise"], linestyle=":",
                     label=f"{best.label} + {100 * NEAR:g} %")  # fmt: skip
        axes.legend(fontsize=7)
    axes.set_yticks(range(len(methods)), [m.label for m in methods], fontsize=8)
    axes.set_xlabel("held-out perplexity, a dot a seed")
    axes.grid(alpha=0.3)
    return _save(figure, folder / "quality.svg", "quality")


def draw_time(result: Result, folder: Path) -> str:
    """Perplexity against decode time, of what was timed; empty if nothing was."""
    timed = [m for m in result.methods if "1" in m.decode]
    if not timed:
        return ""
    figure, ((axes,),) = new_figure(1, 1, (8, 3.6))
    for m, marker in zip(timed, MARKERS):
        values, at = m.perplexities(), m.decode["1"]
        error = [[m.perplexity() - min(values)], [max(values) - m.perplexity()]]
        axes.errorbar(at["median"], m.perplexity(), yerr=error, marker=marker, linestyle="",
                      color=_colour(m), label=m.label, capsize=2)  # fmt: skip
    axes.set_xlabel("ms per decode step, batch 1")
    axes.set_ylabel("held-out perplexity")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    return _save(figure, folder / "quality-time.svg", "quality against decode time")


def draw_usage(result: Result, folder: Path) -> str:
    """Expert usage per domain, first seed, one map a method; empty without mixtures."""
    shown = [m for m in result.methods if "usage" in m.runs[0]]
    if not shown:
        return ""
    columns = 3
    lines = math.ceil(len(shown) / columns)
    figure, axes = new_figure(lines, columns, (9, 1.9 * lines))
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, m in zip(axes.flat, shown):
        usage = [m.runs[0]["usage"][domain] for domain in result.domains]
        # Not a pixel for each of the screen: the picture is tracked.
        axis.imshow(usage, aspect="auto", vmin=0, vmax=0.5, cmap="viridis", interpolation="none")
        axis.set_title(m.label, fontsize=8)
        first = axis in axes[:, 0]  # the others have the same
        axis.set_yticks(range(len(result.domains)), result.domains if first else [], fontsize=7)
        axis.set_xticks(range(len(usage[0])), range(len(usage[0])), fontsize=7)
    return _save(figure, folder / "quality-usage.svg", "expert usage")
