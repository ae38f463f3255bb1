"""What launchers of layer-wise routing are handed: a projection with its rule, made once, and the
gates that stand between the projections of a block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class LayerGate:
    """How a projection's logits become gates.

    Attributes:
        top_k: k.
        experts: rows of each router: one entry for all linears together, or one a linear (0 for a
            linear without experts). Empty: the gates are those of another projection.
        always: experts past the routers' that are always on.
        softmax_first: softmax over all experts before the choice, not renormalised.
        absolute: |z| instead of z.
        temperature: logits are divided by it.
        shared: one A serves all experts but those always on.
        plain: s gets the scale alone, and only of chosen experts: the gates come in later.

    Raises:
        ValueError: numbers that do not fit together.
    """

    top_k: int
    experts: tuple[int, ...] = ()
    always: int = 0
    softmax_first: bool = False
    absolute: bool = False
    temperature: float = 1.0
    shared: bool = False
    plain: bool = False

    def __post_init__(self):
        if self.top_k < 0 or self.always < 0 or not self.temperature > 0:
            raise ValueError(f"{self}: k and always are 0 or more, the temperature above 0")
        if any(0 < count < self.top_k for count in self.experts):
            raise ValueError(f"{self}: a router has fewer experts than k")


@dataclass(frozen=True, eq=False)
class LayerGates:
    """What was decided last, in static buffers that the projections of a block share.

    Attributes:
        gates: [N, routers, E] float32, N >= T: plain gates.
        active: [1] int64, a bit for each expert with a gate (all in longer steps).
    """

    gates: torch.Tensor
    active: torch.Tensor


@dataclass(frozen=True, eq=False)
class LayerProjection:
    """A projection that is routed inside its layer.

    Attributes:
        rule: how its logits become gates.
        widths: columns of up to three slices of its output.
        adapted: of each slice the index of its linear in A, -1 for none.
        scales: [E'] float32, LoRA's scales; E' = E + always.
        lora_b: [sum of the adapted widths, E', R], dtype of the model.
        router_bias: [routers, E] float32, or None.
        logits: rows of the routers, S routers E of routers in S pieces (see `split_router`).
        fused_weight: [out + P EA R + logits or more, in]: W, A of the P linears, the routers; EA is
            E' or, where A is shared, 1 + always. None where W is quantised.
        bias: [out], or None.
        epilogue: "", or "silu" or "gelu_tanh" of gate_up, whose two slices are equally wide.
    """

    rule: LayerGate
    widths: tuple[int, ...]
    adapted: tuple[int, ...]
    scales: torch.Tensor
    lora_b: torch.Tensor
    router_bias: torch.Tensor | None = None
    logits: int = 0
    fused_weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    epilogue: str = ""

    @cached_property
    def linears(self) -> int:
        """P."""
        return max(self.adapted, default=-1) + 1

    @cached_property
    def rank(self) -> int:
        return self.lora_b.shape[2]

    @cached_property
    def size_out(self) -> int:
        return sum(self.widths)

    @cached_property
    def columns(self) -> int:
        """P EA R: of x in rank space."""
        each = 1 + self.rule.always if self.rule.shared else self.scales.shape[0]
        return self.linears * each * self.rank
