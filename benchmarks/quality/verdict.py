"""Who wins, and what was required: sentences and a table made from the figures alone."""

from __future__ import annotations

from typing import Any

from benchmarks.pages import Result as File
from benchmarks.pages import table
from benchmarks.quality.scores import Comparison, Result, Scores, compare

# What the project required before anything was trained.
MAIN = "adafuse-k2"  # the variant that these are required of
NEAR = 0.005  # relative to the perplexity of layer-wise mixtures
SEEDS = 3
OF_PEFT = 0.7  # of PEFT LoRA's tokens per second in training
LAYER_WISE = {
    "layerwise-linear": "layer-wise, per linear",
    "layerwise-block": "layer-wise, per block",
}
SAME_RANK = "lora-active"


def throughput(files: list[File]) -> tuple[File, dict[str, dict[str, Any]]] | None:
    """The newest file of `benchmarks.training` with PEFT and ours, and its rows by method."""
    for file in reversed(files):
        rows = {row["method"]: row for row in file.rows} if file.kind == "training" else {}
        if {"peft", "adafuse"} <= rows.keys():
            return file, rows
    return None


def verdict(result: Result, files: list[File] = ()) -> str:
    """The section "Who wins".

    Args:
        result: of the experiment.
        files: all result files, for training throughput.
    """
    ours, other = result.of(MAIN), result.best("layer-wise")
    lines = [f"{_winner(ours, other)}\n", required_table(result, files)]
    lines += [_choice(result), "\n".join(f"* {line}" for line in _others(result)) + "\n"]
    return "\n".join(line for line in lines if line.strip())


def _winner(ours: Scores | None, other: Scores | None) -> str:
    if not ours or not other or not (pair := compare(ours, other)):
        return (
            f"**Nobody yet**: {MAIN} or every layer-wise mixture was not trained, or with other "
            "seeds."
        )
    if min(pair.gaps) > 0:
        head = f"**Layer-wise routing wins**: {ours.label} is worse than {other.label}"
    elif max(pair.gaps) < 0:
        head = f"**One decision per token wins**: {ours.label} is better than {other.label}"
    else:
        both = f"{ours.label} and {other.label}"
        return f"**A draw** of {both}: each is better with some seed, {_figures(pair)}."
    count = len(pair.gaps)
    seeds = f"each of {count} seeds" if count > 1 else "the one seed there is"
    chance = f" By chance, {count} seeds agree in one of {2 ** (count - 1)} runs." * (count > 1)
    return f"{head} with {seeds}, {_figures(pair)}.{chance}"


def _figures(pair: Comparison) -> str:
    seeds = ", ".join(f"{100 * gap:+.2f}" for gap in pair.gaps)
    each = f"; by seed {seeds} %" if len(pair.gaps) > 1 else ""
    return f"{100 * pair.gap:+.2f} % ({pair.ours:.3f} against {pair.other:.3f}{each})"


def _met(is_met: bool) -> str:
    return "**met**" if is_met else "**not met**"


def required_table(result: Result, files: list[File]) -> str:
    """What was required, of the main variant and of the best one."""
    main, best = result.of(MAIN), result.best("pre-gated")
    columns = [main] if best is main else [main, best]
    rows = []
    for name, label in LAYER_WISE.items():
        cells = [f"perplexity at most {100 * NEAR:g} % above {label}"]
        rows.append(cells + [_near(m, result.of(name), label) for m in columns])
    cells = ["better than static LoRA of the same rank at work"]
    rows.append(cells + [_better(m, result) for m in columns])
    rows.append([f"{SEEDS} seeds, with their spread", *(_seeds(m, result) for m in columns)])
    cells = [f"training throughput at least {100 * OF_PEFT:g} % of PEFT LoRA's"]
    rows.append([*cells, _training(files), *("" for _ in columns[1:])])
    header = ["required", f"{main.label if main else MAIN}: main variant, chosen before the run"]
    if best is not main and best:
        header.append(f"{best.label}: the best variant, chosen after it")
    return table(header, rows)


