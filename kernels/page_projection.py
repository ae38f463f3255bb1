"""A projection and its expert pages, in the steps that have adapters (`projection`,
`projection_norm`). The others take cuBLAS for W, as vLLM does, and one launch for what follows,
without a look at pages.

Whether a step has adapters says a flag on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from vllm_adafuse.kernels.add_norm import add_norm_torch, add_norm_triton
from vllm_adafuse.kernels.device.epilogues import EPILOGUES, result_of
from vllm_adafuse.kernels.expand import Read, launch_expand
from vllm_adafuse.kernels.kv_slots import KVSlots
from vllm_adafuse.kernels.operands import Projection, Step
from vllm_adafuse.kernels.projection import epilogue_torch, projection
from vllm_adafuse.kernels.projection_norm import projection_norm


def page_projection(
    x: torch.Tensor, p: Projection, step: Step, has_adapters: bool, kv_slots: KVSlots | None = None
) -> torch.Tensor:
    """A projection of T tokens, with the deltas of the step's adapters if it has any.

    Args:
        x: [T, in]; rows contiguous.
        p: the projection, a page for an expert.
        step: the step's buffers; without adapters nothing but `cos_sin` is looked at.
        has_adapters: the step has some.
        kv_slots: where k and v go with "rotary", whose columns of the result stay undefined then.

    Returns:
        [T, out], or [T, out / 2] after silu or gelu_tanh; contiguous.
    """
    if has_adapters:
        return projection(x, p, step, kv_slots)
    y = F.linear(x, p.weight, p.bias)
    if not p.shape.kernel_epilogue:
        return y
    return (epilogue_triton if y.is_cuda else epilogue_torch)(y, p, step, kv_slots)


def page_projection_norm(
    x: torch.Tensor, residual: torch.Tensor, p: Projection, step: Step, has_adapters: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`projection_norm`, with the deltas of the step's adapters if it has any."""
    if has_adapters:
        return projection_norm(x, residual, p, step)
    y = F.linear(x, p.weight)
    if y.is_cuda:
        return add_norm_triton(y, None, residual, p.norm, p.lora_b, step.gates, z=y)
    return add_norm_torch(y, residual, p.norm)


def epilogue_triton(
    y: torch.Tensor, p: Projection, step: Step, kv_slots: KVSlots | None = None
) -> torch.Tensor:
    """What follows an adapted projection, without any deltas, in one launch.

    Args:
        y: [T, out], W x and the bias; rows contiguous.
        p: the projection, with an activation or "rotary".
        step: of which `cos_sin` is read.
        kv_slots: where k and v go with "rotary", whose columns of the result stay undefined then.

    Returns:
        [T, out], or [T, I] after silu or gelu_tanh; contiguous, or in y with `strided_out`.
    """
    widths, epilogue = p.shape.widths, p.shape.kernel_epilogue
    result = result_of(y, widths, epilogue, p.strided_out)
    if result is y:
        result = torch.empty_like(y)
    adapted = (-1,) * len(widths)
    # Of B and lora_a_out, of which none is read, the smallest there could be.
    read = Read(None, p.lora_b[:, :1], None, step.active, step.cos_sin)
    number = EPILOGUES.index(epilogue)
    launch_expand(y, result, y, read, (adapted, widths, number), kv_slots=kv_slots)
    return result
