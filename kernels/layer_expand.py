"""From one product [W; A; routers] x of a few tokens to the projection's output, in one launch:

    gates of the logits, s[t, p, e] = g[t, p, e] scale[e] low[t, p, e]         see route_layer.py
    y[t] + bias + Σ_e B[e] s[t, p, e], and for gate_up act(y_gate) * y_up      see expand.py

Every program decides anew for its tokens, from the few logits of its part: that costs less than a
launch that would decide for all. It takes banks whose ranks of all experts fit one product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.configs import expert_blocks
from vllm_adafuse.kernels.deltas import load_ranks
from vllm_adafuse.kernels.dispatch import choose_layer_expand
from vllm_adafuse.kernels.launch import launch, overlap
from vllm_adafuse.kernels.pairs import ACTIVATIONS, activate, result_width, tiled_widths
from vllm_adafuse.kernels.plans import on_hopper
from vllm_adafuse.kernels.route_layer import SPLIT_FACTOR, LayerGate, router_gates


@triton.jit
def _weighted_s(
    low_at, scales_ptr, gates, here,
    EXPERTS: tl.constexpr, EVERY: tl.constexpr, RANK: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s [BLOCK_T, BLOCK_E * BLOCK_R] of one part, from rows of low."""
    experts, ranks = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_R)
    scales = tl.load(scales_ptr + experts, mask=experts < EVERY, other=0.0)
    weights = tl.where((experts < EXPERTS)[None, :], gates, 1.0) * scales[None, :]
    row = experts
    if SHARED:
        row = tl.where(experts < EXPERTS, 0, experts - (EXPERTS - 1))
    at = low_at[:, None, None] + (row * RANK)[None, :, None] + ranks[None, None, :]
    mask = here[:, None, None] & (experts < EVERY)[None, :, None] & (ranks < RANK)[None, None, :]
    low = tl.load(at, mask=mask, other=0.0)
    weights = weights[:, :, None]
    # Not a bare product: what an expert that was not chosen gives must not matter.
    s = tl.where(weights != 0.0, low * weights, 0.0)
    return tl.reshape(s, (BLOCK_T, BLOCK_E * BLOCK_R))