def _near(ours: Scores | None, other: Scores | None, label: str) -> str:
    if not ours or not other:
        return f"no figure: {label if ours else 'this variant'} was not trained"
    pair = compare(ours, other)
    return f"{_figures(pair)}: {_met(pair.gap <= NEAR)}" if pair else "no figure: no seed in common"


def _better(ours: Scores | None, result: Result) -> str:
    """Against the static LoRA of its rank at work; if there is none, the next larger one."""
    statics = sorted(result.group("static"), key=lambda m: m.about["active_rank"])
    if not ours or not statics:
        return f"no figure: {'static LoRA' if ours else 'this variant'} was not trained"
    rank = ours.about["active_rank"]
    enough = [m for m in statics if m.about["active_rank"] >= rank]
    if not enough:
        most = statics[-1].about["active_rank"]
        return f"not comparable: rank {rank} at work, no LoRA above {most}"
    other = enough[0]
    if not (pair := compare(ours, other)):
        return "no figure: no seed in common"
    larger, more = other.about["active_rank"], ""
    if larger > rank:
        more = f" (a LoRA of rank {larger}: none of its {rank} was trained)"
    return f"{_figures(pair)}{more}: {_met(pair.gap < 0)}"


def _seeds(ours: Scores | None, result: Result) -> str:
    """The fewest, of this variant and of what it is compared with."""
    names = (*LAYER_WISE, SAME_RANK)
    needed = {m.label: len(m.runs) for m in (ours, *map(result.of, names)) if m}
    least = min(needed.values()) if len(needed) == 1 + len(names) else 0
    few = [label for label, count in needed.items() if count < SEEDS]
    which = f" ({'; '.join(few)})" if 0 < len(few) < len(needed) else ""
    return f"at least {least} of each that is compared{which}: {_met(least >= SEEDS)}"


def _training(files: list[File]) -> str:
    if not (found := throughput(files)):
        return "no figure: no training-*.json that has PEFT's"
    rows = found[1]
    ours, peft = (rows[name]["median"] for name in ("adafuse", "peft"))
    share = ours / peft
    return (
        f"{100 * share:.1f} % ({ours:,.0f} of {peft:,.0f} tokens/s, {found[0].models}): "
        f"{_met(share >= OF_PEFT)}"
    )


def _choice(result: Result) -> str:
    """What the reader must know of the best variant."""
    best, ours, theirs = (
        result.best("pre-gated"), len(result.group("pre-gated")), len(result.group("layer-wise"))
    )  # fmt: skip
    if not best or not theirs:
        return ""
    if best.name == MAIN:
        return f"The main variant is also the best of the {ours} pre-gated ones.\n"
    text = (
        f"The best variant is the best of {ours} pre-gated ones, against {theirs} layer-wise, and "
        "it was chosen on the same held-out text that it is judged on. That favours us: the main "
        "variant's column is what counts."
    )
    other = result.best("layer-wise")
    ranks = [m.about["active_rank"] for m in (best, other)]
    if ranks[0] > ranks[1]:
        text += f" It also has rank {ranks[0]} at work, layer-wise mixtures {ranks[1]}."
    if best.name.startswith("distilled"):
        text += " It also was distilled from a trained mixture, and so has seen twice the steps."
    return text + "\n"


def _others(result: Result) -> list[str]:
    """What else the figures say, a sentence each."""
    main, lines = result.of(MAIN), []
    if main and (other := result.of("lora-total")) and (pair := compare(main, other)):
        ranks = [m.about["total_rank"] for m in (main, other)]
        lines.append(
            f"{main.label} against static LoRA of rank {ranks[1]}, that of all experts together: "
            f"{_figures(pair)}."
        )
    contexts = [m for m in result.group("pre-gated") if m.name.startswith("context-")]
    for m in contexts if main else ():
        if pair := compare(m, main):
            lines.append(f"{m.label}, where it sees context, against {main.label}: "
                         f"{_figures(pair)}.")  # fmt: skip
    if result.methods:
        winner = min(result.methods, key=Scores.perplexity)
        lines.append(f"The lowest perplexity of all has {winner.label}: {winner.perplexity():.3f}.")
    return lines
