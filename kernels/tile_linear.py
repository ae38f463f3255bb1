"""A projection and the deltas of its experts in one launch, for some dozens of tokens:

    y[t] = W x[t] + bias + Σ_e B[:, e] s[t, p, e]          s[t, p, e] = gates[t, e] A[p, e] x[t]

and at once what follows it (pairs.py): gate_up's activation, the rotary embedding of q and k.

W and A are one tensor, [W; A], cut into tiles of rows, all tokens to a tile. The first programs
take the tiles of A and leave s; the others, when their tile of W x is done, wait for it and add the
expand. With so many tokens x is read as often as W: both come through the tensor memory
accelerator, without which the loop is bound by its addresses. Hence Hopper and later; elsewhere
`linear` takes the vendor's product. SGMM (AdaFuse, arXiv 2603.11873, section 3), inside the base
product; `stream_linear` is the same for fewer tokens, and says why waiting cannot hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_adafuse.kernels.blocks import BLOCK_ER, on_hopper, overlap
from vllm_adafuse.kernels.launch import launch
from vllm_adafuse.kernels.paged_cache import NO_PAGES, Pages, rows_in_pages, starts_of_head
from vllm_adafuse.kernels.pairs import (
    ACTIVATIONS,
    ROTARY,
    activate,
    result_width,
    rotate,
    tiled_widths,
)
from vllm_adafuse.kernels.scratch import Scratch
from vllm_adafuse.kernels.shrink import MAX_SLICES, all_sums, is_last, leave_sums
from vllm_adafuse.kernels.stream_linear import add_delta, load_b
from vllm_adafuse.kernels.tiles import MAX_TILE_TOKENS, Tiles
from vllm_adafuse.kernels.whole import cdiv, power_of_2


def can_tile(x: torch.Tensor, joint: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator is there, and can read both."""
    if x.shape[0] > MAX_TILE_TOKENS or not on_hopper(x):
        return False
    strides = x.stride(0) * x.element_size(), joint.stride(0) * joint.element_size()
    return x.stride(1) == 1 and not any(stride % 16 for stride in strides)


def scratch_sizes(bank_a: torch.Tensor) -> tuple[int, int, int]:
    """Bytes of s, floats of partial sums and tickets that a projection may need."""
    ranks = bank_a.numel() // bank_a.shape[-1]
    low = MAX_TILE_TOKENS * ranks * bank_a.element_size()
    return low, MAX_SLICES * (ranks + 256) * MAX_TILE_TOKENS, ranks // 16 + 16


def block_er(block_t: int, act: int, ranks: int) -> int:
    """Ranks of a step of the expand: fewer where gate's and up's sums leave few registers."""
    most = BLOCK_ER // 2 if act and block_t > 64 else BLOCK_ER
    return min(most, max(16, power_of_2(ranks)))


