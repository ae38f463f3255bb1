"""What composed LoRAs are worth to requests that come without a label.

    python -m benchmarks.quality --composed --size full30 --text TEXT --jobs 8 --minutes 6.5
    python -m benchmarks.quality --composed --size toy --work /tmp/toy --out /tmp/results

One LoRA for each domain, trained alone; then, on the same held-out requests (of one domain, such as
change it half-way, and chat-templated ones behind a common system prompt): an oracle that is told
the domain, routers that see the past and that see the token alone (over frozen LoRAs, trained on
requests without labels), the average of all, TIES and DARE merging by PEFT, a classifier and the
nearest centroid in front of LoRAs by name, and one LoRA of all text and of all ranks. Everything
made is kept in --work; a run that was cut off goes on, and what it has is in a result file anyway.

--text names a folder, or a tar archive, with a folder of text for each further domain
(`python -m benchmarks.quality.manuals` makes one of manual pages).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm_adafuse.experts.context import RATE_TIMES_HIDDEN

from benchmarks.quality.corpus import SUFFIXES, Recipe
from benchmarks.quality.front import Choose, measure, nearest_centroid, train_classifier
from benchmarks.quality.loras import (
    LoraPlan,
    compose,
    force,
    merged,
    one_hot,
    right_half,
    round_experts,
    train_lora,
)
from benchmarks.quality.made import MADE
from benchmarks.quality.requests import KINDS, Before, Desk, Requests, judge
from benchmarks.quality.train import DEVICE, fit, generator, load_backbone
from benchmarks.quality.units import Unit, collect, corpus, keep, plan_steps

# A router makes so many times the steps of a LoRA, with fewer blocks: as many tokens.
ROUTER_STEPS = 2
TOKEN_RATE = 8.0  # times the rate of the LoRAs: of a router that sees the token alone
CLASSIFIER_STEPS = 2.0  # times those of a LoRA
HALF_LIVES = (16, 64)  # tokens, of memories that decay
FP8 = "context-k2-fp8"
MERGES = ("ties", "dare_ties", "dare_linear")
# Cost of a token, where 1 is training a LoRA of one domain: of all ranks together, of a router
# over all LoRAs, of judging.
COST_OF_ALL, COST_OF_ROUTER, COST_OF_JUDGING = 1.35, 1.6, 0.5

RECIPE = Recipe(
    suffixes=SUFFIXES | {
        "html": {".html", ".htm", ".xhtml", ".xml", ".svg"}, "js": {".js", ".mjs", ".ts", ".css"},
    },
    shares={"python": 0.45, "prose": 0.25}, made=tuple(MADE), needed=8, least=0.25,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A method.

    Attributes:
        label: in tables.
        told: it needs labels, of requests or of the text that it is fitted to.
    """

    label: str
    told: bool = False


def kinds(experts: int) -> dict[str, Kind]:
    """All methods, in the order of tables."""
    return {
        "oracle": Kind("the right LoRA, by label", True),
        "oracle-each": Kind("the right LoRA, told where the domain changes", True),
        "context-k1": Kind("context passport, k 1"),
        "context-k2": Kind("context passport, k 2"),
        f"context-k{experts}": Kind("context passport, all"),
        "token-k2": Kind("token passport, k 2"),
        f"token-k{experts}": Kind("token passport, all"),
        "uniform": Kind("average of all"),
        "ties": Kind("TIES merging"),
        "dare_ties": Kind("DARE and TIES merging"),
        "dare_linear": Kind("DARE merging"),
        "one-lora": Kind("one LoRA of all text and all ranks"),
        "centroid": Kind("nearest centroid in front", True),
        "classifier": Kind("classifier in front", True),
        FP8: Kind("context passport, k 2, experts in fp8"),
        "context-k2-plain": Kind("context, k 2, router trained on plain text"),
        **{f"context-k2-half{n}": Kind(f"context, k 2, memory of half-life {n}")
           for n in HALF_LIVES},
        "base": Kind("backbone, no LoRA"),
    }  # fmt: skip


