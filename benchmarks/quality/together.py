"""Can a pre-gated mixture that is trained from nothing beat one LoRA of equal total rank?

    python -m benchmarks.quality --together --size full30 --text TEXT --jobs 8 --minutes 6.5

All are trained on text of all domains, with the same batches and equally many steps, and judged as
composed LoRAs are. The static LoRA is tried with three learning rates and counts with its best; the
mixtures have one. Cures of the early specialising of experts: an expert that is always on, a
context that is switched on late, or dropped for half of the blocks, a stronger balance loss, more
steps (of both), and weights whose mean over the chosen experts is 1, as a static LoRA's is.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm_adafuse.training import AdaFuseModel, MixtureConfig
from vllm_adafuse.training.layers import Router

from benchmarks.quality.composed import COST_OF_JUDGING, COST_OF_ROUTER, RECIPE
from benchmarks.quality.requests import KINDS, Desk, judge
from benchmarks.quality.sizes import Size
from benchmarks.quality.train import fit, generator, load_backbone
from benchmarks.quality.units import Unit, collect, corpus, keep, plan_steps

__all__ = ["RECIPE", "experiment", "steps_of"]

LATE, DROPPED = 0.5, 0.5  # share of the steps without context; of the blocks without it
STRONG_BALANCE = 0.1
NEVER = -1e4  # the logit of an expert that is on anyway


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        label: in tables.
        mixture: options of `MixtureConfig`.
        rate: times the size's learning rate.
        cures: of "shared", "late", "dropout".
        length: times the size's steps.
    """

    label: str
    mixture: dict[str, Any]
    rate: float = 1.0
    cures: tuple[str, ...] = ()
    length: int = 1


def arms(size: Size) -> dict[str, Arm]:
    """All ways, in the order of tables; what starts with "static" is a LoRA."""
    r, experts = size.r, size.experts
    lora = {"num_experts": 1, "top_k": 1, "r": experts * r}

    def mixture(k: int, context: bool = True, mean_one: bool = False, **more) -> dict[str, Any]:
        options = {"num_experts": experts, "top_k": k, "r": r, **more}
        options |= {"router_context": "mean"} if context else {}
        return options | ({"lora_alpha": 2.0 * r * k} if mean_one else {})

    rank = f"LoRA, r = {experts * r}"
    return {
        "static": Arm(rank, lora),
        "static-slow": Arm(f"{rank}, half the rate", lora, 0.5),
        "static-fast": Arm(f"{rank}, twice the rate", lora, 2.0),
        "token": Arm("token, k 2", mixture(2, False)),
        "context": Arm("context, k 2", mixture(2)),
        "token-mean-one": Arm("token, k 2, weights of mean 1", mixture(2, False, True)),
        "context-mean-one": Arm("context, k 2, weights of mean 1", mixture(2, True, True)),
        "context-shared": Arm("context, k 2, and an expert always on",
                              mixture(2, router_bias=True), cures=("shared",)),
        "context-late": Arm("context from the middle on", mixture(2), cures=("late",)),
        "context-dropout": Arm("context of half of the blocks", mixture(2), cures=("dropout",)),
        "context-balance": Arm(f"context, balance loss x {STRONG_BALANCE:g}",
                               mixture(2, balance_coef=STRONG_BALANCE)),
        "token-all": Arm("token, all experts, weights of mean 1", mixture(experts, False, True)),
        "context-all": Arm("context, all experts, weights of mean 1",
                           mixture(experts, True, True)),
        "context-all-late": Arm("the same, context from the middle on",
                                mixture(experts, True, True), cures=("late",)),
        "shared-late-mean-one": Arm("context from the middle on, weights of mean 1, an expert "
                                    "always on", mixture(2, True, True, router_bias=True),
                                    cures=("shared", "late")),
        "static-long": Arm(f"{rank}, twice the steps", lora, length=2),
        "context-long": Arm("context, k 2, twice the steps", mixture(2), length=2),
        "context-all-long": Arm("context, all experts, weights of mean 1, twice the steps",
                                mixture(experts, True, True), length=2),
    }  # fmt: skip


def always_on(router: Router) -> None:
    """The first expert works for every token with weight 1, and is not one of the chosen."""
    with torch.no_grad():
        router.bias[0, 0] = NEVER
    router.bias.requires_grad_(False)
    scale = 2.0  # as every LoRA here has it, whatever the others' is

    def forward(u: torch.Tensor) -> torch.Tensor:
        gates = Router.forward(router, u)
        router.gates = torch.cat([torch.full_like(gates[..., :1], scale), gates[..., 1:]], -1)
        return router.gates

    router.forward = forward


