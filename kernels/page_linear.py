"""A projection and its expert pages, in the steps that have adapters (`linear`); in the others what
vLLM would run: cuBLAS, and its own kernel for what follows.

Whether a step has any says a flag on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from vllm_adafuse.kernels.linear import linear
from vllm_adafuse.kernels.operands import Projection, Step
from vllm_adafuse.kernels.pairs import activate_torch

# vLLM's kernels by the names of activations here.
_STOCK = {"silu": "silu_and_mul", "gelu_tanh": "gelu_tanh_and_mul"}


def stock(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """activation(x Wᵀ + bias) as vLLM computes it."""
    y = F.linear(x, weight, bias)
    if not activation:
        return y
    kernel = getattr(torch.ops._C, _STOCK[activation], None) if y.is_cuda else None
    if kernel is None:
        return activate_torch(y, activation)
    out = y.new_empty(y.shape[0], y.shape[1] // 2)
    kernel(out, y)
    return out


def page_linear(x: torch.Tensor, p: Projection, step: Step, has_adapters: bool) -> torch.Tensor:
    """A projection of T tokens, with the deltas of the step's adapters if it has any.

    Args:
        x: [T, in]; rows contiguous.
        p: the projection, a page for an expert.
        step: the step's buffers; not looked at in steps without adapters.
        has_adapters: the step has adapters.

    Returns:
        [T, out], or [T, out / 2] after an activation; contiguous.
    """
    if has_adapters:
        return linear(x, p, step)
    return stock(x, p.weight, p.bias, p.shape.kernel_epilogue)
