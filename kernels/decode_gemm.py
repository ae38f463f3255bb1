"""A projection and the deltas of its experts in one launch, for a few tokens:

    y[t] = W x[t] + bias + Σ_e B[:, e] s[t, p, e]          s[t, p, e] = gates[t, e] A[p, e] x[t]

and at once what follows it (device/epilogues.py): gate_up's activation, the rotary embedding of q and k.

With few tokens a projection is the time to read W. The grid streams W in tiles of rows, with the
tokens as the narrow side of the product. Its first programs compute the shrink s; a tile adds its
expand at the end, when s has long been there. So the experts cost their bytes and no launch.

A tile waits for the shrink on a semaphore. That cannot hang: programs start in the order of their
numbers, so those that are waited for run before, or beside, all that wait. SGMM (AdaFuse, arXiv
2603.11873, section 3), here inside the base product.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.configs import (
    BLOCK_ER,
    MAX_SHRINK_SPLIT_K,
    MAX_SPLIT_K,
    GemmConfig,
    block_er,
)
from vllm_adafuse.kernels.device.epilogues import (
    EPILOGUES,
    activate,
    result_width,
    rotate,
    tiled_widths,
)
from vllm_adafuse.kernels.device.pdl import prefetch
from vllm_adafuse.kernels.device.shrink import shrink_program
from vllm_adafuse.kernels.device.sync import last_sums, range_of_k, wait_for_shrink
from vllm_adafuse.kernels.dispatch import MAX_SHRINK_TOKENS, MAX_STREAM_TOKENS, default_config
from vllm_adafuse.kernels.kv_slots import NO_KV_SLOTS, KVSlots, rows_in_kv, starts_of_head
from vllm_adafuse.kernels.launch import launch, overlap
from vllm_adafuse.kernels.operands import Projection, Step
from vllm_adafuse.kernels.plans import on_hopper
from vllm_adafuse.kernels.shrink import SHRINK_STAGES, ShrinkGrid, fit_cols
from vllm_adafuse.kernels.whole import cdiv, power_of_2

# To widen B takes registers: of 128 ranks it spills (two members, 32 tokens, sm_90), and so it does by bits
# instead of the list.
FP8_BLOCK_ER = 64


def workspace_sizes(lora_a: torch.Tensor, rows: int) -> tuple[int, int, int]:
    """What a projection of `rows` rows may need of a `Workspace`: bytes, floats, semaphores."""
    linears, experts, rank, _ = lora_a.shape
    alone, within = ShrinkGrid.of(lora_a), ShrinkGrid.of(lora_a, MAX_SHRINK_SPLIT_K)
    bytes_ = MAX_SHRINK_TOKENS * linears * experts * rank * lora_a.element_size()
    padded = rows + 3 * 64
    of_shrink = max(alone.programs * MAX_SHRINK_TOKENS, within.programs * MAX_STREAM_TOKENS)
    sums = of_shrink * alone.block_r + MAX_SPLIT_K * padded * MAX_STREAM_TOKENS
    return bytes_, sums, alone.slots + padded // 16


@triton.jit
def _columns(
    start, active_ptr, active, n_experts,
    PADDED: tl.constexpr, RANK: tl.constexpr, BLOCK_ER: tl.constexpr,
):  # fmt: skip
    """A block of columns of B, and which of them are of active experts.

    PADDED: columns for each of those in the list, one after the other: a multiple of the 16 that
    tensor cores take at once, so that a token's sums do not depend on who else is active. 0: no
    list is kept to, and columns are those of B.
    active: how many experts are active; by columns of B, their bits.
    """
    columns = start + tl.arange(0, BLOCK_ER)
    if PADDED:
        place, ranks = columns // PADDED, columns % PADDED
        used = place < active
        if PADDED != RANK:
            used &= ranks < RANK
        experts = tl.load(active_ptr + 2 + tl.minimum(place, n_experts - 1))
        columns = experts.to(tl.int32) * RANK + ranks
        if RANK % 8 == 0:  # so that loads are of 16 bytes
            columns = tl.max_contiguous(tl.multiple_of(columns, 8), 8)
    else:
        # Of a known rank, so that loads know how long their masks stay the same.
        used = ((active >> (columns // RANK)) & 1 != 0) & (columns < n_experts * RANK)
    return columns, used


@triton.jit
def load_b(
    b_at, start, active_ptr, active, n_experts,
    PADDED: tl.constexpr, RANK: tl.constexpr, BLOCK_ER: tl.constexpr,
):  # fmt: skip
    """A block of columns of B [rows, columns]; see `_columns`."""
    columns, used = _columns(start, active_ptr, active, n_experts, PADDED, RANK, BLOCK_ER)
    return tl.load(b_at + columns[None, :], mask=used[None, :], other=0.0)


@triton.jit
def _load_lora_a_out(
    lora_a_out_at, start, token_mask, active_ptr, active, n_experts,
    PADDED: tl.constexpr, RANK: tl.constexpr, BLOCK_ER: tl.constexpr,
):  # fmt: skip
    """A block of ranks of s [columns, T]; see `_columns`."""
    columns, used = _columns(start, active_ptr, active, n_experts, PADDED, RANK, BLOCK_ER)
    mask = token_mask[None, :] & used[:, None]
    return tl.load(lora_a_out_at + columns[:, None], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _of_members(
    lora_a_out_at, lora_a_out_up_at, start, token_mask, active_ptr, asked, asked_up, n_experts,
    APART: tl.constexpr, PADDED: tl.constexpr, RANK: tl.constexpr, BLOCK_ER: tl.constexpr,
):  # fmt: skip
    """The same of both members, which have one s unless they are APART."""
    s = _load_lora_a_out(
        lora_a_out_at, start, token_mask, active_ptr, asked, n_experts, PADDED, RANK, BLOCK_ER
    )
    s_up = s
    if APART:
        s_up = _load_lora_a_out(
            lora_a_out_up_at, start, token_mask, active_ptr, asked_up, n_experts, PADDED, RANK,
            BLOCK_ER,
        )  # fmt: skip
    return s, s_up


@triton.jit
def add_both_deltas(
    acc, acc_up, b_at, b_up_at, b, b_up, active_ptr, asked, asked_up, active, lora_a_out_ptr,
    semaphore_ptr, shrinks, n_tokens, linear_idx, linear_up, n_linears, n_experts,
    PAIRS: tl.constexpr, SHARED: tl.constexpr, PADDED: tl.constexpr, RANK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_ER: tl.constexpr,
):  # fmt: skip
    """acc [rows, T] + B[rows] s[linear], and with PAIRS of the other member too.

    b, b_up: the first blocks of columns of B, loaded long before. All of a step is asked for in the
    step before, for each way to memory shows here: nothing is left that would hide it.
    asked: `active` of a member with experts, else 0. SHARED: both members have one s.
    """
    tokens = tl.arange(0, BLOCK_T)
    token_mask = tokens < n_tokens
    size = n_experts * RANK
    lora_a_out_at = lora_a_out_ptr + (tokens * n_linears + linear_idx)[None, :] * size
    lora_a_out_up_at = lora_a_out_ptr + (tokens * n_linears + linear_up)[None, :] * size
    if (asked != 0) | (asked_up != 0):
        wait_for_shrink(semaphore_ptr, shrinks)
        s, s_up = _of_members(
            lora_a_out_at, lora_a_out_up_at, 0, token_mask, active_ptr, asked, asked_up, n_experts,
            PAIRS and not SHARED, PADDED, RANK, BLOCK_ER,
        )  # fmt: skip
        # One block without a list. Out of a loop Triton would keep b in shared memory all along.
        end = size
        if PADDED:
            end = active.to(tl.int32) * PADDED
        for start in range(0, end, BLOCK_ER):
            after = start + BLOCK_ER
            later = load_b(b_at, after, active_ptr, asked, n_experts, PADDED, RANK, BLOCK_ER)
            later_up, later_s, later_s_up = b_up, s, s_up
            if PAIRS:
                later_up = load_b(
                    b_up_at, after, active_ptr, asked_up, n_experts, PADDED, RANK, BLOCK_ER
                )
            if PADDED:
                later_s, later_s_up = _of_members(
                    lora_a_out_at, lora_a_out_up_at, after, token_mask, active_ptr, asked, asked_up,
                    n_experts, PAIRS and not SHARED, PADDED, RANK, BLOCK_ER,
                )  # fmt: skip
            acc = tl.dot(b.to(s.dtype), s, acc, input_precision="ieee")
            if PAIRS:
                acc_up = tl.dot(b_up.to(s.dtype), s_up, acc_up, input_precision="ieee")
            b, b_up, s, s_up = later, later_up, later_s, later_s_up
    return acc, acc_up


@triton.jit(do_not_specialize=["n_tokens"])
def _decode_gemm_kernel(
    x_ptr, w_ptr, bias_ptr, a_ptr, b_ptr, y_ptr, cos_sin_ptr,
    gates_ptr, active_ptr, lora_a_out_ptr, partial_ptr, split_k_semaphore_ptr, semaphore_ptr,
    n_tokens, x_stride, y_stride, size_in, n_experts, n_linears, n_slots, shrink_split_k,
    keys_ptr, values_ptr, slots_ptr, block_size, block_stride, row_stride, head_stride,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    ADAPTED0: tl.constexpr, ADAPTED1: tl.constexpr, ADAPTED2: tl.constexpr,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr, KV: tl.constexpr,
    EVEN: tl.constexpr, SPLIT_K: tl.constexpr, LEAVE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_ER: tl.constexpr,
    RANK: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
    SHRINK_COLS: tl.constexpr, SHRINK_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid, n_shrinks = tl.program_id(0), n_slots * shrink_split_k
    if pid < n_shrinks:
        if PDL:  # launched before the kernel in front of it has ended
            tl.extra.cuda.gdc_wait()
        shrink_program(
            pid, x_ptr, a_ptr, gates_ptr, active_ptr, lora_a_out_ptr, partial_ptr,
            split_k_semaphore_ptr, semaphore_ptr, n_tokens, x_stride, size_in, n_experts, RANK,
            n_linears, n_slots, shrink_split_k, PADDED != 0, BLOCK_T, BLOCK_R, SHRINK_COLS,
            SHRINK_STAGES,
        )  # fmt: skip
    else:
        # Which tile of which slice, and which slice of `in`. With EPILOGUE rows come in pairs, and
        # a tile has both members: of gate and up, of first and second halves of heads.
        tile, pid_k = (pid - n_shrinks) // SPLIT_K, (pid - n_shrinks) % SPLIT_K
        TALL: tl.constexpr = ROWS * (2 if EPILOGUE == 3 else 1)
        SLICED: tl.constexpr = EPILOGUE == 0 or EPILOGUE == 3
        TILES0: tl.constexpr = (WIDTH0 + TALL - 1) // TALL
        TILES01: tl.constexpr = TILES0 + ((WIDTH1 + TALL - 1) // TALL if SLICED else 0)
        # B has no rows for slices without experts.
        SKIP1: tl.constexpr = WIDTH0 if ADAPTED0 < 0 else 0
        SKIP2: tl.constexpr = SKIP1 + (WIDTH1 if ADAPTED1 < 0 else 0)
        second, third = tile >= TILES0, tile >= TILES01
        local = tile - tl.where(third, TILES01, tl.where(second, TILES0, 0))
        width = tl.where(third, WIDTH2, tl.where(second, WIDTH1, WIDTH0))
        first = tl.where(third, WIDTH0 + WIDTH1, tl.where(second, WIDTH0, 0))
        linear_idx = tl.where(third, ADAPTED2, tl.where(second, ADAPTED1, ADAPTED0))
        skipped = tl.where(third, SKIP2, tl.where(second, SKIP1, 0))
        local_rows, within = local * ROWS + tl.arange(0, ROWS), 0
        if EPILOGUE == 3:
            within = tl.multiple_of(local * ROWS % HALF, ROWS)
            local_rows = tl.multiple_of(local * ROWS // HALF * (2 * HALF) + within, ROWS)
            local_rows += tl.arange(0, ROWS)
        APART: tl.constexpr = HALF if EPILOGUE == 3 else WIDTH0
        APART_B: tl.constexpr = HALF if EPILOGUE == 3 else WIDTH0 - SKIP1
        linear_up = linear_idx if EPILOGUE == 3 else ADAPTED1
        rows = first + tl.minimum(local_rows, width - 1)
        w_at = w_ptr + rows.to(tl.int64)[:, None] * size_in
        if PDL:
            if EPILOGUE != 0:  # behind a norm, which lets it begin early
                prefetch(w_at)
                prefetch(w_at + APART * size_in)
            tl.extra.cuda.gdc_wait()
        tokens = tl.arange(0, BLOCK_T)
        token_mask = tokens < n_tokens
        kv_starts, slot_mask = rows_in_kv(
            slots_ptr, tokens, token_mask, block_size, block_stride, row_stride, KV
        )
        begin, end = range_of_k(size_in, pid_k, SPLIT_K, COLS)
        x_at = x_ptr + tokens[None, :] * x_stride
        acc = tl.zeros([ROWS, BLOCK_T], dtype=tl.float32)
        acc_up = acc
        # B is asked for long before it is needed: at the end its latency would show.
        active = tl.load(active_ptr + (1 if PADDED else 0))
        slots, shrinks, size = n_slots, n_slots, n_experts * RANK
        if PADDED:
            of_expert = n_linears * ((RANK + BLOCK_R - 1) // BLOCK_R)
            slots, shrinks = n_experts * of_expert, active.to(tl.int32) * of_expert
        b_at = b_ptr + (rows - skipped).to(tl.int64)[:, None] * size
        b_up_at = b_at
        asked = tl.where((linear_idx >= 0) & (pid_k == 0), active, 0)
        asked_up = tl.where(linear_up >= 0, active, 0) if EPILOGUE != 0 else active * 0
        b = load_b(b_at, 0, active_ptr, asked, n_experts, PADDED, RANK, BLOCK_ER)
        b_up = b
        if EPILOGUE != 0:
            b_up_at = b_up_at + APART_B * size
            b_up = load_b(b_up_at, 0, active_ptr, asked_up, n_experts, PADDED, RANK, BLOCK_ER)
        for start in tl.range(begin, end, COLS, num_stages=STAGES):
            k = start + tl.arange(0, COLS)
            k_mask = k < end
            if EVEN:
                x = tl.load(x_at + k[:, None], mask=token_mask[None, :], other=0.0)
                w = tl.load(w_at + k[None, :], eviction_policy="evict_first")
            else:
                x_mask = token_mask[None, :] & k_mask[:, None]
                x = tl.load(x_at + k[:, None], mask=x_mask, other=0.0)
                w = tl.load(w_at + k[None, :], mask=k_mask[None, :], other=0.0)
            acc = tl.dot(w, x, acc, input_precision="ieee")
            if EPILOGUE != 0:
                up_at = w_at + APART * size_in
                if EVEN:
                    w = tl.load(up_at + k[None, :], eviction_policy="evict_first")
                else:
                    w = tl.load(up_at + k[None, :], mask=k_mask[None, :], other=0.0)
                acc_up = tl.dot(w, x, acc_up, input_precision="ieee")
        acc, acc_up = add_both_deltas(
            acc, acc_up, b_at, b_up_at, b, b_up, active_ptr, asked, asked_up, active, lora_a_out_ptr,
            semaphore_ptr, shrinks, n_tokens, linear_idx, linear_up, n_linears, n_experts,
            EPILOGUE != 0, EPILOGUE == 3, PADDED, RANK, BLOCK_T, BLOCK_ER,
        )  # fmt: skip
        last = True
        if SPLIT_K > 1 and not LEAVE:
            acc, last = last_sums(
                acc, partial_ptr + slots * shrink_split_k * (BLOCK_R * BLOCK_T),
                split_k_semaphore_ptr + slots, tile, pid_k, SPLIT_K, ROWS, BLOCK_T,
            )  # fmt: skip
        if last:
            if HAS_BIAS:
                acc += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
            if EPILOGUE != 0 and HAS_BIAS:
                acc_up += tl.load(bias_ptr + APART + rows).to(tl.float32)[:, None]
            y_at = y_ptr + tokens[None, :] * y_stride + (first + local_rows)[:, None]
            if LEAVE:
                y_at += pid_k * n_tokens * y_stride
            mask = (local_rows < width)[:, None] & token_mask[None, :]
            if EPILOGUE == 3:
                if first < WIDTH0 + WIDTH1:  # v is not turned
                    turn = cos_sin_ptr + tokens[None, :] * (2 * HALF)
                    turn += (within + tl.arange(0, ROWS))[:, None]
                    cos = tl.load(turn, mask=mask, other=0.0).to(tl.float32)
                    sin = tl.load(turn + HALF, mask=mask, other=0.0).to(tl.float32)
                    acc, acc_up = rotate(acc, acc_up, cos, sin)
                if KV:
                    head = local * ROWS // HALF
                    starts, kept = starts_of_head(
                        y_ptr + tokens * y_stride + (first + head * (2 * HALF)), token_mask,
                        keys_ptr, values_ptr, kv_starts, slot_mask,
                        second.to(tl.int32) + third.to(tl.int32), head, head_stride, KV,
                    )  # fmt: skip
                    y_at = starts[None, :] + (within + tl.arange(0, ROWS))[:, None]
                    mask = (local_rows < width)[:, None] & kept[None, :]
                tl.store(y_at + HALF, acc_up.to(y_ptr.dtype.element_ty), mask=mask)
            elif EPILOGUE != 0:
                acc = activate(acc, acc_up, EPILOGUE)
            tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=mask)


def decode_gemm_triton(
    x: torch.Tensor,
    p: Projection,
    step: Step,
    config: GemmConfig | None = None,
    out: torch.Tensor | None = None,
    kv_slots: KVSlots | None = None,
) -> torch.Tensor:
    """One launch; see `vllm_adafuse.kernels.projection.projection`.

    Args:
        x: [T, in], T <= MAX_STREAM_TOKENS.
        p: the projection; its semaphore is zero, and of this launch alone until the next step.
        step: the step's buffers.
        config: how to cut, default `dispatch.default_config`.
        out: where the result goes, [T, out] with contiguous rows, or [split_k, T, out] contiguous,
            float32, to leave the sums of each slice of `in` unadded; default a new tensor.
        kv_slots: where k and v go with "rotary", whose columns of the result stay undefined then.

    Raises:
        ValueError: split-K sums before an activation or rotary embedding, which takes whole sums.
    """
    (tokens, size_in), shape, workspace = x.shape, p.shape, step.workspace
    widths, adapted, epilogue = shape.widths, shape.adapted, shape.kernel_epilogue
    index, half = EPILOGUES.index(epilogue), shape.head_dim // 2
    n_linears, experts, rank, _ = p.lora_a.shape
    members = tiled_widths(widths, epilogue)
    rows = sum(members)
    if config is None:
        config = default_config(tokens, size_in, rows, epilogue, x.element_size())
    if index and config.split_k > 1:
        raise ValueError(f"decode_gemm: split_k is {config.split_k}, expected 1 before {epilogue}")
    if half:
        config = replace(config, rows=min(config.rows, half))
    grid = ShrinkGrid.of(p.lora_a, config.shrink_split_k)
    padded = 0
    if experts * rank > BLOCK_ER or shape.fp8:
        padded, grid = cdiv(rank, 16) * 16, grid.for_tokens(tokens, experts)
    block_t = max(16, power_of_2(tokens))
    shrink_cols = fit_cols(config.shrink_cols, grid.block_r, block_t, x.element_size())
    widths, adapted = [*widths, 0, 0][:3], [*adapted, -1, -1][:3]
    count = sum(cdiv(w, config.rows) for w in members)
    y = x.new_empty(tokens, result_width(widths, epilogue)) if out is None else out
    leave = y.dim() == 3
    launch(
        _decode_gemm_kernel, (grid.programs + count * config.split_k,),
        x, p.weight, p.bias, p.lora_a, p.lora_b, y, step.cos_sin,
        step.gates, step.active, workspace.view(x.dtype, tokens, n_linears, experts * rank),
        workspace.partial_sums, workspace.split_k_semaphores, p.semaphore,
        tokens, x.stride(0), y.stride(-2), size_in, experts, n_linears, grid.slots, grid.split_k,
        *(kv_slots or NO_KV_SLOTS),
        WIDTH0=widths[0], WIDTH1=widths[1], WIDTH2=widths[2],
        ADAPTED0=adapted[0], ADAPTED1=adapted[1], ADAPTED2=adapted[2],
        HAS_BIAS=p.bias is not None, EPILOGUE=index, HALF=half, KV=kv_slots is not None,
        EVEN=size_in % (config.cols * config.split_k) == 0,
        SPLIT_K=config.split_k, LEAVE=leave, BLOCK_T=block_t, BLOCK_R=grid.block_r,
        BLOCK_ER=block_er(min(experts * rank, FP8_BLOCK_ER) if shape.fp8 else experts * rank),
        RANK=rank, PADDED=padded, ROWS=config.rows, COLS=config.cols, STAGES=config.stages,
        SHRINK_COLS=shrink_cols, SHRINK_STAGES=SHRINK_STAGES,
        num_warps=config.warps, num_stages=config.stages, **overlap(on_hopper(x)),
    )  # fmt: skip
    return y
