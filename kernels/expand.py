"""LoRA expand of the chosen experts, added to the projection's output:

    y[t, n] + Σ_e B[n, e] s[t, p(n), e]                    p(n): the linear that column n belongs to

and at once what follows (device/epilogues.py): gate_up's activation, the rotary embedding of q and k. The
second half of SGMM (AdaFuse, arXiv 2603.11873, section 3). A program takes a tile of columns for a
block of tokens and reads B of the active experts; sums run over experts in rising order,
whoever else is in the batch. The additions ride on a pass over y that what follows needs anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.configs import ExpandConfig, expert_blocks
from vllm_adafuse.kernels.device.epilogues import (
    EPILOGUES,
    ROTARY,
    activate,
    result_of,
    rotate,
    tiled_widths,
)
from vllm_adafuse.kernels.device.gates import add_deltas, load_both, load_gates, load_ranks, weigh
from vllm_adafuse.kernels.dispatch import MAX_SHORT_EXPAND_TOKENS, MIN_DENSE_TOKENS, choose_expand
from vllm_adafuse.kernels.kv_slots import NO_KV_SLOTS, KVSlots, rows_in_kv, starts_of_head
from vllm_adafuse.kernels.launch import Bound, bind, overlap
from vllm_adafuse.kernels.operands import Projection, Step
from vllm_adafuse.kernels.page_routes import TILE_TOKENS
from vllm_adafuse.kernels.plans import on_hopper
from vllm_adafuse.kernels.whole import cdiv


@triton.jit(do_not_specialize=["n_tokens"])
def _expand_kernel(
    y_ptr, bias_ptr, out_ptr, lora_a_out_ptr, b_ptr, gates_ptr, active_ptr, tile_blocks_ptr,
    cos_sin_ptr, n_tokens, split_stride, y_stride, out_stride, lora_a_out_stride, n_experts,
    keys_ptr, values_ptr, slots_ptr, block_size, block_stride, row_stride, head_stride,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    ADAPTED0: tl.constexpr, ADAPTED1: tl.constexpr, ADAPTED2: tl.constexpr,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr, KV: tl.constexpr,
    RAW: tl.constexpr, SKIP: tl.constexpr, LISTED: tl.constexpr, ALL: tl.constexpr,
    SPLIT_K: tl.constexpr, RANK: tl.constexpr, EVEN: tl.constexpr, EVEN_K: tl.constexpr, ONE: tl.constexpr,
    ALL_ADAPTED: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    group, size = tl.program_id(0), n_experts * RANK
    DELTAS: tl.constexpr = ADAPTED0 >= 0 or ADAPTED1 >= 0 or ADAPTED2 >= 0
    # Parts without experts have no rows of B; no tiles either, unless they must be copied.
    B1: tl.constexpr = WIDTH0 if ADAPTED0 >= 0 else 0
    B2: tl.constexpr = B1 + (WIDTH1 if ADAPTED1 >= 0 else 0)
    # With EPILOGUE columns come in pairs, and a tile is of one member: gate, or first halves.
    MEMBERS: tl.constexpr = 2 if EPILOGUE == 3 else 1
    TILED0: tl.constexpr = WIDTH0 // MEMBERS if (ADAPTED0 >= 0 or ALL) else 0
    TILED1: tl.constexpr = WIDTH1 // MEMBERS if (ADAPTED1 >= 0 or ALL) else 0
    SPAN: tl.constexpr = BLOCK_OUT * LOOP
    if EPILOGUE == 0 or EPILOGUE == 3:
        GROUPS0: tl.constexpr = (TILED0 + SPAN - 1) // SPAN
        GROUPS01: tl.constexpr = GROUPS0 + (TILED1 + SPAN - 1) // SPAN
        second, third = group >= GROUPS0, group >= GROUPS01
        linear_idx = tl.where(third, ADAPTED2, tl.where(second, ADAPTED1, ADAPTED0))
        width = tl.where(third, WIDTH2, tl.where(second, WIDTH1, WIDTH0))
        offset = tl.where(third, WIDTH0 + WIDTH1, tl.where(second, WIDTH0, 0))
        b_first = tl.where(third, B2, tl.where(second, B1, 0))
        group -= tl.where(third, GROUPS01, tl.where(second, GROUPS0, 0))
    else:
        linear_idx, width, offset, b_first = ADAPTED0, WIDTH0, 0, 0
    # From one member of a pair to the other: in y, in B, and in s.
    APART: tl.constexpr = HALF if EPILOGUE == 3 else WIDTH0
    APART_B: tl.constexpr = HALF if EPILOGUE == 3 else B1
    linear_up = linear_idx if EPILOGUE == 3 else ADAPTED1
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = rows < n_tokens
    # A slice without experts has deltas of zeros; EVEN_B says that there is none.
    rows_s = rows < tl.where(linear_idx >= 0, n_tokens, 0)
    rows_up = rows < tl.where(linear_up >= 0, n_tokens, 0)
    EVEN_B: tl.constexpr = EVEN and ALL_ADAPTED
    lora_a_out_at = lora_a_out_ptr + rows.to(tl.int64) * lora_a_out_stride + linear_idx * size
    lora_a_out_up_at = lora_a_out_ptr + rows.to(tl.int64) * lora_a_out_stride + linear_up * size
    listed_ptr = tile_blocks_ptr
    if LISTED:
        listed_ptr += tl.program_id(1) * BLOCK_T // LISTED * (1 + tl.cdiv(n_experts, BLOCK_E))
    lora_a_out = tl.zeros([BLOCK_T, BLOCK_E * BLOCK_R], dtype=lora_a_out_ptr.dtype.element_ty)
    lora_a_out_up = lora_a_out
    if PDL and LOOP > 1:
        tl.extra.cuda.gdc_wait()
    if ONE and RAW and DELTAS:  # the step's: not of the kernel before
        gates = load_gates(gates_ptr, rows, token_mask, n_experts, 0, BLOCK_T, BLOCK_E, BLOCK_R)
    kv_starts, slot_mask = rows_in_kv(
        slots_ptr, rows, token_mask, block_size, block_stride, row_stride, KV
    )
    if ONE and LOOP > 1 and DELTAS:  # of all columns
        lora_a_out, lora_a_out_up = load_both(
            lora_a_out_at, lora_a_out_up_at, rows_s, rows_up, n_experts, EPILOGUE, RANK,
            EVEN_K, BLOCK_E, BLOCK_R,
        )
        if RAW:
            lora_a_out, lora_a_out_up = weigh(lora_a_out, gates), weigh(lora_a_out_up, gates)
    for i in tl.range(LOOP, num_stages=STAGES):
        first = (group * LOOP + i) * BLOCK_OUT
        if EPILOGUE == 3:  # of a head's first half
            within = tl.multiple_of(first % HALF, BLOCK_OUT)
            columns = tl.multiple_of(first // HALF * (2 * HALF) + within, BLOCK_OUT)
            columns += tl.arange(0, BLOCK_OUT)
        else:
            within, columns = 0, first + tl.arange(0, BLOCK_OUT)
        # A mask that ends in the middle of a tile makes loads narrow: only where it must be.
        col_mask = columns >= 0 if EVEN else columns < width
        col_mask_b = columns < tl.where(linear_idx >= 0, width, 0)
        col_mask_up = columns < tl.where(linear_up >= 0, width, 0)
        b_at = b_ptr + (b_first + columns).to(tl.int64) * size
        mask = token_mask[:, None] & col_mask[None, :]
        y_at = y_ptr + rows.to(tl.int64)[:, None] * y_stride + (offset + columns)[None, :]
        # Everything is asked for before anything is used.
        b = tl.zeros([BLOCK_OUT, BLOCK_E * BLOCK_R], dtype=b_ptr.dtype.element_ty)
        b_up = b
        if ONE and DELTAS:
            b = load_ranks(
                b_at, col_mask_b, 0, n_experts, 0, RANK, EVEN_B, EVEN_K, BLOCK_E, BLOCK_R
            )
            if EPILOGUE != 0:
                b_up = load_ranks(
                    b_at + APART_B * size, col_mask_up, 0, n_experts, 0,
                    RANK, EVEN_B, EVEN_K, BLOCK_E, BLOCK_R,
                )  # fmt: skip
        if EPILOGUE == 3:
            turning = rows < tl.where(offset < WIDTH0 + WIDTH1, n_tokens, 0)  # v is not turned
            turned = turning[:, None] & col_mask[None, :]
            turn = cos_sin_ptr + rows[:, None] * (2 * HALF)
            turn += (within + tl.arange(0, BLOCK_OUT))[None, :]
            cos = tl.load(turn, mask=turned, other=0.0)
            sin = tl.load(turn + HALF, mask=turned, other=0.0)
        # All that needs no kernel before this one is asked for by now.
        if PDL and LOOP == 1:
            tl.extra.cuda.gdc_wait()
        y = tl.load(y_at, mask=mask, other=0.0)
        if SPLIT_K > 1:
            y = y.to(tl.float32)
        for k in tl.static_range(1, SPLIT_K):
            y += tl.load(y_at + k * split_stride, mask=mask, other=0.0)
        up = y
        if EPILOGUE != 0:
            up = tl.load(y_at + APART, mask=mask, other=0.0)
        if ONE and LOOP == 1 and DELTAS:
            lora_a_out, lora_a_out_up = load_both(
                lora_a_out_at, lora_a_out_up_at, rows_s, rows_up, n_experts, EPILOGUE, RANK,
                EVEN_K, BLOCK_E, BLOCK_R,
            )
            if SPLIT_K > 1:
                sums = lora_a_out.to(tl.float32)
                for k in tl.static_range(1, SPLIT_K):
                    sums += load_ranks(
                        lora_a_out_at + k * split_stride, rows_s, 0, n_experts, 0,
                        RANK, False, EVEN_K, BLOCK_E, BLOCK_R,
                    )  # fmt: skip
                lora_a_out = weigh(sums, gates).to(lora_a_out.dtype)
            elif RAW:
                lora_a_out, lora_a_out_up = weigh(lora_a_out, gates), weigh(lora_a_out_up, gates)
        active_bits = -1
        if SKIP and DELTAS:  # it may come from the kernel before
            active_bits = tl.load(active_ptr)
        y = y.to(tl.float32)
        if HAS_BIAS:
            bias_at = bias_ptr + offset + columns
            y += tl.load(bias_at, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if DELTAS:
            y = add_deltas(
                y, b, lora_a_out, lora_a_out_at, gates_ptr, active_bits, listed_ptr, b_at, rows, rows_s,
                col_mask_b, n_experts, RANK, RAW, SKIP, LISTED, EVEN_B, EVEN_K, ONE,
                BLOCK_T, BLOCK_E, BLOCK_R,
            )  # fmt: skip
        if EPILOGUE != 0:
            up = up.to(tl.float32)
            if HAS_BIAS:
                up += tl.load(bias_at + APART, mask=col_mask, other=0.0).to(tl.float32)[None, :]
            if DELTAS:
                up = add_deltas(
                    up, b_up, lora_a_out_up, lora_a_out_up_at, gates_ptr, active_bits, listed_ptr,
                    b_at + APART_B * size, rows, rows_up, col_mask_up, n_experts, RANK, RAW, SKIP,
                    LISTED, EVEN_B, EVEN_K, ONE, BLOCK_T, BLOCK_E, BLOCK_R,
                )  # fmt: skip
        out_at = out_ptr + rows.to(tl.int64)[:, None] * out_stride + (offset + columns)[None, :]
        if EPILOGUE == 3:
            if offset < WIDTH0 + WIDTH1:
                y, up = rotate(y, up, cos.to(tl.float32), sin.to(tl.float32))
            if KV:
                head = first // HALF
                starts, kept = starts_of_head(
                    out_ptr + rows.to(tl.int64) * out_stride + (offset + head * (2 * HALF)),
                    token_mask, keys_ptr, values_ptr, kv_starts, slot_mask,
                    second.to(tl.int32) + third.to(tl.int32), head, head_stride, KV,
                )  # fmt: skip
                out_at = starts[:, None] + (within + tl.arange(0, BLOCK_OUT))[None, :]
                mask = kept[:, None] & col_mask[None, :]
            tl.store(out_at + HALF, up.to(out_ptr.dtype.element_ty), mask=mask)
        elif EPILOGUE != 0:
            y = activate(y, up, EPILOGUE)
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=mask)


class _Key(NamedTuple):
    """What groups of tiles, and a kernel's constants, hang on.

    Attributes:
        tokens: of the step, or any more than MAX_SHORT_EXPAND_TOKENS.
        widths, adapted, half: of the projection; half a head, 0 without "rotary".
        index: of the epilogue in `EPILOGUES`.
        all_slices: those without experts have tiles too.
        experts, rank, itemsize: of B.
        config: how to cut, None for the default.
        hopper, has_bias, kv: the device is one, there is a bias, there are KV slots.
        raw: s is not yet weighted.
        split_k: split-K sums to add up, 0 for none.
        listed: which blocks of experts tokens have is listed.
    """

    tokens: int
    widths: tuple[int, ...]
    adapted: tuple[int, ...]
    half: int
    index: int
    all_slices: bool
    experts: int
    rank: int
    itemsize: int
    config: ExpandConfig | None
    hopper: bool
    has_bias: bool
    kv: bool
    raw: bool
    split_k: int
    listed: bool


class Read(NamedTuple):
    """Tensors that are read, some of them None."""

    bias: torch.Tensor | None
    lora_b: torch.Tensor
    gates: torch.Tensor | None
    active: torch.Tensor
    cos_sin: torch.Tensor | None = None
    tile_blocks: torch.Tensor | None = None


def launch_expand(
    y: torch.Tensor,
    out: torch.Tensor,
    lora_a_out: torch.Tensor,
    read: Read,
    of: tuple[Sequence[int], Sequence[int], int],
    config: ExpandConfig | None = None,
    kv_slots: KVSlots | None = None,
) -> None:
    """One launch; of: adapted, widths, and the index of what follows."""
    (adapted, widths, index), is_split = of, y.dim() == 3
    tokens, (_, experts, rank) = y.shape[-2], read.lora_b.shape
    groups, block_t, kernel = _plan(_Key(
        min(tokens, MAX_SHORT_EXPAND_TOKENS + 1), tuple(widths), tuple(adapted),
        read.cos_sin.shape[1] // 2 if index == ROTARY else 0, index, out is not y,
        experts, rank, y.element_size(), config, on_hopper(y), read.bias is not None,
        kv_slots is not None, read.gates is not None, y.shape[0] if is_split else 0,
        read.tile_blocks is not None,
    ))  # fmt: skip
    kernel(
        (groups, cdiv(tokens, block_t)),
        y, read.bias, out, lora_a_out, read.lora_b, read.gates, read.active, read.tile_blocks, read.cos_sin,
        tokens, y.stride(0), y.stride(-2), out.stride(0), lora_a_out.stride(1 if is_split else 0), experts,
        *(kv_slots or NO_KV_SLOTS),
    )  # fmt: skip


@functools.cache
def _plan(key: _Key) -> tuple[int, int, Bound]:
    """Groups of tiles, tokens of a tile, and the kernel."""
    tokens, widths, adapted, half, index, all_slices, experts, rank, itemsize, config, *flags = key
    hopper, has_bias, kv, raw, split_k, listed = flags
    if config is None:
        config = choose_expand(tokens, index != 0, itemsize)
    columns = min(config.columns, half) if index == ROTARY else config.columns
    # A tile has both members of its pairs.
    if index:
        tiled = tiled_widths(widths, EPILOGUES[index])
    else:
        tiled = [w for w, linear_idx in zip(widths, adapted) if linear_idx >= 0 or all_slices]
    span = columns * config.loop
    all_adapted = min(adapted) >= 0
    one = expert_blocks(experts, rank, False)["ONE"]
    asks = tokens < MIN_DENSE_TOKENS and not one
    widths, adapted = (*widths, 0, 0)[:3], (*adapted, -1, -1)[:3]
    return sum(cdiv(w, span) for w in tiled), config.tokens, bind(
        _expand_kernel,
        HAS_BIAS=has_bias, KV=kv, RAW=raw, SPLIT_K=split_k,
        LISTED=TILE_TOKENS if listed else 0,
        WIDTH0=widths[0], WIDTH1=widths[1], WIDTH2=widths[2],
        ADAPTED0=adapted[0], ADAPTED1=adapted[1], ADAPTED2=adapted[2],
        EPILOGUE=index, HALF=half, ALL=all_slices,
        EVEN=all(w % span == 0 for w in tiled), ALL_ADAPTED=all_adapted,
        BLOCK_T=config.tokens, BLOCK_OUT=columns,
        LOOP=config.loop, STAGES=config.stages, num_warps=config.warps,
        **expert_blocks(experts, rank, asks), **overlap(hopper),
    )  # fmt: skip


def expand_triton(
    y: torch.Tensor,
    lora_a_out: torch.Tensor,
    lora_b: torch.Tensor,
    active: torch.Tensor,
    adapted: Sequence[int],
    widths: Sequence[int],
    tile_blocks: torch.Tensor | None = None,
) -> None:
    """Adds the deltas of T tokens to y in place, in one launch.

    Args:
        y: [T, out], the projection's own output; rows contiguous.
        lora_a_out: [T, P, E * R], dtype of y, from `shrink`.
        lora_b: [sum of the adapted widths, E, R] contiguous, dtype of y or float8_e4m3fn.
        active: [1] int64, bit 0 for experts whose s is zero everywhere.
        adapted: for each of up to three slices of y the index of its linear, -1 for one without
            experts.
        widths: columns of each slice.
        tile_blocks: which blocks of experts tokens have; s of others is not read. None: of all.
    """
    read = Read(None, lora_b, None, active, None, tile_blocks)
    launch_expand(y, y, lora_a_out, read, (adapted, widths, 0))


def expand_raw_triton(
    y: torch.Tensor,
    lora_a_out: torch.Tensor,
    bias: torch.Tensor | None,
    p: Projection,
    step: Step,
    config: ExpandConfig | None = None,
    kv_slots: KVSlots | None = None,
) -> torch.Tensor:
    """From the outputs of W and A to those of the adapted projection, in one launch.

    Args:
        y: [T, out], W x; overwritten where no activation follows and no bias is added, and with
            `strided_out`. Or split-K sums [split_k, T, out], where one product has all
            experts and no activation follows.
        lora_a_out: [T, S E R], A x of all experts, weighted if they are in fp8 and else not yet;
            or [split_k, T, S E R], as y.
        bias: [out], or None: what of the projection's is still to be added.
        p: the projection.
        step: the step's buffers.
        config: how to cut, default `dispatch.choose_expand`.
        kv_slots: where k and v go with "rotary", whose columns of the result stay undefined then.

    Returns:
        [T, out], or [T, I] after silu or gelu_tanh; contiguous, or in y.
    """
    widths, epilogue = p.shape.widths, p.shape.kernel_epilogue
    index, result = EPILOGUES.index(epilogue), result_of(y, widths, epilogue, p.strided_out)
    if y.dim() == 3:
        result = y.new_empty(y.shape[1:])
    elif result is y and (index or bias is not None):
        result = torch.empty_like(y)
    tile_blocks = step.blocks_of(p.shape, y.shape[-2])
    gates = None if p.shape.fp8 else step.gates
    read = Read(bias, p.lora_b, gates, step.active, step.cos_sin, tile_blocks)
    launch_expand(y, result, lora_a_out, read, (p.shape.adapted, widths, index), config, kv_slots)
    return result


def expand_torch(
    y: torch.Tensor,
    lora_a_out: torch.Tensor,
    lora_b: torch.Tensor,
    adapted: Sequence[int],
    widths: Sequence[int],
) -> None:
    """By cuBLAS; the reference, see `expand_triton`. Views of lora_a_out and B need contiguous rows alone."""
    b, row, column = lora_b.flatten(1).to(y.dtype), 0, 0
    for linear_idx, width in zip(adapted, widths):
        if linear_idx >= 0:
            y[:, column : column + width].addmm_(lora_a_out[:, linear_idx], b[row : row + width].t())
            row += width
        column += width

