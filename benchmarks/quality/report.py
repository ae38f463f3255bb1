"""docs/quality.md and its plots, from the newest result file of the largest size alone."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import plot, read_results, table

ROOT = Path(__file__).parent.parent.parent
NEAR = 0.005  # relative difference of perplexity that the project allows itself
HEAD = """\
# Does a route decided once per token cost quality?

Written by `python -m benchmarks.quality --report` from a file in `benchmarks/quality/results/`; do
not edit. The file was made by one command, which pretrains a small Llama on text that machines
carry, adapts it by every method and judges on files that no training saw:
`python -m benchmarks.quality --size full --work /tmp/quality --jobs 8 --minutes 15 --speed`
"""
COLOURS = {"all weights": "black", "static": "tab:gray", "layer-wise": "tab:orange",
           "pre-gated": "tab:blue"}  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """One method over its seeds.

    Attributes:
        about: its row: label, group, ranks.
        runs: a row per seed.
        decode: batch -> figures of `speed`, or empty.
    """

    about: dict[str, Any]
    runs: list[dict[str, Any]]
    decode: dict[str, dict[str, Any]]

    @property
    def label(self) -> str:
        return self.about["label"]

    def perplexities(self, domain: str | None = None) -> list[float]:
        """Of each seed: of a domain, or of the mean loss over domains."""
        return [math.exp(r["domains"][domain]["loss"] if domain else r["loss"]) for r in self.runs]

    def perplexity(self, domain: str | None = None) -> float:
        return statistics.mean(self.perplexities(domain))

    def accuracy(self) -> float:
        return statistics.mean(r["accuracy"] for r in self.runs)


class Result:
    """The rows of a result file, by what they are."""

    def __init__(self, content: dict[str, Any]):
        self.content, rows = content, content["rows"]
        self.options = rows[0]["options"]
        (self.corpus,) = [r for r in rows if r.get("what") == "corpus"]
        (self.backbone,) = [r for r in rows if r.get("what") == "backbone"]
        timed = {r["method"]: r["decode"] for r in rows if r.get("what") == "speed"}
        speed = {name: figures for name, figures in timed.items() if "error" not in figures}
        self.not_timed = {n: f["error"] for n, f in timed.items() if "error" in f}
        every = [
            Scores(r, [x for x in rows if x.get("what") == "run" and x["method"] == r["method"]],
                   speed.get(r["method"], {}))
            for r in rows if r.get("what") == "method"
        ]  # fmt: skip
        self.methods = [m for m in every if m.runs]
        self.missing = [m.label for m in every if not m.runs]
        self.seeds = max((len(m.runs) for m in self.methods), default=0)
        self.failed = {r["task"]: r["error"] for r in rows if r.get("what") == "failed"}
        self.domains = list(self.corpus["counts"])

    def best(self, group: str) -> Scores | None:
        """The method of a group with the lowest perplexity."""
        some = [m for m in self.methods if m.about["group"] == group]
        return min(some, key=Scores.perplexity) if some else None

    def of(self, name: str) -> Scores | None:
        return next((m for m in self.methods if m.about["method"] == name), None)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _against(name: str, ours: Scores, other: Scores) -> str:
    """One sentence: how far apart two methods are, and whether seeds overlap."""
    a, b = ours.perplexities(), other.perplexities()
    gap = statistics.mean(a) / statistics.mean(b) - 1
    overlap = max(a) >= min(b) and max(b) >= min(a)
    seeds = "their seeds overlap" if overlap else "their seeds do not overlap"
    one = len(a) == 1
    word = "lower" if gap < 0 else "higher"
    return (
        f"{ours.label} has a perplexity of {statistics.mean(a):.3f}, {abs(100 * gap):.2f} % {word} "
        f"than {name} ({other.label}, {statistics.mean(b):.3f}); "
        f"{'one seed each' if one else seeds}."
    )


def verdict(result: Result) -> str:
    """What the table says, in sentences made from it."""
    ours, layer_wise = result.best("pre-gated"), result.best("layer-wise")
    lines = []
    if not result.methods:
        return "Nothing was trained yet.\n"
    if ours and layer_wise:
        gap = ours.perplexity() / layer_wise.perplexity() - 1
        met = "met" if gap <= NEAR else "not met"
        lines.append(
            f"{_against('the best layer-wise mixture', ours, layer_wise)} "
            f"The aim, at most {100 * NEAR:g} % higher, is **{met}**."
        )
    plain, same = result.of("adafuse-k2"), result.best("layer-wise")
    if plain and same and plain is not ours:
        lines.append(_against("the best layer-wise mixture, at the same rank at work", plain, same))
    for name, text in (("lora-active", "static LoRA of the same active rank"),
                       ("lora-total", "static LoRA of the same total rank")):  # fmt: skip
        if ours and (other := result.of(name)):
            better = "better" if ours.perplexity() < other.perplexity() else "not better"
            lines.append(f"{_against(text, ours, other)} It is **{better}**.")
    contexts = [m for m in result.methods if m.about["method"].startswith("context-")]
    if contexts and plain:
        best = min(contexts, key=Scores.perplexity)
        lines.append(_against("the plain one, which sees no context", best, plain))
    winner = min(result.methods, key=Scores.perplexity)
    lines.append(f"The lowest perplexity of all has: {winner.label}, {winner.perplexity():.3f}.")
    return "\n".join(f"* {line}" for line in lines) + "\n"


def main_table(result: Result) -> str:
    header = ["method", "rank at work / in all", "trained weights", "perplexity (seeds)",
              "right next token", *result.domains]  # fmt: skip
    batches = list(next((m.decode for m in result.methods if m.decode), {}))
    header += [f"decode step, batch {b}" for b in batches]
    bare = {d: math.exp(v["loss"]) for d, v in result.backbone["domains"].items()}
    rows = [["backbone, not adapted", "", "", f"{math.exp(result.backbone['loss']):.3f}",
             f"{100 * result.backbone['accuracy']:.2f} %", *(f"{bare[d]:.3f}" for d in bare),
             *("" for _ in batches)]]  # fmt: skip
    for m in result.methods:
        about = m.about
        ranks = f"{about['active_rank']} / {about['total_rank']}" if about["active_rank"] else ""
        few = f" ({len(m.runs)} of {result.seeds} seeds)" if len(m.runs) < result.seeds else ""
        cells = [m.label + few, ranks, f"{m.runs[0]['trained']:,}", _spread(m.perplexities()),
                 f"{100 * m.accuracy():.2f} %"]  # fmt: skip
        cells += [f"{m.perplexity(d):.3f}" for d in result.domains]
        for batch in batches:
            at = m.decode.get(batch)
            more = f" ({100 * (at['median'] / at['stock'] - 1):+.1f} %)" if at else ""
            cells.append(f"{at['median']:.3f} ms{more}" if at else "")
        rows.append(cells)
    return table(header, rows)


def distil_table(result: Result) -> str:
    rows = []
    for m in result.methods:
        for run in m.runs:
            if "kl" in run:
                perplexities = (math.exp(run[k]) for k in
                                ("teacher_loss", "loss_before_distilling", "loss"))  # fmt: skip
                rows.append([m.label, str(run["seed"]), *(f"{p:.3f}" for p in perplexities),
                             f"{run['kl']:.4f}"])  # fmt: skip
    header = ["distilled", "seed", "teacher", "at the start", "student", "KL, nats per token"]
    return table(header, rows) if rows else ""


def training_table(result: Result) -> str:
    rows = [
        [m.label, f"{m.runs[0]['lr']:g}",
         f"{m.runs[0]['lr'] * m.runs[0]['router_rate']:g}" if "usage" in m.runs[0] else "",
         f"{statistics.median(r['tokens_per_s'] for r in m.runs):,.0f}"]
        for m in result.methods if "tokens_per_s" in m.runs[0]
    ]  # fmt: skip
    header = ["method", "learning rate chosen", "of routers", "tokens/s (several ran at once)"]
    return table(header, rows)


def corpus_table(result: Result) -> str:
    rows = [
        [domain, *(f"{c['files']:,} files, {c['tokens']:,} tokens" for c in splits.values())]
        for domain, splits in result.corpus["counts"].items()
    ]
    splits = list(next(iter(result.corpus["counts"].values())))
    return table(["domain", *splits], rows)


def draw_quality(result: Result, folder: Path) -> str:
    """Perplexity against decode time; against the rank at work where no time was taken."""
    timed = [m for m in result.methods if m.decode]
    shown = timed or [m for m in result.methods if m.about["active_rank"]]
    path = folder / "quality.svg"

    def draw(axes: Any) -> None:
        for m in shown:
            x = m.decode["1"]["median"] if timed else m.about["active_rank"]
            values = m.perplexities()
            mean = statistics.mean(values)
            group = m.about["group"]
            error = [[mean - min(values)], [max(values) - mean]]
            handles, labels = axes.get_legend_handles_labels()
            axes.errorbar(x, mean, yerr=error, marker="o", color=COLOURS[group], capsize=2,
                          label=None if group in labels else group, linestyle="")  # fmt: skip
            axes.annotate(m.label, (x, mean), fontsize=6, xytext=(4, 3),
                          textcoords="offset points")  # fmt: skip
        axes.set_xlabel("ms per decode step, batch 1" if timed else "rank at work for a token")
        axes.set_ylabel("held-out perplexity")

    plot(path, draw, "quality against decode time" if timed else "quality against active rank")
    return f"![quality](plots/{path.name})\n"


def draw_usage(result: Result, folder: Path) -> str:
    """Expert usage per domain, first seed, one map a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "vllm-adafuse"
    shown = [m for m in result.methods if "usage" in m.runs[0]]
    if not shown:
        return ""
    columns = 3
    lines = math.ceil(len(shown) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(9, 1.9 * lines), layout="constrained",
                                squeeze=False)  # fmt: skip
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, m in zip(axes.flat, shown):
        usage = [m.runs[0]["usage"][domain] for domain in result.domains]
        axis.imshow(usage, aspect="auto", vmin=0, vmax=0.5, cmap="viridis")
        axis.set_title(m.label, fontsize=8)
        axis.set_yticks(range(len(result.domains)), result.domains, fontsize=7)
        axis.set_xticks(range(len(usage[0])), range(len(usage[0])), fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "quality-usage.svg", metadata={"Date": None})
    plt.close(figure)
    return "![expert usage](plots/quality-usage.svg)\n"