@dataclass
class Dimmer:
    """Takes the context away, from whole training steps or from blocks.

    Attributes:
        router: whose.
        cures: of the arm.
        rng: draws the blocks.
        progress: of the training, 0 to 1; the model tells.
    """

    router: Router
    cures: tuple[str, ...]
    rng: torch.Generator
    progress: float = field(default=0.0)

    def install(self, model: AdaFuseModel) -> None:
        """In the model's router; it hears of the progress from now on."""
        mean, told = self.router._mean, model.set_progress

        def set_progress(progress: float) -> None:
            self.progress = progress
            told(progress)

        def dimmed(said: torch.Tensor) -> torch.Tensor:
            if not self.router.training:
                return mean(said)
            factor = mean(said)
            if "late" in self.cures and self.progress < LATE:
                return 0 * factor
            if "dropout" in self.cures:
                on = torch.rand(len(said), generator=self.rng) >= DROPPED
                factor = factor * on.to(said.device)[:, None, None]
            return factor

        self.router._mean, model.set_progress = dimmed, set_progress


def train(unit: Unit, name: str) -> dict[str, Any]:
    """One arm with one seed: figures of training and of all requests."""
    size, work, arm = unit.size, unit.work, arms(unit.size)[name]
    data = corpus(size, work)
    desk = Desk(data, work)
    torch.manual_seed(unit.seed)
    config = MixtureConfig(**arm.mixture, seed=unit.seed)
    model = AdaFuseModel.from_backbone(load_backbone(work), config, str(work.resolve() / "base"))
    router, rng = model.all_routers[0], generator(1000 + unit.seed)
    if "shared" in arm.cures:
        always_on(router)
    if {"late", "dropout"} & set(arm.cures):
        Dimmer(router, arm.cures, generator(unit.seed)).install(model)
    rate, times = size.choices[0]
    params = model.parameter_groups(1.0, times)
    batch = lambda: data.batch("adapt", size.batch, rng)  # noqa: E731
    figures = fit(model, params, batch, arm.length * unit.steps, rate * arm.rate, 0.0)
    figures["trained"] = sum(p.numel() for p in model.trainable())
    return figures | judge(model, desk.judged(), size.batch)


def perform(unit: Unit, name: str) -> dict[str, Any] | None:
    """An arm with one seed, in this process; None if it is too late for it."""
    return keep(unit, name, lambda: train(unit, name))


def steps_of(units: list[Unit]) -> int:
    """How many steps there is time for."""
    first, size = units[0], units[0].size
    domains = json.loads((first.work / "corpus.json").read_text())["counts"]
    lengths = sum(arm.length for arm in arms(size).values())
    judged = len(arms(size)) * len(KINDS) * len(domains) * size.judge_blocks * size.length
    tokens = lengths * size.steps * size.batch * size.length
    total = len(units) * (COST_OF_ROUTER * tokens + COST_OF_JUDGING * judged)
    return plan_steps(first, total)


def experiment(
    units: list[Unit], pool: Any, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, str], bool, str]:
    """Rows of all arms with all seeds, what failed, whether all is there, and the report."""
    known = arms(units[0].size)

    def tell(row: dict[str, Any]) -> str:
        return f"seed {row['seed']} {row['method']}: {math.exp(row['plain']['loss']):.3f}"

    pieces: dict[Future, str] = {
        pool.submit(perform, u, name): f"seed {u.seed} {name}" for name in known for u in units
    }
    rows, failed = collect(pieces, say, tell)
    place = {name: i for i, name in enumerate(known)}
    rows.sort(key=lambda row: (place[row["method"]], row["seed"]))
    return rows, failed, len(rows) == len(pieces), report(rows, known)


def report(rows: list[dict[str, Any]], known: dict[str, Arm]) -> str:
    """Markdown: perplexities of text of one domain, and who beats the static LoRA."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["seed"]] = row["plain"]["loss"]
    lines = ["| method | perplexity of each seed | against the LoRA | seeds that it beats |",
             "|---|---|---|---|"]  # fmt: skip
    winners, judged = [], 0
    for name, own in found.items():
        rivals = [n for n in found if n.startswith("static")
                  and known[n].length == known[name].length]  # fmt: skip
        cells = [known[name].label, ", ".join(f"{math.exp(x):.3f}" for x in own.values())]
        best = min(rivals, key=lambda n: statistics.mean(found[n].values()), default=None)
        both = [s for s in own if best and s in found[best]]
        if both:
            gaps = [own[s] - found[best][s] for s in both]
            cells += [f"{math.expm1(statistics.mean(gaps)):+.2%}",
                      f"{sum(g < 0 for g in gaps)} of {len(gaps)}"]  # fmt: skip
            if not name.startswith("static"):
                judged += 1
                winners += [name] if all(g < 0 for g in gaps) else []
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    end = (f"{', '.join(winners)}: ahead of the static LoRA with every seed" if winners
           else "none is ahead of the static LoRA with every seed")  # fmt: skip
    return "\n".join(lines) + f"\n\n* of {judged} mixtures: {end}\n"
