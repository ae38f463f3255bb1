"""SGMM with a decision of its own per projection, added to the projection's output:

    y[t] += Σ_e B[e] s[t, p, e]                            s: what `route_layer` makes of low[t]

It is `low_product` (x into rank space, and the router), then this: the decision, and the expand of
the chosen experts. See sgmm.py for the form in which one decision serves all layers.
"""

from __future__ import annotations

import torch
from vllm_adafuse.kernels.expand import expand_torch, expand_triton
from vllm_adafuse.kernels.layerwise.operands import LayerGates, LayerProjection
from vllm_adafuse.kernels.layerwise.route import route_layer


def layer_sgmm(
    y: torch.Tensor,
    lora_a_out: torch.Tensor,
    logits: torch.Tensor | None,
    p: LayerProjection,
    layer: LayerGates,
) -> None:
    """Adds the experts' deltas of T tokens to a projection's output, in place.

    Args:
        y: [T, out], the projection's own output, changed; rows contiguous.
        low, logits, layer: as in `route_layer`.
        p: the projection.
    """
    weighted = route_layer(lora_a_out, logits, p, layer, y.dtype)
    if not p.linears:
        return
    if y.is_cuda:
        expand_triton(y, weighted, p.lora_b, layer.active, p.adapted, p.widths)
    else:
        expand_torch(y, weighted, p.lora_b, p.adapted, p.widths)
