"""A projection that is routed inside its layer and whose own weight is not quantised:

    y = x Wᵀ + bias + Σ_e B[e] s[t, p, e]                  s: what `route_layer` makes of low[t]
    out = y, or act(y_gate) * y_up for gate_up

W, A and the routers stand in one tensor, [W; A; routers]: few tokens take one product for all of
it, in float32, so that logits are never rounded; then `route_layer` decides, and one pass adds the
expand and goes on to the activation. Long batches read W apart. See projection.py for the form in which
one decision serves all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from vllm_adafuse.kernels.device.epilogues import EPILOGUES, activate_torch, result_width
from vllm_adafuse.kernels.dispatch import MAX_LAYER_FUSED_TOKENS, choose_expand
from vllm_adafuse.kernels.expand import Read, expand_torch, launch_expand
from vllm_adafuse.kernels.layerwise.operands import LayerGates, LayerProjection
from vllm_adafuse.kernels.layerwise.route import route_layer
from vllm_adafuse.kernels.registry import matmul_f32


def expand_weighted_triton(
    y: torch.Tensor,
    weighted: torch.Tensor,
    bias: torch.Tensor | None,
    lora_b: torch.Tensor,
    active: torch.Tensor,
    adapted: Sequence[int],
    widths: Sequence[int],
    epilogue: str,
) -> torch.Tensor:
    """From the output of W, in float32 or in the dtype of weighted, to that of the adapted projection.

    Args:
        y: [T, out], W x.
        weighted: [T, P, E R], weighted, see `route_layer`.
        bias, lora_b, active, adapted, widths: as in `expand_raw_triton`.
        epilogue: "", or "silu" or "gelu_tanh" of gate and up.

    Returns:
        [T, out], or [T, I] after an activation, in the dtype of weighted; a new tensor.
    """
    index = EPILOGUES.index(epilogue)
    result = weighted.new_empty(y.shape[0], result_width(widths, epilogue))
    config = choose_expand(y.shape[0], index != 0, weighted.element_size())
    read = Read(bias, lora_b, None, active)
    launch_expand(y, result, weighted, read, (adapted, widths, index), config)
    return result


def layer_linear(x: torch.Tensor, p: LayerProjection, layer: LayerGates) -> torch.Tensor:
    """An adapted projection of T tokens.

    Args:
        x: [T, in], dtype of the projection; rows contiguous.
        p: the projection, with a `fused_weight`.
        layer: the gates, see `route_layer`.

    Returns:
        [T, out], or [T, out / 2] after an activation.
    """
    out, bias = p.size_out, p.bias
    if x.is_cuda and x.shape[0] <= MAX_LAYER_FUSED_TOKENS:
        gemm_out = matmul_f32(x, p.fused_weight.t())
        y, lora_a_out = gemm_out[:, :out], gemm_out[:, out:]
    else:
        y = F.linear(x, p.fused_weight[:out], bias)
        lora_a_out = matmul_f32(x, p.fused_weight[out:].t())
        bias = None
    logits = lora_a_out[:, p.columns : p.columns + p.logits] if p.logits else None
    weighted = route_layer(lora_a_out[:, : p.columns], logits, p, layer, x.dtype)
    if x.is_cuda:
        return expand_weighted_triton(
            y, weighted, bias, p.lora_b, layer.active, p.adapted, p.widths, p.epilogue
        )
    expand_torch(y, weighted, p.lora_b, p.adapted, p.widths)
    return activate_torch(y, p.epilogue) if p.epilogue else y
