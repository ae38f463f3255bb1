"""What every source format is read into: linears with experts, routers and always-on parts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Part:
    """One LoRA on one linear: y += scale · B A x.

    Attributes:
        a: [r, in].
        b: [out, r].
        alpha: lora_alpha.
        rslora: scale alpha / sqrt(r) instead of alpha / r.
    """

    a: torch.Tensor
    b: torch.Tensor
    alpha: float
    rslora: bool = False

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass
class Linear:
    """One adapted linear.

    Attributes:
        experts: its experts; None where one leaves this linear alone.
        router: [E, in], with router scope "linear".
        always: a LoRA beside the experts that every token uses.
    """

    experts: list[Part | None] = field(default_factory=list)
    router: torch.Tensor | None = None
    always: Part | None = None


@dataclass
class Mixture:
    """A whole adapter, as its library computes it.

    Attributes:
        kind: the source's format, for people ("MixLoRA").
        linears: "model.layers.0.mlp.up_proj" -> its parts.
        top_k: k, or one for each layer.
        routers: "model.layers.0.mlp" -> [E, hidden], with router scope "block".
        options: keys of adapter_config.json that differ from their defaults.
        expert_names: shown to people; None for expert_0, …
        exact: one sentence: what holds between source and result.
        notes: what was assumed or lost, one sentence each.
    """

    kind: str
    linears: dict[str, Linear]
    top_k: int | list[int]
    routers: dict[str, torch.Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    expert_names: list[str] | None = None
    exact: str = "the same function, up to rounding"
    notes: list[str] = field(default_factory=list)