def _tuned(options: dict[str, Any]) -> str:
    """How rates were chosen, in a sentence."""
    count = options.get("plan", {}).get("choices_tried", 0)
    shown = [f"{rate:g} (routers {rate * times:g})" for rate, times in options["choices"][:count]]
    if not shown:
        return "No learning rates were tried: all methods have the same."
    return (
        f"Before, every method was tried with the learning rates {', '.join(shown)} on other text "
        f"than is judged here; for all weights times {options['full_rate']:g}."
    )


def page(result: Result, name: str, docs: Path) -> str:
    """The whole page; plots go to `docs/plots`."""
    options, content = result.options, result.content
    where = content.get("gpu") or content["cpu"]
    versions = content["versions"]
    size = (
        f"The backbone: {result.backbone['parameters']:,} parameters, {options['layers']} layers "
        f"of {options['hidden']}, {options['vocab']:,} tokens, {result.backbone['steps']:,} steps "
        f"of {options['pretrain_batch']} blocks of {options['length']} tokens. Adapted: "
        f"{options['steps']:,} steps of {options['batch']} blocks, E = {options['experts']}, "
        f"r = {options['r']}, {result.seeds} seeds. What is distilled starts from a trained "
        "mixture, and so has seen twice the steps."
    )
    notes = [f"* The text: {note}." for note in result.corpus.get("notes", ())]
    if result.missing:
        notes.append(f"* Not trained, for lack of time: {', '.join(result.missing)}.")
    notes += [f"* Failed: {task}: `{error.strip().splitlines()[-1]}`"
              for task, error in result.failed.items()]  # fmt: skip
    warning = "" if options["size"] == "full" else (
        f"\n**Size `{options['size']}`: too small to conclude anything from.**\n"
    )  # fmt: skip
    folder = docs / "plots"
    parts = [
        f"{HEAD}\n`{name}`, commit {content['commit']}, {where}, torch {versions['torch']}.\n"
        f"{warning}\n{size}\n",
        "\n".join(notes) + "\n" if notes else "",
        f"## Who wins\n\n{verdict(result)}",
        f"## All methods\n\nPerplexity is that of the mean loss over domains: mean of the seeds, "
        f"lowest to highest. Of a domain: mean of the seeds.\n\n{main_table(result)}",
        *(f"Not timed: {name}, {error}\n" for name, error in result.not_timed.items()),
        draw_quality(result, folder),
        "## Which experts work for which domain\n\nShare of the slots, first seed; of layer-wise "
        f"mixtures the mean over routers.\n\n{draw_usage(result, folder)}",
        f"## Distilling\n\n{distil_table(result)}" if distil_table(result) else "",
        f"## Training\n\n{_tuned(options)}\n\n"
        f"{training_table(result)}",
        f"## The text\n\nNo file is in two splits; near copies of training files are not judged. "
        f"Corpus `{result.corpus['fingerprint']}`.\n\n{corpus_table(result)}",
    ]
    return "\n".join(part for part in parts if part)


def write(results: Path, docs: Path = ROOT / "docs") -> Path:
    """Writes the page of the newest file of the largest size.

    Raises:
        ValueError: no result file.
    """
    order = ["toy", "small", "full"]
    found = [r for r in read_results(results) if r.content["benchmark"] == "quality"]
    if not found:
        raise ValueError(f"no quality-*.json in {results}; run python -m benchmarks.quality first")
    last = max(found, key=lambda r: (order.index(r.options["size"]), r.content["time"]))
    path = docs / "quality.md"
    path.write_text(page(Result(last.content), last.path.name, docs), encoding="utf-8")
    return path