# First and last, where time is short: what is compared, then what takes seconds, then the rest.
FIRST = ("oracle", "context-k2", "uniform", *MERGES, "centroid", "classifier", "token-k2",
         f"context-k2-half{HALF_LIVES[0]}")  # fmt: skip
LATE = (FP8, "context-k2-plain", "base", "oracle-each")


class Worker:
    """The pieces of one seed."""

    def __init__(self, unit: Unit):
        self.unit, self.size, self.work = unit, unit.size, unit.work
        self.data = corpus(unit.size, unit.work)
        self.loras = [unit.folder / domain for domain in self.data.domains]
        self.experts = len(self.loras)
        self.desk = Desk(self.data, unit.work)

    def judge(self, model: Any, before: Before | None = None) -> dict[str, Any]:
        return judge(model, self.desk.judged(), self.size.batch, before)

    def forced(self, gates: Callable[[Requests], torch.Tensor]) -> dict[str, Any]:
        model = compose(self.work, self.loras, top_k=self.experts)
        return self.judge(model, lambda own: force(model, gates(own)))

    def routed(self, name: str) -> dict[str, Any]:
        """A router over frozen LoRAs: "context-k2", "token-k2", "context-k2-plain", …; with `FP8` the
        one of "context-k2", over LoRAs that are rounded afterwards."""
        what, k, *how = name.split("-")
        size, seed = self.size, self.unit.seed
        context = "mean" if what == "context" else ""
        half_life = float(how[0][4:]) if how and how[0].startswith("half") else None
        model = compose(
            self.work, self.loras, top_k=int(k[1:]), router_context=context,
            context_half_life=half_life, seed=seed,
        )  # fmt: skip
        router, rng = model.all_routers[0], generator(2000 + seed)
        asked = ("plain",) if how == ["plain"] else KINDS
        count = max(1, size.batch // ROUTER_STEPS)
        steps = ROUTER_STEPS * self.unit.steps
        rate = RATE_TIMES_HIDDEN / size.hidden if context else TOKEN_RATE * size.choices[0][0]
        batch = lambda: self.desk.batch(count, rng, asked)  # noqa: E731
        figures, kept = {}, self.unit.folder / f"{what}-{k}-router.safetensors"
        if name == FP8 and kept.is_file():
            router.load_state_dict(load_file(kept))
        else:
            figures = fit(model, list(router.parameters()), batch, steps, rate, 0.0)
        if not how:
            part = kept.with_suffix(".part")
            save_file(router.state_dict(), part)
            part.rename(kept)
        if name == FP8:
            round_experts(model)
        return figures | self.judge(model)

    def fronted(self, choose: Choose) -> dict[str, Any]:
        requests = self.desk.judged()
        about = {"front": {kind: measure(choose, requests[kind]) for kind in KINDS}}
        return about | self.forced(lambda own: one_hot(choose(own.said())[:, None], self.experts))

    def merge(self, how: str) -> dict[str, Any]:
        model, weight = merged(self.work, self.loras, how, self.desk)
        return {"weight": weight, **self.judge(model)}

    def method(self, name: str) -> dict[str, Any]:
        """The figures of a method of `kinds`."""
        experts, unit = self.experts, self.unit
        if name == "oracle":
            return self.forced(lambda own: one_hot(own.domains[:, :1], experts))
        if name == "oracle-each":
            return self.forced(lambda own: right_half(own, experts))
        if name == "uniform":
            everyone = torch.full((1, 1, experts), 1.0 / experts, device=DEVICE)
            return self.forced(lambda own: everyone.expand(len(own.ids), -1, -1))
        if name == "base":
            return self.judge(load_backbone(self.work))
        if name in MERGES:
            return self.merge(name)
        if name == "one-lora":
            left = unit.deadline - time.time()
            plan = LoraPlan(tuple(self.data.domains), 2 * self.size.r * experts,
                            unit.steps * experts, unit.seed, left)  # fmt: skip
            model, steps = train_lora(self.data, self.work, plan, unit.folder / "all")
            return {"steps": steps, **self.judge(model)}
        if name == "centroid":
            embedding = load_backbone(self.work).get_input_embeddings().weight
            return self.fronted(nearest_centroid(self.data, embedding, unit.seed))
        if name == "classifier":
            steps = round(CLASSIFIER_STEPS * unit.steps)
            return self.fronted(train_classifier(self.data, steps, unit.seed))
        return self.routed(name)


def perform(unit: Unit, name: str) -> dict[str, Any] | None:
    """A method with one seed, in this process; None if it is too late for it."""
    return keep(unit, name, lambda: Worker(unit).method(name))


def perform_lora(unit: Unit, domain: str) -> dict[str, Any] | None:
    """The LoRA of one domain."""

    def make() -> dict[str, Any]:
        data = corpus(unit.size, unit.work)
        plan = LoraPlan((domain,), 2 * unit.size.r, unit.steps, unit.seed)
        return {"steps": train_lora(data, unit.work, plan, unit.folder / domain)[1]}

    return keep(unit, f"lora-{domain}", make)


def tokens_of_all(units: list[Unit], experts: int) -> float:
    """Of all pieces but the LATE, in tokens that a LoRA of one domain is trained on."""
    size, names = units[0].size, [name for name in kinds(experts) if name not in LATE]
    one = size.steps * size.batch * size.length
    routers = sum(name.startswith(("context", "token")) for name in names)
    judged = len(names) * len(KINDS) * experts * size.judge_blocks * size.length
    each = one * (experts * (1 + COST_OF_ALL) + routers * COST_OF_ROUTER)
    return len(units) * (each + COST_OF_JUDGING * judged)


def run_all(
    units: list[Unit], pool: Any, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, str], bool]:
    """Rows of all methods with all seeds, what failed, and whether all is there."""
    domains = corpus(units[0].size, units[0].work).domains
    names = kinds(len(domains))

    def tell(row: dict[str, Any]) -> str:
        losses = ", ".join(f"{k} {math.exp(row[k]['loss']):.3f}" for k in KINDS if k in row)
        return f"seed {row['seed']} {row['method']}: {losses or 'trained'}"

    ends: dict[Any, str] = {}  # one LoRA of all text takes the longest, and waits for nothing
    for u in units:
        ends[pool.submit(perform, u, "one-lora")] = f"seed {u.seed} one-lora"
    parts = {pool.submit(perform_lora, u, d): f"seed {u.seed} lora-{d}"
             for u in units for d in domains}  # fmt: skip
    made, failed = collect(parts, say, tell)
    complete = [u for u in units if sum(row["seed"] == u.seed for row in made) == len(domains)]
    order = [n for n in names if n != "one-lora"]
    order.sort(key=lambda n: (n in LATE, FIRST.index(n) if n in FIRST else len(FIRST)))
    for name in order:
        for u in complete:
            ends[pool.submit(perform, u, name)] = f"seed {u.seed} {name}"
    rows, more = collect(ends, say, tell)
    place = {name: i for i, name in enumerate(names)}
    rows.sort(key=lambda row: (row["seed"], place[row["method"]]))
    return rows, failed | more, len(rows) == len(names) * len(units)


