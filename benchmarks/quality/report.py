"""docs/quality.md and its plots, from the newest result file of the largest size alone."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.pages import ROOT, read_results, table
from benchmarks.pages import Result as File
from benchmarks.quality.plots import draw_quality, draw_time, draw_usage
from benchmarks.quality.scores import Result
from benchmarks.quality.verdict import throughput, verdict

HEAD = """\
# Does a route decided once per token cost quality?

Written by `python -m benchmarks.quality --report` from files in `benchmarks/quality/results/`; do
not edit. One command pretrained a small Llama on text that machines carry, adapted it by every
method and judged on files that no training saw.
"""


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else mean


def main_table(result: Result) -> str:
    batches = list(dict.fromkeys(b for m in result.methods for b in m.decode))
    header = ["method", "rank at work / in all", "trained weights", "perplexity (seeds)",
              "right next token", *(f"decode step, batch {b}" for b in batches)]  # fmt: skip
    rows = [["backbone, not adapted", "", "", f"{math.exp(result.backbone['loss']):.3f}",
             f"{100 * result.backbone['accuracy']:.2f} %", *("" for _ in batches)]]  # fmt: skip
    for m in result.methods:
        about = m.about
        ranks = f"{about['active_rank']} / {about['total_rank']}" if about["active_rank"] else ""
        few = f" ({len(m.runs)} of {result.seeds} seeds)" if len(m.runs) < result.seeds else ""
        cells = [m.label + few, ranks, f"{m.runs[0]['trained']:,}", _spread(m.perplexities()),
                 f"{100 * m.accuracy():.2f} %"]  # fmt: skip
        for batch in batches:
            at = m.decode.get(batch)
            more = f" ({100 * (at['median'] / at['stock'] - 1):+.1f} %)" if at else ""
            cells.append(f"{at['median']:.3f} ms{more}" if at else "")
        rows.append(cells)
    return table(header, rows)


def domain_table(result: Result) -> str:
    bare = result.backbone["domains"]
    rows = [["backbone, not adapted", *(f"{math.exp(bare[d]['loss']):.3f}" for d in bare)]]
    for m in result.methods:
        rows.append([m.label, *(f"{m.perplexity(d):.3f}" for d in result.domains)])
    return table(["method", *result.domains], rows)


def timing_notes(result: Result) -> list[str]:
    """What the columns of decode steps leave out, and why."""
    if not any(m.decode for m in result.methods):
        return ["Decode steps in vLLM were not timed in this run."]
    bare = [m.decode["1"]["stock"] for m in result.methods if "1" in m.decode]
    notes = [
        "Decode steps in vLLM: medians of the first seed's adapter, and how much more than the "
        f"bare backbone's ({statistics.median(bare):.3f} ms at batch 1). docs/benchmarks.md has "
        "backbones of real sizes. What is distilled is served as AdaFuse, k = 2, all weights as "
        "the backbone.",
        f"A model of this size waits for the CPU, and repeats of one engine lie up to "
        f"{100 * _widest(result):.0f} % apart: smaller differences say nothing.",
    ]
    return notes + [f"Not timed: {name}, {error}" for name, error in result.not_timed.items()]


def _widest(result: Result) -> float:
    """Of all decode times the largest spread of repeats, over their median."""
    rows = [row for m in result.methods for row in m.decode.values()]
    return max((row["max"] - row["min"]) / row["median"] for row in rows)


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


def rates_table(result: Result) -> str:
    rows = [
        [m.label, f"{m.runs[0]['lr']:g}",
         f"{m.runs[0]['lr'] * m.runs[0]['router_rate']:g}" if "usage" in m.runs[0] else ""]
        for m in result.methods
    ]  # fmt: skip
    return table(["method", "learning rate chosen", "of routers"], rows)


def throughput_text(files: list[File]) -> str:
    """Training speed, of a file of its own: in the experiment several trainings run at once."""
    if not (found := throughput(files)):
        return "Training throughput beside PEFT was not measured.\n"
    file, rows = found
    peft = rows["peft"]["median"]
    shown = [
        [name, f"{r['median']:,.0f} ({r['min']:,.0f} to {r['max']:,.0f})",
         f"{100 * r['median'] / peft:.1f} %"]
        for name, r in rows.items()
    ]  # fmt: skip
    options = file.options
    return (
        f"Training throughput, one method at a time in turns: {file.models}, {file.mixture}, "
        f"{options['batch']} x {options['length']} tokens a step, the LoRA with rank k r; "
        f"{file.gpu or file.content['cpu']}; commit {file.content['commit']}; "
        f"`{file.path.name}`.\n\n" + table(["method", "tokens/s", "of PEFT LoRA"], shown)
    )


def corpus_table(result: Result) -> str:
    rows = [
        [domain, *(f"{c['files']:,} files, {c['tokens']:,} tokens" for c in splits.values())]
        for domain, splits in result.corpus["counts"].items()
    ]
    splits = list(next(iter(result.corpus["counts"].values())))
    return table(["domain", *splits], rows)


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


def _setting(result: Result) -> str:
    options = result.options
    seeds = f"{result.seeds} seeds" if result.seeds > 1 else "one seed"
    return (
        f"The backbone: {result.backbone['parameters']:,} parameters, {options['layers']} layers "
        f"of {options['hidden']}, {options['vocab']:,} tokens, {result.backbone['steps']:,} steps "
        f"of {options['pretrain_batch']} blocks of {options['length']} tokens. Adapted: "
        f"{options['steps']:,} steps of {options['batch']} blocks, E = {options['experts']}, "
        f"r = {options['r']}, {seeds}. What is distilled starts from a trained mixture, and so has "
        "seen twice the steps.\n"
    )


def _notes(result: Result) -> str:
    """What a reader must know of this run: what is missing, too small, or failed."""
    notes = [f"The text: {note}." for note in result.corpus.get("notes", ())]
    if result.options["size"] != "full":
        size = result.options["size"]
        notes.append(f"**Size `{size}`: too small to conclude anything from.**")
    if result.missing:
        notes.append(f"**Not trained** in the time there was: {'; '.join(result.missing)}.")
    few = [f"{m.label} ({len(m.runs)})" for m in result.methods if len(m.runs) < result.seeds]
    if few:
        notes.append(f"**Fewer than {result.seeds} seeds**: {'; '.join(few)}.")
    for task, error in result.failed.items():
        last = (error.strip() or "no message").splitlines()[-1]
        notes.append(f"Failed: {task}: `{last}`")
    return "".join(f"* {note}\n" for note in notes)


def page(result: Result, file: File, files: list[File], docs: Path) -> str:
    """The whole page; plots go to `docs/plots`.

    Args:
        result: of the experiment.
        file: where it stands.
        files: all result files, for training throughput.
        docs: folder of the page.
    """
    content, folder = result.content, docs / "plots"
    _, _, arguments = file.command.partition(" ")
    usage = draw_usage(result, folder)
    parts = [
        f"{HEAD}\n`{file.path.name}`, commit {content['commit']}, {file.gpu or content['cpu']}, "
        f"torch {content['versions']['torch']}: `python -m benchmarks.quality {arguments}`\n",
        _setting(result),
        _notes(result),
        f"## Who wins\n\n{verdict(result, files)}",
        "## All methods\n\nPerplexity is that of the mean loss over domains: mean of the seeds "
        f"(lowest to highest).\n\n{main_table(result)}",
        *(f"{note}\n" for note in timing_notes(result)),
        draw_quality(result, folder),
        draw_time(result, folder),
        f"## By domain\n\nPerplexity, mean of the seeds.\n\n{domain_table(result)}",
        "## Which experts work for which domain\n\nShare of the slots, first seed: dark is none, "
        "bright a half or more; of layer-wise mixtures the mean over routers.\n\n" * bool(usage),
        usage,
        f"## Distilling\n\n{distil_table(result)}" if distil_table(result) else "",
        f"## Training\n\n{throughput_text(files)}\n{_tuned(result.options)}\n\n"
        f"{rates_table(result)}",
        f"## The text\n\nNo file is in two splits; near copies of training files are not judged. "
        f"Corpus `{result.corpus['fingerprint']}`.\n\n{corpus_table(result)}",
    ]
    return "\n".join(part for part in parts if part)


def write(results: Path, docs: Path = ROOT / "docs") -> Path:
    """Writes the page of the newest file of the largest size.

    Raises:
        ValueError: no result file, or one without a finished training.
    """
    order = ["toy", "small", "full"]
    files = read_results(results)
    found = [f for f in files if f.kind == "quality"]
    if not found:
        raise ValueError(f"no quality-*.json in {results}; run python -m benchmarks.quality first")
    last = max(found, key=lambda f: (order.index(f.options["size"]), f.content["time"]))
    result = Result(last.content)
    if not result.methods:
        raise ValueError(f"{last.path} has no finished training; run python -m benchmarks.quality")
    path = docs / "quality.md"
    text = page(result, last, files, docs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
