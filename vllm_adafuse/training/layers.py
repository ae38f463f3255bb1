"""Router and experts as they are trained: dense products, masked by the gates.

For T tokens, P linears that read one input (q, k, v) and E experts of rank r, every A is one
product [T, in] x [in, P·E·r]; what the route did not choose is multiplied by a gate of zero, and
every B is one product [T, E·r] x [E·r, out]. More arithmetic than the k chosen experts need, but
of the kind that a GPU does at full speed, with no gather, no sort and no loop over experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear


class Router(nn.Module):
    """Decides for each token: P decisions from one input (1, or one per linear).

    Attributes:
        weight: float32 [P, E, in].
        bias: float32 [P, E], or None.
        context: float32 [E, in] of a router that sees the past (P is 1), or None.
        mask: [batch, length] of the forward under way, 0 for padding, or None: all are tokens.
        gates: float32 [..., P, E], the last decision: weight times LoRA's scale, zero for
            experts that are not chosen.
        logits: float32 [..., P, E] of the last decision, divided by the temperature.
        chosen: int64 [..., P, k], the experts of the last decision.
        temperature: set by the model before each step.
    """

    def __init__(self, config, parts: int, size_in: int, generator: torch.Generator):
        super().__init__()
        experts = config.num_experts
        weight = torch.randn(parts, experts, size_in, generator=generator)
        self.weight = nn.Parameter(weight * (config.router_init * size_in**-0.5))
        self.bias = nn.Parameter(torch.zeros(parts, experts)) if config.router_bias else None
        self.context = self.mask = None
        if config.router_context:
            past = torch.randn(experts, size_in, generator=generator)
            self.context = nn.Parameter(past * (config.router_init * size_in**-0.5))
        if experts == 1:  # its weight is 1 whatever the router says: no gradient
            self.requires_grad_(False)
        self.config, self.temperature = config, config.temperature
        # Before the first decision there are none.
        self.gates: torch.Tensor = None
        self.logits: torch.Tensor = None
        self.chosen: torch.Tensor = None

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Decides.

        Args:
            u: [..., in], any dtype; taken in float32.

        Returns:
            The gates [..., P, E].
        """
        config = self.config
        parts, experts, size_in = self.weight.shape
        with torch.autocast(u.device.type, enabled=False):
            u = u.float()
            if self.training and config.jitter:
                u = u * torch.empty_like(u).uniform_(1 - config.jitter, 1 + config.jitter)
            z = linear(u, self.weight.view(parts * experts, size_in))
            z = z.view(*u.shape[:-1], parts, experts)
            if self.bias is not None:
                z = z + self.bias
            if self.context is not None:
                z = z + config.context_scale * self._mean(linear(u, self.context)).unsqueeze(-2)
            z = z / (self.temperature if self.training else config.temperature)
            # Stable, so that of equal logits the lower expert wins, as the format says.
            chosen = torch.sort(z, dim=-1, descending=True, stable=True).indices
            chosen = chosen[..., : config.top_k]
            if config.router_weights == "topk_softmax":
                weights = torch.softmax(z.gather(-1, chosen), -1)
                if config.top_k == 1 and experts > 1 and self.training:
                    # The weight is 1, whose gradient is 0: give it that of the probability.
                    p = torch.softmax(z, -1).gather(-1, chosen)
                    weights = weights + (p - p.detach())
            else:
                weights = torch.softmax(z, -1).gather(-1, chosen)
            self.logits, self.chosen = z, chosen
            self.gates = torch.zeros_like(z).scatter(-1, chosen, weights * config.scale)
        return self.gates

    def _mean(self, said: torch.Tensor) -> torch.Tensor:
        """The mean of [batch, length, E] over each sequence so far, as it is remembered."""
        real = torch.ones_like(said[..., :1]) if self.mask is None else self.mask[..., None]
        real, half_life = real.to(said.dtype), self.config.context_half_life
        if half_life is None:
            return (said * real).cumsum(1) / real.cumsum(1).clamp(min=1)
        told = faded_sums(torch.cat([said * real, real], -1), real, half_life)
        return told[..., :-1] / told[..., -1:].clamp(min=1)


