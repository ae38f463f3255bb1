"""The end of a projection: LoRA expand, the residual's addition, and the RMSNorm behind it:

    z[t] = residual[t] + y[t] + Σ_e B[:, e] (gates[t, e] s[t, e])
    out[t] = z[t] / sqrt(mean(z[t]²) + eps) * weight

Second half of `projection_norm`. With EXPAND one program has all columns of a block of tokens: it
writes z, sums its squares, and reads z again for the norm, so that the experts ride on a pass that
the model makes anyway (AdaFuse, arXiv 2603.11873, section 3, for the deltas). Without it y holds
the deltas, whole or as split-K sums, which are added up here.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.configs import NormConfig, expert_blocks
from vllm_adafuse.kernels.device.gates import add_deltas, load_ranks, load_s
from vllm_adafuse.kernels.device.pdl import begin_next
from vllm_adafuse.kernels.dispatch import choose_norm
from vllm_adafuse.kernels.launch import Bound, bind, overlap
from vllm_adafuse.kernels.operands import Norm
from vllm_adafuse.kernels.plans import on_hopper
from vllm_adafuse.kernels.room import new_rows
from vllm_adafuse.kernels.whole import cdiv


@triton.jit(do_not_specialize=["n_tokens"])
def _add_norm_kernel(
    y_ptr, lora_a_out_ptr, residual_ptr, weight_ptr, b_ptr, gates_ptr, z_ptr, out_ptr,
    n_tokens, y_stride, lora_a_out_stride, residual_stride, n_experts, eps,
    WIDTH: tl.constexpr, SPLIT_K: tl.constexpr, EXPAND: tl.constexpr, PDL: tl.constexpr,
    RANK: tl.constexpr, SKIP: tl.constexpr, EVEN_K: tl.constexpr, ONE: tl.constexpr,
    BLOCK_T: tl.constexpr, COLS: tl.constexpr, NORM_COLS: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = WIDTH % COLS == 0
    LOOP: tl.constexpr = (WIDTH + COLS - 1) // COLS
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = rows < n_tokens
    wide_rows = rows.to(tl.int64)
    if LOOP == 1:  # neither comes from the kernel before
        columns = tl.arange(0, COLS)
        weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0)
        place = wide_rows[:, None] * residual_stride + columns[None, :]
        mask = token_mask[:, None] & (columns < WIDTH)[None, :]
        before = tl.load(residual_ptr + place, mask=mask, other=0.0)
    if PDL:
        if LOOP == 1:
            begin_next()
        tl.extra.cuda.gdc_wait()
    lora_a_out_at = rows
    if EXPAND:
        lora_a_out_at = lora_a_out_ptr + wide_rows * lora_a_out_stride
    lora_a_out = tl.zeros([BLOCK_T, BLOCK_E * BLOCK_R], dtype=z_ptr.dtype.element_ty)
    if EXPAND and ONE:  # of all columns
        lora_a_out = load_s(
            lora_a_out_at, gates_ptr, rows, 0, token_mask, n_experts, 0,
            RANK, True, EVEN_K, BLOCK_T, BLOCK_E, BLOCK_R,
        )  # fmt: skip
    z = tl.zeros([BLOCK_T, COLS], dtype=tl.float32)
    squares = z  # added up when all are there: threads need not wait for one another in every step
    for i in tl.range(LOOP, num_stages=STAGES):
        columns = i * COLS + tl.arange(0, COLS)
        col_mask = columns < WIDTH
        mask = token_mask[:, None] & (col_mask[None, :] if not EVEN else (columns >= 0)[None, :])
        if LOOP > 1:
            place = wide_rows[:, None] * residual_stride + columns[None, :]
            before = tl.load(residual_ptr + place, mask=mask, other=0.0)
        y_at = y_ptr + wide_rows[:, None] * y_stride + columns[None, :]
        z = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
        for _ in tl.static_range(1, SPLIT_K):
            y_at += n_tokens * y_stride
            z += tl.load(y_at, mask=mask, other=0.0)
        z += before.to(tl.float32)
        if EXPAND:
            b_at = b_ptr + columns.to(tl.int64) * (n_experts * RANK)
            b = tl.zeros([COLS, BLOCK_E * BLOCK_R], dtype=b_ptr.dtype.element_ty)
            if ONE:
                b = load_ranks(
                    b_at, col_mask, 0, n_experts, 0, RANK, EVEN, EVEN_K, BLOCK_E, BLOCK_R
                )  # fmt: skip
            z = add_deltas(
                z, b, lora_a_out, lora_a_out_at, gates_ptr, -1, None, b_at, rows, token_mask, col_mask,
                n_experts, RANK, True, SKIP, False, EVEN, EVEN_K, ONE, BLOCK_T, BLOCK_E, BLOCK_R,
            )  # fmt: skip
        # What the next layer adds to is what is normed.
        rounded = z.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + wide_rows[:, None] * WIDTH + columns[None, :], rounded, mask=mask)
        z = tl.where(mask, rounded.to(tl.float32), 0.0)
        squares += z * z

    scale = tl.rsqrt(tl.sum(squares, 1) / WIDTH + eps)
    if LOOP > 1:
        tl.debug_barrier()  # z of other threads
    NORM_LOOP: tl.constexpr = (WIDTH + NORM_COLS - 1) // NORM_COLS
    # The last columns first: what was written last is likeliest to be in the cache still.
    for i in tl.range(NORM_LOOP, num_stages=STAGES):
        columns = (NORM_LOOP - 1 - i) * NORM_COLS + tl.arange(0, NORM_COLS)
        mask = token_mask[:, None] & (columns < WIDTH)[None, :]
        place = wide_rows[:, None] * WIDTH + columns[None, :]
        if LOOP == 1:
            value = z
        else:
            value = tl.load(z_ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
            value = value.to(tl.float32)
            weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0)
        # Rounded before the weight, as the models do it.
        normed = (value * scale[:, None]).to(out_ptr.dtype.element_ty).to(tl.float32)
        normed = (normed * weight.to(tl.float32)[None, :]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place, normed, mask=mask)


def add_norm_triton(
    y: torch.Tensor,
    lora_a_out: torch.Tensor | None,
    residual: torch.Tensor,
    norm: Norm,
    lora_b: torch.Tensor,
    gates: torch.Tensor,
    config: NormConfig | None = None,
    z: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch.

    Args:
        y: [T, H], W x; or [split_k, T, H] contiguous, float32, to be added up. Rows contiguous.
        lora_a_out: [T, E R], A x of all experts, not yet weighted; None if y holds the deltas.
        residual: [T, H]; rows contiguous.
        norm: of H columns.
        lora_b: [H, E, R], dtype of lora_a_out.
        gates: [N, E] float32, N >= T, LoRA's scale included.
        config: how to cut, default `dispatch.choose_norm`.
        z: [T, H] contiguous, dtype of residual, for the new residual; may be y. Default a new one.

    Returns:
        The normed hidden states and the new residual, [T, H] each, dtype of residual.
    """
    tokens, width = residual.shape
    _, experts, rank = lora_b.shape
    out = new_rows(residual, tokens, width)
    if z is None:
        z = residual.new_empty(tokens, width)
    split_k = y.shape[0] if y.dim() == 3 else 0
    block_t, kernel = _plan(
        width, split_k, lora_a_out is not None, experts, rank, residual.element_size(), config, on_hopper(y)
    )
    kernel(
        (cdiv(tokens, block_t),),
        y, lora_a_out, residual, norm.weight, lora_b, gates, z, out,
        tokens, y.stride(-2), 0 if lora_a_out is None else lora_a_out.stride(0), residual.stride(0), experts,
        norm.eps,
    )  # fmt: skip
    return out, z


@functools.cache
def _plan(
    width: int, split_k: int, expand: bool, experts: int, rank: int, itemsize: int,
    config: NormConfig | None, hopper: bool,
) -> tuple[int, Bound]:  # fmt: skip
    """Tokens of a program, and the kernel."""
    config = config or choose_norm(width, expand, split_k > 0, itemsize)
    return config.tokens, bind(
        _add_norm_kernel,
        WIDTH=width, SPLIT_K=split_k, EXPAND=expand,
        BLOCK_T=config.tokens, COLS=config.columns, STAGES=config.stages,
        NORM_COLS=config.norm_columns if config.columns < width else config.columns,
        num_warps=config.warps, **expert_blocks(experts, rank, False), **overlap(hopper),
    )  # fmt: skip


def add_norm_torch(
    y: torch.Tensor, residual: torch.Tensor, norm: Norm
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference, of a y [T, H] that holds the deltas."""
    z = (y.float() + residual.float()).to(residual.dtype)
    wide = z.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    return (normed.to(z.dtype).float() * norm.weight.float()).to(z.dtype), z
