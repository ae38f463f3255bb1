"""An adapted projection whose own weight is not quantised, with what follows it:

    y = x Wᵀ + bias + Σ_e gates[:, e] B[e] A[e] x          (SGMM, see sgmm.py)
    out = y, act(y_gate) * y_up for gate_up, or y with q and k turned for qkv (see device/epilogues.py)

W and A stand in one tensor, [W; A]. Few tokens take one launch that streams it (decode_gemm.py),
some dozens one that tiles it where the product is large (tma_gemm.py). Otherwise one cuBLAS
GEMM gives W x and A x together, and one pass adds the expand (expand.py, tma_expand.py)
and goes on to the activation. Which, says `dispatch.plan`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from vllm_adafuse.kernels import decode_gemm, tma_gemm
from vllm_adafuse.kernels.configs import GemmConfig
from vllm_adafuse.kernels.decode_gemm import decode_gemm_triton
from vllm_adafuse.kernels.dense_expand import dense_expand_triton
from vllm_adafuse.kernels.device.epilogues import activate_torch, result_width, rotate_torch
from vllm_adafuse.kernels.expand import expand_raw_triton, expand_torch
from vllm_adafuse.kernels.fp8_shrink import fp8_shrink_triton
from vllm_adafuse.kernels.kv_slots import KVSlots, kv_slots_torch
from vllm_adafuse.kernels.operands import Projection, Step
from vllm_adafuse.kernels.page_shrink import page_shrink_triton
from vllm_adafuse.kernels.plans import FP8_SHRINK, PAGE_SHRINK, SHRINK, TMA_EXPAND, Plan, Shape
from vllm_adafuse.kernels.room import new_rows
from vllm_adafuse.kernels.shrink import shrink_torch, shrink_triton
from vllm_adafuse.kernels.tma_expand import tma_expand_triton
from vllm_adafuse.kernels.tma_gemm import tma_gemm_triton


def workspace_sizes(lora_a: torch.Tensor, rows: int) -> tuple[int, int, int]:
    """What a projection of `rows` rows may need of a `Workspace`: bytes, floats, semaphores."""
    needs = decode_gemm.workspace_sizes(lora_a, rows), tma_gemm.workspace_sizes(lora_a)
    bytes_, floats, semaphores = map(max, *needs)
    return bytes_, floats, semaphores


def projection_torch(
    x: torch.Tensor, p: Projection, step: Step, kv_slots: KVSlots | None = None
) -> torch.Tensor:
    """The reference; see `projection`."""
    shape = p.shape
    y = F.linear(x, p.weight, p.bias)
    lora_a_out = shrink_torch(x, p.lora_a, step.gates, p.lora_scale)
    expand_torch(y, lora_a_out, p.lora_b, shape.adapted, shape.widths)
    return epilogue_torch(y, p, step, kv_slots)


def epilogue_torch(
    y: torch.Tensor, p: Projection, step: Step, kv_slots: KVSlots | None = None
) -> torch.Tensor:
    """What follows y [T, out], the projection with its bias and deltas, if any."""
    shape = p.shape
    if shape.epilogue == "rotary":
        y = rotate_torch(y, step.cos_sin, shape.widths[0] + shape.widths[1])
        if kv_slots:
            kv_slots_torch(y, kv_slots, shape.widths)
        return y
    return activate_torch(y, shape.kernel_epilogue) if shape.kernel_epilogue else y


def result_layout(shape: Shape, strided_out: bool) -> tuple[int, int]:
    """Columns of the result, and elements from one of its rows to the next."""
    width = result_width(shape.widths, shape.kernel_epilogue)
    return width, shape.fused_rows if strided_out else width


def new_result(x: torch.Tensor, shape: Shape, strided_out: bool) -> torch.Tensor:
    """Where the result of T tokens goes."""
    width, stride = result_layout(shape, strided_out)
    return new_rows(x, x.shape[0], width, stride)


def projection(
    x: torch.Tensor, p: Projection, step: Step, kv_slots: KVSlots | None = None
) -> torch.Tensor:
    """An adapted projection of T tokens, whose W is not quantised.

    Args:
        x: [T, in], dtype of the projection; rows contiguous.
        p: the projection.
        step: the step's buffers.
        kv_slots: where k and v go with "rotary", whose columns of the result stay undefined then.

    Returns:
        [T, out], or [T, out / 2] after silu or gelu_tanh; contiguous, but for rows as far apart as
        those of the product with `strided_out`.
    """
    if x.is_cuda:
        return projection_triton(x, p, step, p.plans[x.shape[0]], kv_slots)
    y = projection_torch(x, p, step, kv_slots)
    return new_result(x, p.shape, True).copy_(y) if p.strided_out else y


def projection_triton(
    x: torch.Tensor, p: Projection, step: Step, way: Plan, kv_slots: KVSlots | None = None
) -> torch.Tensor:
    """`projection` on a GPU, by a plan."""
    if way.config:
        out = new_result(x, p.shape, p.strided_out)
        return one_launch(x, p, step, way.config, out, kv_slots)
    y, lora_a_out, bias = long_product(x, p, step, way)
    return expand_long(y, lora_a_out, bias, p, step, way, kv_slots)


def expand_long(
    y: torch.Tensor,
    lora_a_out: torch.Tensor,
    bias: torch.Tensor | None,
    p: Projection,
    step: Step,
    way: Plan,
    kv_slots: KVSlots | None = None,
) -> torch.Tensor:
    """From W x and A x to the projection, by a plan. y and lora_a_out may be overwritten."""
    if way.expand == TMA_EXPAND:
        if way.dense_from is not None:
            of = p.shape.adapted, p.shape.widths, way.dense_from
            dense_expand_triton(y, lora_a_out, p.lora_b, step.gates, *of)
        return tma_expand_triton(y, lora_a_out, p, step, kv_slots=kv_slots)
    return expand_raw_triton(y, lora_a_out, bias, p, step, kv_slots=kv_slots)


def one_launch(
    x: torch.Tensor,
    p: Projection,
    step: Step,
    config: GemmConfig,
    out: torch.Tensor,
    kv_slots: KVSlots | None = None,
) -> torch.Tensor:
    """The projection of few tokens by the kernel that a config is for; see both."""
    launch = tma_gemm_triton if config.tma else decode_gemm_triton
    return launch(x, p, step, config, out, kv_slots)


def split_k_product(
    x: torch.Tensor, p: Projection, split_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices of W x and A x, [split_k, T, …] each, by one cuBLAS GEMM for all slices of `in`:
    programs enough where one for the whole would have few. Slices are rounded as the whole would
    be, which costs the sum no more than that.
    """
    fused, out = p.fused_weight, p.shape.size_out
    of_x = x.view(x.shape[0], split_k, -1).transpose(0, 1)
    of_rows = fused.view(fused.shape[0], split_k, -1).permute(1, 2, 0)
    y, lora_a_out = torch.split_with_sizes(torch.bmm(of_x, of_rows), (out, fused.shape[0] - out), 2)
    return y, lora_a_out


