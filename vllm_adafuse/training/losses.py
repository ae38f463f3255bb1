"""The auxiliary losses of a step's routes, and its expert usage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from vllm_adafuse.training.layers import Router


def at_least_one(items: torch.Tensor | int) -> torch.Tensor | int:
    """A number of labels to divide by: 1 where there are none."""
    return items.clamp(min=1) if isinstance(items, torch.Tensor) else max(1, items)


def routing_losses(
    routers: Sequence[Router], mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Load-balance loss, z-loss and usage of the routers' last decisions, means over routers.

    Balance (Switch Transformer, arXiv 2101.03961, equation 4; Mixtral's form for k > 1):
    E · Σ_e f_e P_e with f_e the share of the routed slots that expert e got and P_e its mean
    probability. 1 for perfect balance, E if one expert gets everything. z-loss (ST-MoE, arXiv
    2202.08906, equation 5): mean of (log Σ_e exp z_e)².

    In data-parallel training f is that of all ranks' tokens, so that gradients, averaged over
    ranks with equally many tokens, are those of one process with the joint batch.

    Args:
        routers: after a forward.
        mask: [batch, length], 0 for tokens that do not count (padding).

    Returns:
        balance: float32 scalar.
        z: float32 scalar.
        usage: float32 [R, E], f of each of the R decisions; no gradient.
    """
    experts = routers[0].logits.shape[-1]
    z = torch.cat([r.logits.reshape(-1, *r.logits.shape[-2:]) for r in routers], 1)  # [T, R, E]
    chosen = torch.cat([r.chosen.reshape(-1, *r.chosen.shape[-2:]) for r in routers], 1)
    if mask is not None and mask.dim() == 2 and mask.numel() == len(z):
        weights = mask.reshape(-1, 1, 1).to(z.dtype)
    else:
        weights = z.new_ones(len(z), 1, 1)
    total = weights.sum().clamp(min=1)
    with torch.no_grad():
        counts = (torch.zeros_like(z).scatter(-1, chosen, 1.0) * weights).sum(0)  # [R, E]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        usage = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    probabilities = (torch.softmax(z, -1) * weights).sum(0) / total
    balance = experts * (usage * probabilities).sum(-1).mean()
    z_loss = (torch.logsumexp(z, -1).square() * weights[..., 0]).sum() / (total * z.shape[1])
    return balance, z_loss, usage
