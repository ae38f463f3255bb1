"""SGMM with a decision of its own per projection, added to the projection's output:

    y[t] += Σ_e B[e] s[t, p, e]                            s: what `route_layer` makes of low[t]

It is `low_product` (x into rank space, and the router), then this: the decision, and the expand of
the chosen experts. See sgmm.py for the form in which one decision serves all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm_adafuse.kernels.expand import expand_torch, expand_triton
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.route_layer import GATE_SCHEMA, LayerGate, route


def _run(y, low, logits, bias, scales, gates, present, lora_b, parts, widths, *gate) -> None:
    rule = LayerGate(gate[0], tuple(gate[1]), *gate[2:])
    count, rank = max(parts, default=-1) + 1, lora_b.shape[2]
    s = route(low, logits, bias, scales, gates, present, count, rank, y.dtype, rule)
    if not count:
        return
    if y.is_cuda:
        expand_triton(y, s, lora_b, present, parts, widths)
    else:
        expand_torch(y, s, lora_b, parts, widths)


def _fake(*arguments) -> None:
    return None


# See `route_layer` for what torch is not told of gates and present.
_op = register_op(
    "layer_sgmm(Tensor(a!) y, Tensor low, Tensor? logits, Tensor? bias, Tensor scales, "
    "Tensor gates, Tensor present, Tensor lora_b, int[] parts, int[] widths, "
    f"{GATE_SCHEMA}) -> ()",
    _run,
    _fake,
)


def layer_sgmm(
    y: torch.Tensor,
    low: torch.Tensor,
    logits: torch.Tensor | None,
    bias: torch.Tensor | None,
    scales: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    lora_b: torch.Tensor,
    parts: Sequence[int],
    widths: Sequence[int],
    gate: LayerGate,
) -> None:
    """Adds the experts' deltas of T tokens to a projection's output, in place.

    Args:
        y: [T, out], the projection's own output, changed; rows contiguous.
        low, logits, bias, scales, gates, present, gate: as in `route_layer`.
        lora_b: [sum of the adapted widths, E', R], dtype of y.
        parts: for each of up to three parts of y its index in low, -1 for none.
        widths: columns of each part.
    """
    _op(
        y, low, logits, bias, scales, gates, present, lora_b, parts, widths, *gate.arguments
    )