def long_product(
    x: torch.Tensor, p: Projection, step: Step, way: Plan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """W x and A x, and the bias if it is still to be added, by cuBLAS but for A x of many pages, and
    of pages in fp8, which is weighted at once.

    One product of both: a few rows more cost nearly nothing at any number of tokens, a second
    launch 6 to 30 us (H200, shapes of Llama-2-7B; docs/kernel-notes.md).
    """
    out = p.shape.size_out
    if way.kernel == PAGE_SHRINK:
        lora_a_out = page_shrink_triton(x, p.lora_a, step.tile_blocks)
        return F.linear(x, p.weight, p.bias), lora_a_out, None
    if way.kernel == FP8_SHRINK:
        listed = step.blocks_of(p.shape, x.shape[0])
        lora_a_out = fp8_shrink_triton(x, p.lora_a, step.gates, listed)
        return F.linear(x, p.weight, p.bias), lora_a_out, None
    if way.kernel == SHRINK:
        lora_a_out = shrink_triton(x, p.lora_a, step.gates, step.active, step.workspace)
        return F.linear(x, p.weight, p.bias), lora_a_out.flatten(1), None
    if way.one_gemm:
        gemm_out = F.linear(x, p.fused_weight)
        sizes = out, gemm_out.shape[1] - out
        y, lora_a_out = torch.split_with_sizes(gemm_out, sizes, 1)  # cheaper than slices
        return y, lora_a_out, p.bias
    return F.linear(x, p.weight, p.bias), F.linear(x, p.fused_weight[out:]), None