@triton.jit(do_not_specialize=["n_tokens"])
def _layer_expand_kernel(
    both_ptr, bias_ptr, router_bias_ptr, scales_ptr, gates_ptr, present_ptr, b_ptr, out_ptr,
    n_tokens, both_stride, out_stride, count0, count1, count2, temperature,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    PART0: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROUTER_BIAS: tl.constexpr, HAS_LOGITS: tl.constexpr,
    ACT: tl.constexpr, COLUMNS: tl.constexpr, SIZE_LOW: tl.constexpr,
    ROUTERS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_FACTOR: tl.constexpr,
    EXPERTS: tl.constexpr, EVERY: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr,
    SOFTMAX_FIRST: tl.constexpr, ABSOLUTE: tl.constexpr, SHARED: tl.constexpr,
    EVEN: tl.constexpr, EVEN_K: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    OUT: tl.constexpr = WIDTH0 + WIDTH1 + WIDTH2
    # Parts without experts have no rows of B. With ACT a tile is of gate and up.
    B1: tl.constexpr = WIDTH0 if PART0 >= 0 else 0
    B2: tl.constexpr = B1 + (WIDTH1 if PART1 >= 0 else 0)
    TILES0: tl.constexpr = (WIDTH0 + BLOCK_OUT - 1) // BLOCK_OUT
    TILES01: tl.constexpr = TILES0 + ((WIDTH1 + BLOCK_OUT - 1) // BLOCK_OUT if ACT == 0 else 0)
    second, third = tile >= TILES0, tile >= TILES01
    if ACT != 0:
        second, third = tile < 0, tile < 0
    part = tl.where(third, PART2, tl.where(second, PART1, PART0))
    width = tl.where(third, WIDTH2, tl.where(second, WIDTH1, WIDTH0))
    offset = tl.where(third, WIDTH0 + WIDTH1, tl.where(second, WIDTH0, 0))
    b_first = tl.where(third, B2, tl.where(second, B1, 0))
    local = tile - tl.where(third, TILES01, tl.where(second, TILES0, 0))
    columns = local * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = columns >= 0 if EVEN else columns < width
    inside_b = columns < tl.where(part >= 0, width, 0)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = rows < n_tokens
    b_at = b_ptr + (b_first + columns).to(tl.int64) * (EVERY * RANK)
    # B needs no kernel before this one.
    b = load_ranks(b_at, inside_b, 0, EVERY, 0, RANK, False, EVEN_K, BLOCK_E, BLOCK_R)
    b_up = b
    if ACT != 0:
        inside_up = columns < (WIDTH1 if PART1 >= 0 else 0)
        up_at = b_at + B1 * (EVERY * RANK)
        b_up = load_ranks(up_at, inside_up, 0, EVERY, 0, RANK, False, EVEN_K, BLOCK_E, BLOCK_R)
    if PDL:
        tl.extra.cuda.gdc_wait()
    row_at = both_ptr + rows.to(tl.int64) * both_stride
    logits_ptr = both_ptr + OUT + COLUMNS
    experts = tl.arange(0, BLOCK_E)
    known = here[:, None] & (experts < EXPERTS)[None, :]
    router = tl.maximum(part, 0) if ROUTERS > 1 else 0
    if HAS_LOGITS:
        count = tl.where(router == 0, count0, tl.where(router == 1, count1, count2))
        gates = router_gates(
            logits_ptr, router_bias_ptr, rows, both_stride, router, count, temperature, here,
            ROUTERS, SPLITS, SPLIT_FACTOR, EXPERTS, TOP_K, SOFTMAX_FIRST, ABSOLUTE,
            HAS_ROUTER_BIAS, BLOCK_T, BLOCK_E,
        )  # fmt: skip
        if ROUTERS == 1:
            if tile == 0:  # for the projections behind it in the block
                tl.store(gates_ptr + rows[:, None] * EXPERTS + experts[None, :], gates, mask=known)
                if tl.program_id(1) == 0:
                    tl.store(present_ptr, -1)
    else:
        gates_at = gates_ptr + rows[:, None] * EXPERTS + experts[None, :]
        gates = tl.load(gates_at, mask=known, other=0.0)
    element: tl.constexpr = b_ptr.dtype.element_ty
    low_at = row_at + OUT + tl.maximum(part, 0) * SIZE_LOW
    s = _weighted_s(
        low_at, scales_ptr, gates, rows < tl.where(part >= 0, n_tokens, 0),
        EXPERTS, EVERY, RANK, SHARED, BLOCK_T, BLOCK_E, BLOCK_R,
    ).to(element)  # fmt: skip
    mask = here[:, None] & inside[None, :]
    y_at = row_at[:, None] + (offset + columns)[None, :]
    y = tl.load(y_at, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offset + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = tl.dot(s, tl.trans(b), y, input_precision="ieee")
    if ACT != 0:
        up = tl.load(y_at + WIDTH0, mask=mask, other=0.0)
        if HAS_BIAS:
            bias_at = bias_ptr + WIDTH0 + columns
            up += tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)[None, :]
        if PART1 >= 0:
            if HAS_LOGITS and ROUTERS > 1:
                gates = router_gates(
                    logits_ptr, router_bias_ptr, rows, both_stride, PART1, count1, temperature,
                    here, ROUTERS, SPLITS, SPLIT_FACTOR, EXPERTS, TOP_K, SOFTMAX_FIRST, ABSOLUTE,
                    HAS_ROUTER_BIAS, BLOCK_T, BLOCK_E,
                )  # fmt: skip
            s = _weighted_s(
                row_at + OUT + PART1 * SIZE_LOW, scales_ptr, gates, here,
                EXPERTS, EVERY, RANK, SHARED, BLOCK_T, BLOCK_E, BLOCK_R,
            ).to(element)  # fmt: skip
            up = tl.dot(s, tl.trans(b_up), up, input_precision="ieee")
        y = activate(y, up, ACT)
    out_at = out_ptr + rows.to(tl.int64)[:, None] * out_stride + (offset + columns)[None, :]
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=mask)


def layer_expand_triton(
    both: torch.Tensor,
    columns: int,
    logits: int,
    bias: torch.Tensor | None,
    router_bias: torch.Tensor | None,
    scales: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    bank_b: torch.Tensor,
    parts: Sequence[int],
    widths: Sequence[int],
    activation: str,
    gate: LayerGate,
) -> torch.Tensor:
    """Ends a projection of which one product is there; see `layer_linear`.

    Args:
        both: [T, >= out + P EA R + S routers E] float32: x times [W; A; routers].
        columns: P EA R.
        logits: S routers E, 0 where the gates are those of another projection.
        bias, router_bias, scales, gates, present, bank_b, parts, widths, activation, gate: as in
            `layer_linear`; gates and `present` are written where one router decides for a block.

    Returns:
        [T, out], or [T, out / 2] after an activation, in the dtype of the bank.
    """
    tokens, (_, every, rank) = both.shape[0], bank_b.shape
    _, routers, experts = gates.shape
    act = ACTIVATIONS.index(activation)
    result = both.new_empty(tokens, result_width(widths, activation), dtype=bank_b.dtype)
    cut = choose_layer_expand(tokens, act != 0, bank_b.element_size())
    blocks = expert_blocks(every, rank, False)
    tiled = tiled_widths(widths, activation)
    grid = sum(triton.cdiv(w, cut.columns) for w in tiled), triton.cdiv(tokens, cut.tokens)
    counts = [*gate.experts, 0, 0, 0][:3]
    even = all(w % cut.columns == 0 for w in tiled)
    widths, parts = [*widths, 0, 0][:3], [*parts, -1, -1][:3]
    launch(
        _layer_expand_kernel, grid,
        both, bias, router_bias, scales, gates, present, bank_b, result,
        tokens, both.stride(0), result.stride(0), *counts, gate.temperature,
        WIDTH0=widths[0], WIDTH1=widths[1], WIDTH2=widths[2],
        PART0=parts[0], PART1=parts[1], PART2=parts[2],
        HAS_BIAS=bias is not None, HAS_ROUTER_BIAS=router_bias is not None,
        HAS_LOGITS=logits > 0, ACT=act, COLUMNS=columns,
        SIZE_LOW=columns // (max(parts) + 1),
        ROUTERS=routers, SPLITS=logits // (routers * experts) if logits else 0,
        SPLIT_FACTOR=SPLIT_FACTOR, EXPERTS=experts, EVERY=every, RANK=rank, TOP_K=gate.top_k,
        SOFTMAX_FIRST=gate.softmax_first, ABSOLUTE=gate.absolute, SHARED=gate.shared,
        EVEN=even, EVEN_K=blocks["EVEN_K"],
        BLOCK_T=cut.tokens, BLOCK_OUT=cut.columns,
        BLOCK_E=blocks["BLOCK_E"], BLOCK_R=blocks["BLOCK_R"],
        num_warps=cut.warps, **overlap(on_hopper(both)),
    )  # fmt: skip
    return result
