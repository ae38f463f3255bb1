"""The router that sees a request's past: which k of E experts a token uses, after all before it.

    w_t = (W u_t + b) / temperature          c_t = scale * C u_t / temperature
    z_t = w_t + 1 / (t + 1) Σ_{s <= t} c_s                         t counts from the request's start
    T, g                                     of z_t as in `gate`

w and c follow from the token's id: rows of tables, float32. Sums are float64, so that after any
number of tokens z is as good as its terms.
"""

from __future__ import annotations

import torch
from vllm_adafuse.kernels.gate import choose, normed


def context_rows(
    hidden: torch.Tensor,
    router_weight: torch.Tensor,
    router_bias: torch.Tensor | None,
    context_weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    *,
    norm_eps: float,
    temperature: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of both tables.

    Args:
        hidden: [T, H], any float dtype: embeddings as they enter the first layer.
        router_weight, context_weight: [E, H] float32, W and C.
        router_bias: [E] float32, or None.
        norm_weight: as `gate` takes it.
        norm_eps: epsilon of the norm.
        temperature, scale: of the formula.

    Returns:
        w and c [T, E] float32, each rounded once from float64.
    """
    u = normed(hidden, norm_weight, norm_eps).double()
    w, c = u @ router_weight.double().t(), u @ context_weight.double().t()
    if router_bias is not None:
        w = w + router_bias
    return (w / temperature).float(), (c * (scale / temperature)).float()


def choose_by_past(
    w: torch.Tensor, c: torch.Tensor, scales: torch.Tensor, top_k: int, softmax_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes a request from its first token on.

    Args:
        w, c: [T, E] float32, rows of its tokens.
        scales: [E] float32, multiplied into the weights.
        top_k: k.
        softmax_first: as in `gate`.

    Returns:
        Expert ids [T, k] int32 by falling logit, and their weights [T, k] float32.
    """
    counts = torch.arange(1, len(c) + 1, device=c.device)[:, None]
    z = w.double() + c.double().cumsum(0) / counts
    return choose(z.float(), scales, top_k, softmax_first)
