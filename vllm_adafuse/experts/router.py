"""A router of format version 1 fitted to texts: softmax regression on what it reads of a token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm_adafuse.experts.samples import Sample
from vllm_adafuse.format.backbone import EMBEDDING, FIRST_NORM, Backbone, load_backbone_tensors

# Of the squared norm of the weights, beside the mean loss of a token. Features have norm 1: a token
# that makes up a share f of the text gets a logit of at most about f / penalty.
PENALTIES = tuple(10.0**-n for n in range(2, 9))
GAIN = 0.002  # of the validation loss: a weaker penalty that gains less is not taken
STEPS = 200


@dataclass(frozen=True)
class Router:
    """Weights of a router at the entrance.

    Attributes:
        weight: [E, hidden] float32.
        bias: [E] float32.
        penalty: the strength of the regularisation; None if nothing was fitted.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    penalty: float | None = None

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits [T, E] of features [T, hidden]."""
        return features @ self.weight.T + self.bias


def uniform_router(experts: int, hidden_size: int) -> Router:
    """Equal logits for every token."""
    return Router(torch.zeros(experts, hidden_size), torch.zeros(experts))


class Features:
    """What the router reads of a token, float32: its embedding, normed or not.

    Args:
        base: the backbone's directory.
        backbone: its shapes.
        router_input: "first_norm" or "embedding".

    Raises:
        AdapterError: a tensor is not there.
    """

    def __init__(self, base: Path, backbone: Backbone, router_input: str):
        names = [EMBEDDING, FIRST_NORM] if router_input == "first_norm" else [EMBEDDING]
        tensors = load_backbone_tensors(str(base), names, "compose-experts")
        self.embedding, self.norm = tensors[EMBEDDING], None
        self.eps, self.scaled = backbone.norm_eps, backbone.architecture.scaled_embedding
        if router_input == "first_norm":
            self.norm = tensors[FIRST_NORM].float() + backbone.architecture.norm_offset

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """u [T, hidden] of token ids [T]."""
        e = self.embedding[ids]
        if self.scaled:  # Gemma, in the checkpoint's dtype
            e = e * torch.tensor(math.sqrt(e.shape[-1]), dtype=e.dtype)
        u = e.float()
        if self.norm is not None:
            u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + self.eps) * self.norm
        return u


def fit_router(
    samples: list[Sample],
    features: Features,
    step: Callable[[], object] = lambda: None,
) -> Router:
    """Fits p(domain | token) with every domain equally likely beforehand.

    Such a router sees a token and not its neighbours, so the counts of (token, domain) are all
    that matters of a text. The loss is convex and the fit deterministic: L-BFGS on the counts, for
    each penalty, from the strongest on, as long as the loss on the validation text falls. With the
    best penalty the router is fitted once more with that text added.

    Args:
        samples: of the domains, in the experts' order.
        features: of tokens.
        step: called after each fit, at most `len(PENALTIES) + 1` times.

    Returns:
        The router; its softmax over all experts estimates the domain of a token.
    """
    vocabulary = torch.unique(torch.cat([torch.cat([s.fit, s.validation]) for s in samples]))
    u = features(vocabulary)
    center = u.mean(0)
    scale = float((u - center).norm(dim=1).mean().clamp_min(1e-12))
    x = (u - center) / scale
    fit, validation = (
        _shares([getattr(s, part) for s in samples], vocabulary) for part in ("fit", "validation")
    )
    best, lowest, start = PENALTIES[0], math.inf, torch.zeros(len(samples), x.shape[1] + 1)
    for penalty in PENALTIES:
        solution = _fit(x, fit, penalty, start)
        loss = float(_loss(solution, x, validation))
        step()
        if loss > (1 - GAIN) * lowest:
            break
        best, lowest, start = penalty, loss, solution
    both = _shares([torch.cat([s.fit, s.validation]) for s in samples], vocabulary)
    solution = _fit(x, both, best, start)
    step()
    weight = solution[:, :-1] / scale
    bias = solution[:, -1] - weight @ center
    return Router(weight, bias - bias.mean(), best)  # softmax knows no common shift


def _shares(texts: list[torch.Tensor], vocabulary: torch.Tensor) -> torch.Tensor:
    """Share of each (token, domain) [U, E] in the texts, every domain 1 / E of the whole."""
    columns = []
    for ids in texts:
        places = torch.searchsorted(vocabulary, ids)
        counts = torch.bincount(places, minlength=len(vocabulary)).float()
        columns.append(counts / counts.sum().clamp_min(1) / len(texts))
    return torch.stack(columns, 1)


def _loss(solution: torch.Tensor, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of a token's domain; solution [E, hidden + 1]."""
    logits = x @ solution[:, :-1].T + solution[:, -1]
    return -(shares * torch.log_softmax(logits, -1)).sum()


def _fit(
    x: torch.Tensor, shares: torch.Tensor, penalty: float, start: torch.Tensor
) -> torch.Tensor:
    solution = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [solution], max_iter=STEPS, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _loss(solution, x, shares) + penalty / 2 * solution[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return solution.detach()
