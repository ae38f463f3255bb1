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


def gate_torch(
    hidden: torch.Tensor,
    router_weight: torch.Tensor,
    router_bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    scales: torch.Tensor,
    norm_eps: float,
    temperature: float,
    top_k: int,
    softmax_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    u = normed(hidden, norm_weight, norm_eps)
    logits = (u.double() @ router_weight.double().t()).float()
    if router_bias is not None:
        logits = logits + router_bias
    return choose(logits / temperature, scales, top_k, softmax_first)


def _fake(hidden, router_weight, router_bias, norm_weight, scales, norm_eps, temperature, top_k, _):
    shape = (hidden.shape[0], top_k)
    return hidden.new_empty(shape, dtype=torch.int32), hidden.new_empty(shape, dtype=torch.float32)


_op = register_op(
    "gate(Tensor hidden, Tensor router_weight, Tensor? router_bias, Tensor? norm_weight, "
    "Tensor scales, float norm_eps, float temperature, int top_k, bool softmax_first) "
    "-> (Tensor, Tensor)",
    gate_torch,
    _fake,
)


def gate(
    hidden: torch.Tensor,
    router_weight: torch.Tensor,
    router_bias: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    scales: torch.Tensor,
    *,
    norm_eps: float,
    temperature: float,
    top_k: int,
    softmax_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes tokens by their embeddings.

    Args:
        hidden: [T, H], any float dtype: embeddings as they enter the first layer.
        router_weight: [E, H] float32.
        router_bias: [E] float32, or None.
        norm_weight: [H] float32 factors of layer 0's RMSNorm, or None to route on e itself.
        scales: [E] float32, multiplied into the weights (LoRA's alpha / r; ones for plain gates).
        norm_eps: epsilon of the norm.
        temperature: logits are divided by it.
        top_k: k.
        softmax_first: softmax over all E before the choice, not renormalised after it.

    Returns:
        Expert ids [T, k] int32, by falling logit, and their weights [T, k] float32.
    """
    return _op(
        hidden, router_weight, router_bias, norm_weight, scales,
        norm_eps, temperature, top_k, softmax_first,
    )  # fmt: skip