def faded_sums(said: torch.Tensor, real: torch.Tensor, half_life: float) -> torch.Tensor:
    """What is said over each sequence so far, added up, where it counts half after a while.

    Args:
        said: [batch, length, n].
        real: [batch, length, 1], 0 for padding, in which no time passes; of the same dtype.
        half_life: in tokens.
    """
    # Each sum has `step` terms, and what came before it fades by `left` until its end.
    left, step = torch.where(real > 0, 0.5 ** (1 / half_life), 1.0).to(said.dtype), 1
    while step < said.shape[1]:
        said = torch.cat([said[:, :step], said[:, step:] + left[:, step:] * said[:, :-step]], 1)
        left = torch.cat([left[:, :step], left[:, step:] * left[:, :-step]], 1)
        step *= 2
    return said


class ExpertGroup(nn.Module):
    """The experts of linears that read the same input, as hooks on these linears.

    Attributes:
        names: full names of the P linears ("model.layers.0.self_attn.q_proj").
        A: float32 [P, E, r, in].
        B: P of float32 [out, E, r].
        own_router: it decides by its own input (layer-wise, per linear); the router is then a
            part of this module.
    """

    def __init__(self, config, names: Sequence[str], sizes, router: Router, own_router: bool,
                 generator: torch.Generator):  # fmt: skip
        super().__init__()
        self.names, self.own_router = tuple(names), own_router
        experts, r, size_in = config.num_experts, config.r, sizes[0][0]
        # Kaiming uniform with a = sqrt(5), as PEFT's LoRA: bound 1 / sqrt(in).
        a = torch.rand(len(names), experts, r, size_in, generator=generator) * 2 - 1
        self.A = nn.Parameter(a * size_in**-0.5)
        self.B = nn.ParameterList(torch.zeros(out, experts, r) for _, out in sizes)
        if own_router:
            self.router = router
        else:  # shared with other groups: not a part of this one
            object.__setattr__(self, "router", router)
        self.enabled = True
        self._input: torch.Tensor | None = None
        self._chosen: torch.Tensor | None = None

    def attach(self, modules: Sequence[nn.Module]) -> list:
        """Adds the deltas to the linears' outputs; returns the hooks' handles."""
        return [
            module.register_forward_hook(_Part(self, part)) for part, module in enumerate(modules)
        ]

    def shrink(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] in the rank space of all experts, gated: [..., P, E·r]."""
        parts, experts, r, size_in = self.A.shape
        gates = self.router(x) if self.own_router else self.router.gates
        h = linear(x, self.A.view(-1, size_in).to(x.dtype)).view(*x.shape[:-1], parts, experts, r)
        return (h * gates.to(h.dtype).unsqueeze(-1)).flatten(-2)

    def add(self, part: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """y [..., out] of one linear with the deltas of its experts.

        Args:
            part: index of the linear.
            x: [..., in], what the linear read; linears of a group share it.
            y: what it made of it.
        """
        if not self.enabled:
            return y
        if self._input is not x:
            self._input, self._chosen = x, self.shrink(x)
        h = self._chosen[..., part, :]
        if part == len(self.names) - 1:
            self._input = self._chosen = None
        b = self.B[part].flatten(1).to(h.dtype).t()
        rows = torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]).to(y.dtype),
                           b.to(y.dtype))  # fmt: skip
        return rows.view(y.shape)


class _Part:
    """The forward hook of one linear (a class, so that models can be deep-copied)."""

    def __init__(self, group: ExpertGroup, part: int):
        self.group, self.part = group, part

    def __call__(self, module: nn.Module, args: tuple, y: torch.Tensor) -> torch.Tensor:
        return self.group.add(self.part, args[0], y)
