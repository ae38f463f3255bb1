"""The router: which k of E experts a token uses, and with what weights.

    u = e, or RMSNorm(e) = e / sqrt(mean(e²) + eps) * norm_weight
    z = (W u + b) / temperature                      ties go to the lower expert
    T = the k largest of z
    g = softmax(z[T]), or softmax(z)[T]              weight = g * scale[T]

AdaFuse (arXiv 2603.11873) asks it once per token, at the entrance of the model. Everything is
float32 except the dot product W u, whose sum is float64: the logits then do not depend on how
many tokens stand in the batch, so that a live route equals the token's passport.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm_adafuse.kernels.registry import register_op


def normed(
    hidden: torch.Tensor, norm_weight: torch.Tensor | None, norm_eps: float
) -> torch.Tensor:
    """What a router reads of embeddings [T, H], in float32; see `gate`."""
    u = hidden.float()
    if norm_weight is not None:
        u = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + norm_eps) * norm_weight
    return u


def choose(
    logits: torch.Tensor, scales: torch.Tensor, top_k: int, softmax_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert ids and weights [T, k] of logits [T, E] that the temperature has divided."""
    # A stable sort, because topk promises no order among equals.
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    chosen, experts = ordered[:, :top_k], order[:, :top_k]
    if softmax_first:
        weights = torch.softmax(logits, dim=-1).gather(-1, experts)
    else:
        weights = torch.softmax(chosen, dim=-1)
    return experts.int(), weights * scales[experts]


@dataclass(frozen=True, eq=False)
class Gate:
    """A router and how its logits become gates.

    Attributes:
        weight: [E, H] float32.
        bias: [E] float32, or None.
        norm_weight: [H] float32 factors of the layer's RMSNorm, or None to route on e itself.
        scales: [E] float32, multiplied into the weights (LoRA's alpha / r; ones for plain gates).
        norm_eps: epsilon of the norm.
        temperature: logits are divided by it.
        top_k: k.
        softmax_first: softmax over all E before the choice, not renormalised after it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_weight: torch.Tensor | None
    scales: torch.Tensor
    norm_eps: float
    temperature: float
    top_k: int
    softmax_first: bool

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """As ops take them."""
        return [self.weight, self.bias, self.norm_weight, self.scales]

    @property
    def numbers(self) -> tuple[float, float, int, bool]:
        """As ops take them."""
        return self.norm_eps, self.temperature, self.top_k, self.softmax_first


def gate_torch(hidden: torch.Tensor, router: Gate) -> tuple[torch.Tensor, torch.Tensor]:
    """See `gate`."""
    u = normed(hidden, router.norm_weight, router.norm_eps)
    logits = (u.double() @ router.weight.double().t()).float()
    if router.bias is not None:
        logits = logits + router.bias
    return choose(logits / router.temperature, router.scales, router.top_k, router.softmax_first)


def _run(hidden, tensors, norm_eps, temperature, top_k, softmax_first):
    return gate_torch(hidden, Gate(*tensors, norm_eps, temperature, top_k, softmax_first))


def _fake(hidden, tensors, norm_eps, temperature, top_k, softmax_first):
    shape = (hidden.shape[0], top_k)
    return hidden.new_empty(shape, dtype=torch.int32), hidden.new_empty(shape, dtype=torch.float32)


_op = register_op(
    "gate(Tensor hidden, Tensor?[] router, float norm_eps, float temperature, int top_k, "
    "bool softmax_first) -> (Tensor, Tensor)",
    _run,
    _fake,
)


def gate(hidden: torch.Tensor, router: Gate) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes tokens by their embeddings.

    Args:
        hidden: [T, H], any float dtype: embeddings as they enter the layer.
        router: that decides.

    Returns:
        Expert ids [T, k] int32, by falling logit, and their weights [T, k] float32.
    """
    return _op(hidden, router.tensors, *router.numbers)
