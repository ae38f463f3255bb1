"""A projection that is routed inside its layer and whose own weight is not quantised:

    y = x Wᵀ + bias + Σ_e B[e] s[t, p, e]                  s: what `route_layer` makes of low[t]
    out = y, or act(y_gate) * y_up for gate_up

W, A and the routers stand in one tensor, [W; A; routers]: few tokens take one product for all of
it, in float32, so that logits are never rounded; then `route_layer` decides, and one pass adds the
expand and goes on to the activation. Long batches read W apart. See linear.py for the form in which
one decision serves all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from vllm_adafuse.kernels.dispatch import MAX_JOINT_TOKENS
from vllm_adafuse.kernels.expand import expand_torch, expand_weighted_triton
from vllm_adafuse.kernels.pairs import activate_torch, result_width
from vllm_adafuse.kernels.registry import matmul_f32, register_op
from vllm_adafuse.kernels.route_layer import GATE_SCHEMA, LayerGate, route


def _run(
    x, joint, columns, logits, bias, router_bias, scales, gates, present, lora_b, parts, widths,
    activation, *gate,
):  # fmt: skip
    rule, out = LayerGate(gate[0], tuple(gate[1]), *gate[2:]), sum(widths)
    count, rank = max(parts, default=-1) + 1, lora_b.shape[2]
    if x.is_cuda and x.shape[0] <= MAX_JOINT_TOKENS:
        both = matmul_f32(x, joint.t())
        y, low = both[:, :out], both[:, out:]
    else:
        y, low = F.linear(x, joint[:out], bias), matmul_f32(x, joint[out:].t())
        bias = None
    z = low[:, columns : columns + logits] if logits else None
    low = low[:, :columns]
    s = route(low, z, router_bias, scales, gates, present, count, rank, x.dtype, rule)
    if x.is_cuda:
        return expand_weighted_triton(
            y, s, bias, lora_b, present, parts, widths, activation
        )
    expand_torch(y, s, lora_b, parts, widths)
    return activate_torch(y, activation) if activation else y


def _fake(
    x, joint, columns, logits, bias, router_bias, scales, gates, present, lora_b, parts, widths,
    activation, *gate,
):  # fmt: skip
    return x.new_empty(x.shape[0], result_width(widths, activation))


# See `route_layer` for what torch is not told of gates and present.
_op = register_op(
    "layer_linear(Tensor x, Tensor joint, int columns, int logits, Tensor? bias, "
    "Tensor? router_bias, Tensor scales, Tensor gates, Tensor present, Tensor lora_b, int[] parts, "
    f"int[] widths, str activation, {GATE_SCHEMA}) -> Tensor",
    _run,
    _fake,
)


def layer_linear(
    x: torch.Tensor,
    joint: torch.Tensor,
    columns: int,
    logits: int,
    bias: torch.Tensor | None,
    router_bias: torch.Tensor | None,
    scales: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    lora_b: torch.Tensor,
    parts: Sequence[int],
    widths: Sequence[int],
    activation: str,
    gate: LayerGate,
) -> torch.Tensor:
    """An adapted projection of T tokens.

    Args:
        x: [T, in]; rows contiguous.
        joint: [out + P EA R + S routers E, in], dtype of x: W, A, and the routers in S parts.
        columns: P EA R.
        bias: [out] or None.
        router_bias, scales, gates, present, gate: as in `route_layer`.
        lora_b: [sum of the adapted widths, E', R], dtype of x.
        parts: for each of up to three parts of the output its index in the banks, -1 for none.
        widths: columns of each part.
        activation: "", or "silu" or "gelu_tanh" of gate_up, whose two parts are equally wide.

    Returns:
        [T, out], or [T, out / 2] after an activation.
    """
    return _op(
        x, joint, columns, logits, bias, router_bias, scales, gates, present, lora_b, parts, widths,
        activation, *gate.arguments,
    )  # fmt: skip