def mixed(row: dict[str, Any]) -> float:
    """The mean loss of all kinds of requests, which come equally often."""
    return statistics.mean(row[kind]["loss"] for kind in KINDS)


def by_method(rows: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """method -> seed -> row, of seeds that have an oracle's too."""
    seeds = {row["seed"] for row in rows if row["method"] == "oracle"}
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row["seed"] in seeds:
            found.setdefault(row["method"], {})[row["seed"]] = row
    return found


def table(rows: list[dict[str, Any]], experts: int) -> str:
    """Markdown: perplexities, and how far from the oracle's, for each kind of requests."""
    found = by_method(rows)
    if not (oracle := found.get("oracle")):
        return "no seed has an oracle to compare with\n"
    lines = ["| method | all requests, of each seed | over the oracle | one domain | switched "
             "half-way | its second half | chat-templated | ms before a request |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, kind in kinds(experts).items():
        if not (seeds := found.get(name)):
            continue
        own = {seed: mixed(row) for seed, row in seeds.items()}

        def cell(loss: Callable[[dict[str, Any]], float], seeds=seeds) -> str:
            mean = statistics.mean(math.exp(loss(row)) for row in seeds.values())
            gap = statistics.mean(loss(row) - loss(oracle[s]) for s, row in seeds.items())
            return f"{mean:.3f} ({math.expm1(gap):+.1%})"

        cells = [kind.label, ", ".join(f"{math.exp(x):.3f}" for x in own.values()),
                 f"{gap_of(found, name):+.2%}"]  # fmt: skip
        cells += [cell(lambda row: row["plain"]["loss"]), cell(lambda row: row["switched"]["loss"]),
                  cell(lambda row: statistics.mean(second_half(row))),
                  cell(lambda row: row["chat"]["loss"])]  # fmt: skip
        times = [row["front"]["plain"]["ms"] for row in seeds.values() if "front" in row]
        cells.append(f"{statistics.median(times):.2f}" if times else "0")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def second_half(row: dict[str, Any]) -> list[float]:
    """Losses after the change of the domain."""
    parts = row["switched"]["parts"]
    return parts[len(parts) // 2 :]


def gap_of(found: dict[str, dict[int, dict[str, Any]]], name: str) -> float:
    """How much larger than the oracle's a method's perplexity is, all requests and seeds."""
    gaps = [mixed(row) - mixed(found["oracle"][seed]) for seed, row in found[name].items()]
    return math.expm1(statistics.mean(gaps))


def verdict(rows: list[dict[str, Any]], experts: int) -> list[str]:
    """The bars, each with whether it is met."""
    found, main = by_method(rows), "context-k2"
    if main not in found:
        return ["context-k2 was not judged"]
    gap = gap_of(found, main)
    lines = [f"context k 2 within 0.5 % of the oracle: {gap:+.2%}: {_met(gap <= 0.005)}"]
    rivals = [n for n, kind in kinds(experts).items()
              if n in found and not kind.told and not n.startswith("context")]  # fmt: skip
    losing = [
        f"{n} with seed {s}" for n in rivals for s, row in found[n].items()
        if s in found[main] and mixed(found[main][s]) >= mixed(row)
    ]  # fmt: skip
    but = f", not of {', '.join(losing)}" if losing else ""
    lines.append(f"context k 2 ahead of every method without labels ({', '.join(rivals)}), every "
                 f"seed: {_met(not losing)}{but}")  # fmt: skip
    ahead = [row["switched"]["loss"] < found["oracle"][s]["switched"]["loss"]
             for s, row in found[main].items()]  # fmt: skip
    lines.append("context k 2 ahead of the oracle of the first half on requests that switch: "
                 f"{sum(ahead)} of {len(ahead)} seeds: {_met(all(ahead))}")  # fmt: skip
    if both := [(row, found[main][s]) for s, row in found.get(FP8, {}).items() if s in found[main]]:
        lost = statistics.mean(mixed(row) - mixed(whole) for row, whole in both)
        lines.append(f"experts in fp8 against the same in float32: {math.expm1(lost):+.3%}")
    for n in HALF_LIVES:
        decay = found.get(f"{main}-half{n}", {})
        if both := [(decay[s], found[main][s]) for s in decay if s in found[main]]:
            said = ", ".join(
                f"{k} {math.expm1(statistics.mean(a[k]['loss'] - b[k]['loss'] for a, b in both)):+.2%}"
                for k in KINDS
            )
            lines.append(f"a memory of half-life {n} against the mean of all: {said}")
    return lines


def _met(yes: bool) -> str:
    return "met" if yes else "NOT MET"


def experiment(
    units: list[Unit], pool: Any, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, str], bool, str]:
    """As `run_all`, and the report."""
    rows, failed, done = run_all(units, pool, say)
    experts = len(corpus(units[0].size, units[0].work).domains)
    said = table(rows, experts) + "\n" + "\n".join(f"* {line}" for line in verdict(rows, experts))
    return rows, failed, done, said


def steps_of(units: list[Unit]) -> int:
    """How many steps a LoRA of one domain makes in the time there is."""
    first = units[0]
    domains = json.loads((first.work / "corpus.json").read_text())["counts"]
    tokens = tokens_of_all(units, len(domains))
    return plan_steps(first, tokens)