@triton.jit(do_not_specialize=["n_tokens"])
def _tile_linear_kernel(
    x_desc, joint_desc, bias_ptr, b_ptr, y_ptr, cos_sin_ptr,
    gates_ptr, present_ptr, s_ptr, partial_ptr, ticket_ptr, counter_ptr,
    n_tokens, y_stride, size_in, n_parts,
    keys_ptr, values_ptr, slots_ptr, block_size, block_stride, row_stride, head_stride,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    PART0: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr, HALF: tl.constexpr, PAGED: tl.constexpr,
    SPLIT: tl.constexpr, SLICES: tl.constexpr, RANK: tl.constexpr, EXPERTS: tl.constexpr,
    SHRINK_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_ER: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if PDL:  # launched while the kernel before it ends
        tl.extra.cuda.gdc_wait()
    SHRINKS: tl.constexpr = SHRINK_TILES * SLICES
    OUT: tl.constexpr = WIDTH0 + WIDTH1 + WIDTH2
    tokens = tl.arange(0, BLOCK_T)
    here = tokens < n_tokens
    # Which tile of which part, or of A and which slice of `in`. With ACT a tile has both members of
    # its pairs: of gate and up, of first and second halves of heads.
    shrinks = pid < SHRINKS
    tile = tl.where(shrinks, pid // SLICES, (pid - SHRINKS) // SPLIT)
    slices = tl.where(shrinks, SLICES, SPLIT)
    slice_ = tl.where(shrinks, pid % SLICES, (pid - SHRINKS) % SPLIT)
    TALL: tl.constexpr = ROWS * (2 if ACT == 3 else 1)
    PARTED: tl.constexpr = ACT == 0 or ACT == 3
    TILES0: tl.constexpr = (WIDTH0 + TALL - 1) // TALL
    TILES01: tl.constexpr = TILES0 + ((WIDTH1 + TALL - 1) // TALL if PARTED else 0)
    # B has no rows for parts without experts.
    SKIP1: tl.constexpr = WIDTH0 if PART0 < 0 else 0
    SKIP2: tl.constexpr = SKIP1 + (WIDTH1 if PART1 < 0 else 0)
    second, third = tile >= TILES0, tile >= TILES01
    local = tile - tl.where(third, TILES01, tl.where(second, TILES0, 0))
    width = tl.where(third, WIDTH2, tl.where(second, WIDTH1, WIDTH0))
    first = tl.where(third, WIDTH0 + WIDTH1, tl.where(second, WIDTH0, 0))
    part = tl.where(third, PART2, tl.where(second, PART1, PART0))
    skipped = tl.where(third, SKIP2, tl.where(second, SKIP1, 0))
    PER_TILE: tl.constexpr = ROWS * 2 if ACT != 0 else ROWS
    APART: tl.constexpr = HALF if ACT == 3 else WIDTH0
    APART_B: tl.constexpr = HALF if ACT == 3 else WIDTH0 - SKIP1
    part_up = part if ACT == 3 else PART1
    start_row, within = local * ROWS, 0
    if ACT == 3:
        within = tl.multiple_of(start_row % HALF, ROWS)
        start_row = tl.multiple_of(start_row // HALF * (2 * HALF) + within, ROWS)
    row = tl.where(shrinks, OUT + tile * PER_TILE, first + start_row)
    row_up = tl.where(shrinks, row + ROWS, APART + row)

    slice_in = tl.cdiv(tl.cdiv(size_in, slices), COLS) * COLS
    begin = slice_ * slice_in
    end = tl.minimum(begin + slice_in, size_in)
    acc = tl.zeros([ROWS, BLOCK_T], dtype=tl.float32)
    acc_up = acc
    for start in tl.range(begin, end, COLS, num_stages=STAGES):
        x = x_desc.load([0, start])
        acc = tl.dot(joint_desc.load([row, start]), x.T, acc, input_precision="ieee")
        if ACT != 0:
            up = joint_desc.load([row_up, start])
            acc_up = tl.dot(up, x.T, acc_up, input_precision="ieee")

    size, columns = EXPERTS * RANK, tl.arange(0, BLOCK_ER)
    if shrinks:
        PLANES: tl.constexpr = 2 if ACT != 0 else 1
        last = True
        if SLICES > 1:  # both are left before one is taken up again: registers
            leave_sums(acc, partial_ptr, tile * PLANES, slice_, SLICES, ROWS, BLOCK_T)
            if ACT != 0:
                leave_sums(acc_up, partial_ptr, tile * PLANES + 1, slice_, SLICES, ROWS, BLOCK_T)
            last = is_last(ticket_ptr + tile, SLICES)
        if last:
            for plane in tl.static_range(PLANES):
                if SLICES > 1:
                    sums = all_sums(partial_ptr, tile * PLANES + plane, SLICES, ROWS, BLOCK_T)
                else:
                    sums = acc if plane == 0 else acc_up
                ranks = tile * PER_TILE + plane * ROWS + tl.arange(0, ROWS)
                real = (ranks < n_parts * size)[:, None] & here[None, :]
                # Spread over rows by a product with ones: to gather would be a load per element.
                experts = tl.arange(0, BLOCK_E)
                its = (ranks // RANK % EXPERTS)[:, None] == experts[None, :]
                gates_at = gates_ptr + tokens[None, :] * EXPERTS + experts[:, None]
                chosen = here[None, :] & (experts < EXPERTS)[:, None]
                gates = tl.load(gates_at, mask=chosen, other=0.0)
                gates = tl.dot(its.to(tl.float32), gates, input_precision="tf32x3")
                # Not a bare product: what another token sees of this expert must not matter.
                s = tl.where(gates != 0, sums * gates, 0.0).to(s_ptr.dtype.element_ty)
                s_at = s_ptr + tokens[None, :] * (n_parts * size) + ranks[:, None]
                tl.store(s_at, s, mask=real)
            tl.debug_barrier()
            tl.atomic_add(counter_ptr, 1, sem="release")
    else:
        present = tl.load(present_ptr)
        in_pages, there = rows_in_pages(
            slots_ptr, tokens, here, block_size, block_stride, row_stride, PAGED
        )
        local_rows = start_row + tl.arange(0, ROWS)
        rows = first + tl.minimum(local_rows, width - 1)
        adds = part >= 0
        if SPLIT > 1:
            adds = adds & (slice_ == 0)
        if adds:
            b_at = b_ptr + (rows - skipped).to(tl.int64)[:, None] * size
            acc = add_delta(
                acc, b_at, load_b(b_at, columns, size, present, RANK), present, s_ptr, counter_ptr,
                n_tokens, part, n_parts, EXPERTS, SHRINK_TILES, RANK, BLOCK_T, BLOCK_ER,
            )  # fmt: skip
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
        if ACT != 0:
            if part_up >= 0:
                b_at = b_ptr + (rows - skipped + APART_B).to(tl.int64)[:, None] * size
                acc_up = add_delta(
                    acc_up, b_at, load_b(b_at, columns, size, present, RANK), present, s_ptr,
                    counter_ptr, n_tokens, part_up, n_parts, EXPERTS, SHRINK_TILES, RANK, BLOCK_T,
                    BLOCK_ER,
                )  # fmt: skip
            if HAS_BIAS:
                acc_up += tl.load(bias_ptr + APART + rows).to(tl.float32)[:, None]
        y_at = y_ptr + tokens[None, :] * y_stride + (first + local_rows)[:, None]
        if SPLIT > 1:
            y_at += slice_ * n_tokens * y_stride
        mask = (local_rows < width)[:, None] & here[None, :]
        if ACT == 3:
            if first < WIDTH0 + WIDTH1:  # v is not turned
                turn = cos_sin_ptr + tokens[None, :] * (2 * HALF)
                turn += (within + tl.arange(0, ROWS))[:, None]
                cos = tl.load(turn, mask=mask, other=0.0).to(tl.float32)
                sin = tl.load(turn + HALF, mask=mask, other=0.0).to(tl.float32)
                acc, acc_up = rotate(acc, acc_up, cos, sin)
            if PAGED:
                head = local * ROWS // HALF
                starts, kept = starts_of_head(
                    y_ptr + tokens * y_stride + (first + head * (2 * HALF)), here,
                    keys_ptr, values_ptr, in_pages, there,
                    second.to(tl.int32) + third.to(tl.int32), head, head_stride, PAGED,
                )  # fmt: skip
                y_at = starts[None, :] + (within + tl.arange(0, ROWS))[:, None]
                mask = (local_rows < width)[:, None] & kept[None, :]
            tl.store(y_at + HALF, acc_up.to(y_ptr.dtype.element_ty), mask=mask)
        elif ACT != 0:
            acc = activate(acc, acc_up, ACT)
        tl.store(y_at, acc.to(y_ptr.dtype.element_ty), mask=mask)


def tile_linear_triton(
    x: torch.Tensor,
    joint: torch.Tensor,
    bias: torch.Tensor | None,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    counter: torch.Tensor,
    scratch: Scratch,
    parts: Sequence[int],
    widths: Sequence[int],
    activation: str = "",
    tiles: Tiles | None = None,
    out: torch.Tensor | None = None,
    cos_sin: torch.Tensor | None = None,
    pages: Pages | None = None,
) -> torch.Tensor:
    """One launch for up to 128 tokens; see `vllm_adafuse.kernels.linear.linear`.

    Args:
        x, joint: as `can_tile` wants them.
        counter: [>= 1] int32, zero; of this launch alone until the next step.
        tiles: how to cut, default `Tiles.choose`; `shrink_cols` is not used, and `split` only
            with slices in `out`.
        out: where the result goes, [T, out] with contiguous rows, or [split, T, out] contiguous,
            float32, to leave the sums of each slice of `in` unadded; default a new tensor.
        cos_sin: [>= T, D], with "rotary"; see `rotate_torch`.
        pages: where k and v go with "rotary", whose columns of the result stay undefined then.
    """
    tokens, size_in = x.shape
    act = ACTIVATIONS.index(activation)
    half = cos_sin.shape[1] // 2 if act == ROTARY else 0
    _, experts, rank = bank_b.shape
    ranks = joint.shape[0] - sum(widths)
    n_parts = ranks // (experts * rank)
    members = tiled_widths(widths, activation)
    rows = sum(members)
    cut = tiles or Tiles.choose(tokens, size_in, rows, activation, x.element_size(), True)
    cut = cut or Tiles(64, 64, stages=3)
    if half:
        cut = replace(cut, rows=min(cut.rows, half))
    block_t = max(16, power_of_2(tokens))
    shrink_tiles = cdiv(ranks, cut.rows * (2 if act else 1))
    count = sum(cdiv(w, cut.rows) for w in members)
    widths, parts = [*widths, 0, 0][:3], [*parts, -1, -1][:3]
    y = x.new_empty(tokens, result_width(widths, activation)) if out is None else out
    split = cut.split if y.dim() == 3 else 1
    launch(
        _tile_linear_kernel, (shrink_tiles * cut.slices + count * split,),
        TensorDescriptor(x, list(x.shape), list(x.stride()), [block_t, cut.cols]),
        TensorDescriptor(joint, list(joint.shape), list(joint.stride()), [cut.rows, cut.cols]),
        bias, bank_b, y, cos_sin,
        gates, present, scratch.s(x.dtype, tokens, n_parts, experts * rank),
        scratch.partial, scratch.tickets, counter,
        tokens, y.stride(-2), size_in, n_parts, *(pages or NO_PAGES),
        WIDTH0=widths[0], WIDTH1=widths[1], WIDTH2=widths[2],
        PART0=parts[0], PART1=parts[1], PART2=parts[2],
        HAS_BIAS=bias is not None, ACT=act, HALF=half, PAGED=pages is not None,
        SPLIT=split, SLICES=cut.slices, RANK=rank, EXPERTS=experts, SHRINK_TILES=shrink_tiles,
        BLOCK_T=block_t, BLOCK_E=max(16, power_of_2(experts)),
        BLOCK_ER=block_er(block_t, act, experts * rank),
        ROWS=cut.rows, COLS=cut.cols, STAGES=cut.stages,
        num_warps=cut.warps, num_stages=cut.stages, **overlap(on_hopper(x)),
    )  # fmt: skip
    return y
