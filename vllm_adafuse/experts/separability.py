"""How well a router can tell domains apart, measured on text that it was not fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm_adafuse.experts.router import Features, Router
from vllm_adafuse.experts.samples import WINDOW, Sample

# Accuracies above chance (0: guessing, 1: always right) that the verdict calls by these names.
CLEAR_TOKENS, CLEAR_WINDOWS, POOR_WINDOWS = 0.5, 0.8, 0.2
TELLING = 12  # tokens shown for each expert


@dataclass(frozen=True)
class Separability:
    """Confusion on held-out text. Rows: the text's domain; columns: the expert.

    Attributes:
        names: of the experts, E of them.
        tokens: [E][E] counts of tokens by the expert of the largest logit.
        windows: [E][E] counts of windows of 64 tokens by the largest sum of log-probabilities.
        weights: [E][E] mean mixing weight that the tokens of a domain give to each expert.
        telling: for each expert, ids of the frequent tokens that speak for it most.
    """

    names: tuple[str, ...]
    tokens: list[list[int]]
    windows: list[list[int]]
    weights: list[list[float]]
    telling: list[list[int]]

    @property
    def token_accuracy(self) -> float:
        """Mean over domains of the share of tokens whose first expert is the domain's own."""
        return balanced_accuracy(self.tokens)

    @property
    def window_accuracy(self) -> float:
        """The same of windows."""
        return balanced_accuracy(self.windows)

    @property
    def own_weight(self) -> float:
        """Mean over domains of the mixing weight on the domain's own expert."""
        return sum(row[e] for e, row in enumerate(self.weights)) / len(self.names)

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        if len(self.names) == 1:
            return "There is one expert, and every token meets it."
        first, own = f"{self.token_accuracy:.0%}", f"{self.own_weight:.0%}"
        if self._above_chance(self.token_accuracy) >= CLEAR_TOKENS:
            return (
                f"Most tokens tell their domain: {first} meet their own expert first, and it gets "
                f"{own} of the weight. Routing by token will help."
            )
        if self._above_chance(self.window_accuracy) >= CLEAR_WINDOWS:
            return (
                f"The domains are clear over {WINDOW} tokens, but a router sees one at a time: "
                f"{first} of the tokens meet their own expert first, and it gets {own} of the "
                "weight. Expect a blend that leans to the right expert."
            )
        if self._above_chance(self.window_accuracy) >= POOR_WINDOWS:
            return (
                f"The words of these domains tell them apart only in part: {first} of the tokens "
                "meet their own expert first. Try the mixture beside --router uniform."
            )
        return (
            "The words of these domains hardly tell them apart: a router that sees tokens alone "
            "mixes the experts almost at random. --router uniform is as good."
        )

    def _above_chance(self, accuracy: float) -> float:
        """0 for guessing, 1 for always right."""
        chance = 1 / len(self.names)
        return (accuracy - chance) / (1 - chance)

    def to_json(self) -> dict[str, Any]:
        """Figures for the adapter's config."""
        return {
            "held_out_tokens": sum(map(sum, self.tokens)),
            "token_accuracy": round(self.token_accuracy, 4),
            "window_accuracy": round(self.window_accuracy, 4),
            "own_weight": round(self.own_weight, 4),
            "chance": round(1 / len(self.names), 4),
        }


def balanced_accuracy(confusion: list[list[int]]) -> float:
    """Mean over rows of the diagonal's share."""
    return sum(row[e] / max(1, sum(row)) for e, row in enumerate(confusion)) / len(confusion)


def measure(
    names: tuple[str, ...],
    samples: list[Sample],
    router: Router,
    features: Features,
    top_k: int,
) -> Separability:
    """Routes the held-out text.

    Args:
        names: of the experts.
        samples: of their domains.
        router: what is judged.
        features: of tokens.
        top_k: experts per token.
    """
    vocabulary = torch.unique(torch.cat([s.held_out for s in samples]))
    logits = router.logits(features(vocabulary))
    log_p = torch.log_softmax(logits, -1)
    kept, ids = logits.topk(top_k, -1)
    gates = torch.zeros_like(logits).scatter(-1, ids, torch.softmax(kept, -1))
    experts = len(names)
    tokens, windows, weights, shares = [], [], [], []
    for sample in samples:
        places = torch.searchsorted(vocabulary, sample.held_out)
        tokens.append(_count(log_p[places].argmax(-1), experts))
        whole = places[: len(places) // WINDOW * WINDOW].reshape(-1, WINDOW)
        windows.append(_count(log_p[whole].sum(1).argmax(-1), experts))
        weights.append(gates[places].mean(0).tolist())
        counts = torch.bincount(places, minlength=len(vocabulary)).double()
        shares.append(counts / counts.sum())
    # Evidence of a token: how often it occurs, times how clearly it speaks for the expert.
    telling = []
    for e in range(experts):
        others = (log_p.exp().sum(-1) - log_p[:, e].exp()).clamp_min(1e-9).log()
        evidence = shares[e] * (log_p[:, e] - others).double()
        best = evidence.topk(min(TELLING, len(evidence)))
        telling.append(vocabulary[best.indices[best.values > 0]].tolist())
    return Separability(tuple(names), tokens, windows, weights, telling)


def _count(chosen: torch.Tensor, experts: int) -> list[int]:
    return torch.bincount(chosen, minlength=experts).tolist()


def text_report(found: Separability, telling: list[list[str]]) -> str:
    """Plain text tables.

    Args:
        found: what was measured.
        telling: the texts of `found.telling`.
    """
    held_out, windows = sum(map(sum, found.tokens)), sum(map(sum, found.windows))
    lines = [
        f"held-out text: {held_out} tokens, {windows} windows of {WINDOW}",
        "",
        "share of a domain's tokens whose first expert is …",
        *_table(found.names, shares_of(found.tokens)),
        f"own expert first: {found.token_accuracy:.1%} of tokens",
        "",
        f"share of a domain's windows of {WINDOW} tokens that are, all tokens together, of …",
        *_table(found.names, shares_of(found.windows)),
        f"right: {found.window_accuracy:.1%} of windows (by chance {1 / len(found.names):.1%})",
        "",
        "mean weight that a domain's tokens give to the expert …",
        *_table(found.names, found.weights),
        "",
        "tokens that speak for each expert most:",
        *(f"  {name}: {'  '.join(texts)}" for name, texts in zip(found.names, telling)),
        "",
        found.verdict,
    ]
    return "\n".join(lines)


def shares_of(confusion: list[list[int]]) -> list[list[float]]:
    """Every row's counts as shares of the row."""
    return [[count / max(1, sum(row)) for count in row] for row in confusion]


def _table(names: tuple[str, ...], rows: list[list[float]]) -> list[str]:
    width = max(7, *(len(name) for name in names)) + 2
    head = " " * width + "".join(name.rjust(width) for name in names)
    body = [
        name.ljust(width) + "".join(f"{share:.1%}".rjust(width) for share in row)
        for name, row in zip(names, rows)
    ]
    return [head, *body]
