"""A projection and the deltas of its experts in one launch, for some dozens of tokens:

    y[t] = W x[t] + bias + Σ_e B[:, e] s[t, p, e]          s[t, p, e] = gates[t, e] A[p, e] x[t]

and at once what follows it (pairs.py): gate_up's activation, the rotary embedding of q and k.

W and A are one tensor, [W; A], cut into tiles of rows, all tokens to a tile. The first programs
take the tiles of A and leave s; the others, when their tile of W x is done, wait for it and add the
expand. With so many tokens x is read as often as W: both come through the tensor memory
accelerator, without which the loop is bound by its addresses. Hence Hopper and later; elsewhere
`linear` takes the vendor's product. Where rows come in pairs, one box of the accelerator's has both
members, so that one product takes them and each thread ends with the two columns that belong
together. SGMM (AdaFuse, arXiv 2603.11873, section 3), inside the base product; `stream_linear` is
the same for fewer tokens, and says why waiting cannot hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_adafuse.kernels.blocks import BLOCK_ER, block_er, on_hopper, overlap
from vllm_adafuse.kernels.early import prefetch_pairs
from vllm_adafuse.kernels.launch import launch
from vllm_adafuse.kernels.paged_cache import NO_PAGES, Pages, rows_in_pages, starts_of_head
from vllm_adafuse.kernels.pairs import (
    ACTIVATIONS,
    ROTARY,
    activate,
    is_gate_up,
    result_width,
    rotate,
    tiled_widths,
    turns_of_heads,
)
from vllm_adafuse.kernels.scratch import Scratch
from vllm_adafuse.kernels.shrink import (
    MAX_SLICES,
    all_sums,
    is_last,
    leave_sums,
    slice_of_in,
)
from vllm_adafuse.kernels.tile_deltas import (
    add_deltas,
    apart,
    held_b,
    load_b,
    s_of_parts,
    with_deltas,
)
from vllm_adafuse.kernels.tiles import MAX_TILE_TOKENS, Tiles
from vllm_adafuse.kernels.whole import cdiv, power_of_2

# Rows of A in a tile. Hopper's tensor cores take no fewer tokens than MIN_TOKENS.
SHRINK_ROWS = 64
MIN_TOKENS = 64
# Of a thread, with which it has registers for as many more of gate and of up, and for B or not.
MAX_SUMS, MAX_EARLY_SUMS = 64, 96


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
    tiles = cdiv(ranks, SHRINK_ROWS)
    return low, MAX_SLICES * tiles * SHRINK_ROWS * MAX_TILE_TOKENS, tiles


@triton.jit
def _shrink_tile(
    pid, x_desc, a_desc, gates_ptr, s_ptr, partial_ptr, ticket_ptr, counter_ptr,
    n_tokens, size_in,
    RANKS: tl.constexpr, RANK: tl.constexpr, EXPERTS: tl.constexpr, SLICES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, SHRINK_ROWS: tl.constexpr,
    COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A slice of `in` for one tile of A; whoever is the last of its tile leaves s [T, ranks]."""
    tile, slice_ = pid // SLICES, pid % SLICES
    begin, end = slice_of_in(size_in, slice_, SLICES, COLS)
    sums = tl.zeros([BLOCK_T, SHRINK_ROWS], dtype=tl.float32)
    for start in tl.range(begin, end, COLS, num_stages=STAGES):
        a = a_desc.load([tile * SHRINK_ROWS, start])
        sums = tl.dot(x_desc.load([0, start]), a.T, sums, input_precision="ieee")
    last = True
    if SLICES > 1:
        leave_sums(sums, partial_ptr, tile, slice_, SLICES, BLOCK_T, SHRINK_ROWS)
        last = is_last(ticket_ptr + tile, SLICES)
    if last:
        if SLICES > 1:
            sums = all_sums(partial_ptr, tile, SLICES, BLOCK_T, SHRINK_ROWS)
        tokens, ranks = tl.arange(0, BLOCK_T), tile * SHRINK_ROWS + tl.arange(0, SHRINK_ROWS)
        here, experts = tokens < n_tokens, tl.arange(0, BLOCK_E)
        # Spread over ranks by a product with ones: to gather would be a load per element.
        its = (experts[:, None] == (ranks // RANK % EXPERTS)[None, :]).to(tl.float32)
        gates_at = gates_ptr + tokens[:, None] * EXPERTS + experts[None, :]
        chosen = here[:, None] & (experts < EXPERTS)[None, :]
        gates = tl.load(gates_at, mask=chosen, other=0.0)
        gates = tl.dot(gates, its, input_precision="tf32x3")
        # Not a bare product: what another token sees of this expert must not matter.
        s = tl.where(gates != 0, sums * gates, 0.0).to(s_ptr.dtype.element_ty)
        s_at = s_ptr + tokens[:, None] * RANKS + ranks[None, :]
        tl.store(s_at, s, mask=here[:, None] & (ranks < RANKS)[None, :])
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def _columns(local, width, ACT: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
    """Columns of a part that `ROWS` of its first members from `local` on are: how far in its head
    the first one is, the head, the columns, and which of them are there."""
    head, within, start = 0, 0, local
    if ACT == 3:
        head, within = local // HALF, tl.multiple_of(local % HALF, ROWS)
        start = tl.multiple_of(head * (2 * HALF) + within, ROWS)
    columns = start + tl.arange(0, ROWS)
    return within, head, columns, columns < width


@triton.jit
def _finish(
    y, up, local, slice_, bias_ptr, y_ptr, cos_sin_ptr, n_tokens, y_stride, number, first, width,
    in_pages, there, keys_ptr, values_ptr, head_stride,
    APART: tl.constexpr, TURNED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr, HALF: tl.constexpr, PAGED: tl.constexpr,
    BLOCK_T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From the members of a tile, deltas included, to a tile of the result."""
    tokens = tl.arange(0, BLOCK_T)
    here = tokens < n_tokens
    within, head, columns, inside = _columns(local, width, ACT, HALF, ROWS)
    if HAS_BIAS:
        bias_at = bias_ptr + first + columns
        y += tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)[None, :]
        if ACT != 0:
            up += tl.load(bias_at + APART, mask=inside, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + slice_ * n_tokens * y_stride
    y_at += tokens[:, None] * y_stride + (first + columns)[None, :]
    mask = here[:, None] & inside[None, :]
    if ACT == 3:
        if first < TURNED:  # v is not turned
            cos, sin = turns_of_heads(cos_sin_ptr, tokens, here, 0, within, HALF, ROWS)
            y, up = rotate(y, up, cos.to(tl.float32), sin.to(tl.float32))
        if PAGED:
            starts, kept = starts_of_head(
                y_ptr + tokens * y_stride + (first + head * (2 * HALF)), here,
                keys_ptr, values_ptr, in_pages, there, number, head, head_stride, PAGED,
            )  # fmt: skip
            y_at = starts[:, None] + (within + tl.arange(0, ROWS))[None, :]
            mask = kept[:, None] & inside[None, :]
        tl.store(y_at + HALF, up.to(y_ptr.dtype.element_ty), mask=mask)
    elif ACT != 0:
        y = activate(y, up, ACT)
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def _tile_linear_kernel(
    x_desc, w_desc, more_desc, a_desc, b_desc, more_b_desc,
    w_ptr, bias_ptr, b_ptr, y_ptr, cos_sin_ptr, gates_ptr,
    s_ptr, partial_ptr, ticket_ptr, counter_ptr,
    n_tokens, y_stride, size_in,
    keys_ptr, values_ptr, slots_ptr, block_size, block_stride, row_stride, head_stride,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    PART0: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr, HALF: tl.constexpr, PAGED: tl.constexpr,
    SPLIT: tl.constexpr, SLICES: tl.constexpr, RANK: tl.constexpr, EXPERTS: tl.constexpr,
    RANKS: tl.constexpr, SHRINK_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_ER: tl.constexpr,
    ROWS: tl.constexpr, MORE: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
    TOGETHER: tl.constexpr, EARLY_B: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    SHRINK_TILES: tl.constexpr = (RANKS + SHRINK_ROWS - 1) // SHRINK_ROWS
    SHRINKS: tl.constexpr = SHRINK_TILES * SLICES
    if pid < SHRINKS:
        if PDL:  # launched before the kernel in front of it has ended
            tl.extra.cuda.gdc_wait()
        _shrink_tile(
            pid, x_desc, a_desc, gates_ptr, s_ptr, partial_ptr, ticket_ptr, counter_ptr,
            n_tokens, size_in, RANKS, RANK, EXPERTS, SLICES,
            BLOCK_T, BLOCK_E, SHRINK_ROWS, COLS, STAGES,
        )  # fmt: skip
    else:
        # Which tile of which part, and which slice of `in`. With ACT a tile has both members.
        tile, slice_ = (pid - SHRINKS) // SPLIT, (pid - SHRINKS) % SPLIT
        TALL: tl.constexpr = ROWS + MORE
        WIDE: tl.constexpr = TALL * (2 if ACT == 3 else 1)
        TILES0: tl.constexpr = (WIDTH0 + WIDE - 1) // WIDE
        TILES1: tl.constexpr = (WIDTH1 + WIDE - 1) // WIDE if ACT == 0 or ACT == 3 else 0
        # B has no rows for parts without experts.
        SKIP1: tl.constexpr = WIDTH0 if PART0 < 0 else 0
        SKIP2: tl.constexpr = SKIP1 + (WIDTH1 if PART1 < 0 else 0)
        second, third = tile >= TILES0, tile >= TILES0 + TILES1
        local = tile - tl.where(third, TILES0 + TILES1, tl.where(second, TILES0, 0))
        local *= TALL
        width = tl.where(third, WIDTH2, tl.where(second, WIDTH1, WIDTH0))
        first = tl.where(third, WIDTH0 + WIDTH1, tl.where(second, WIDTH0, 0))
        part = tl.where(third, PART2, tl.where(second, PART1, PART0))
        skipped = tl.where(third, SKIP2, tl.where(second, SKIP1, 0))
        number = second.to(tl.int32) + third.to(tl.int32)
        APART: tl.constexpr = HALF if ACT == 3 else WIDTH0
        APART_B: tl.constexpr = HALF if ACT == 3 else WIDTH0 - SKIP1
        SIZE: tl.constexpr = EXPERTS * RANK
        adds = (part >= 0) & (slice_ == 0)
        MEMBERS: tl.constexpr = 2 if ACT != 0 else 1
        member, row = 0, local
        if ACT == 0:
            row += first
        if ACT == 3:
            member, row = first // HALF + local // HALF * 2, local % HALF
        if PDL:
            if ACT != 0:  # behind a norm, which lets it begin early
                start = member * APART + row
                prefetch_pairs(w_ptr, start, WIDTH0 + WIDTH1 + WIDTH2, size_in, APART, ROWS)
                if MORE:
                    start += ROWS
                    prefetch_pairs(w_ptr, start, WIDTH0 + WIDTH1 + WIDTH2, size_in, APART, MORE)
        at = first - skipped
        if EARLY_B:  # comes from no kernel either
            b = held_b(b_desc, local, at, ACT, HALF, ROWS, BLOCK_ER)
            if MORE:
                more_b = held_b(more_b_desc, local + ROWS, at, ACT, HALF, MORE, BLOCK_ER)
        if PDL:
            tl.extra.cuda.gdc_wait()
        tokens = tl.arange(0, BLOCK_T)
        in_pages, there = rows_in_pages(
            slots_ptr, tokens, tokens < n_tokens, block_size, block_stride, row_stride, PAGED
        )
        begin, end = slice_of_in(size_in, slice_, SPLIT, COLS)
        acc = tl.zeros([BLOCK_T, MEMBERS * ROWS], dtype=tl.float32)
        more = tl.zeros([BLOCK_T, MEMBERS * MORE if MORE else 16], dtype=tl.float32)
        for start in tl.range(begin, end, COLS, num_stages=STAGES):
            x = x_desc.load([0, start])
            w = tl.reshape(w_desc.load([member, row, start]), [MEMBERS * ROWS, COLS])
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
            if MORE:
                w = more_desc.load([member, row + ROWS, start])
                w = tl.reshape(w, [MEMBERS * MORE, COLS])
                more = tl.dot(x, w.T, more, input_precision="ieee")
        if TOGETHER:
            if not EARLY_B:
                GATED: tl.constexpr = ACT == 1 or ACT == 2
                ONLY: tl.constexpr = 0 if GATED and PART1 < 0 else -1
                wanted = adds | (GATED and PART1 >= 0)
                b = load_b(
                    b_ptr, local, width, at, 0, wanted, ONLY,
                    APART_B, ACT, HALF, SIZE, BLOCK_ER, ROWS,
                )  # fmt: skip
                if MORE:
                    more_b = load_b(
                        b_ptr, local + ROWS, width, at, 0, wanted, ONLY,
                        APART_B, ACT, HALF, SIZE, BLOCK_ER, MORE,
                    )  # fmt: skip
            s, s_up = s_of_parts(
                s_ptr, counter_ptr, n_tokens, part, adds,
                PART1, ACT, RANKS, SIZE, SHRINK_TILES, BLOCK_T, BLOCK_ER,
            )  # fmt: skip
            y, up = with_deltas(acc, b, s, s_up, PART0, PART1, ACT, BLOCK_T, ROWS)
            if MORE:
                more_y, more_up = with_deltas(
                    more, more_b, s, s_up, PART0, PART1, ACT, BLOCK_T, MORE
                )
        else:
            acc = add_deltas(
                acc, local, b_ptr, s_ptr, counter_ptr, n_tokens, width, at, part, adds,
                True, APART_B, PART0, PART1, ACT, HALF, RANKS, SIZE, SHRINK_TILES,
                BLOCK_T, BLOCK_ER, ROWS,
            )  # fmt: skip
            if MORE:
                more = add_deltas(
                    more, local + ROWS, b_ptr, s_ptr, counter_ptr, n_tokens, width, at, part, adds,
                    False, APART_B, PART0, PART1, ACT, HALF, RANKS, SIZE, SHRINK_TILES,
                    BLOCK_T, BLOCK_ER, MORE,
                )  # fmt: skip
                more_y, more_up = apart(more, ACT, BLOCK_T, MORE)
            y, up = apart(acc, ACT, BLOCK_T, ROWS)
        _finish(
            y, up, local, slice_, bias_ptr, y_ptr, cos_sin_ptr, n_tokens, y_stride, number, first,
            width, in_pages, there, keys_ptr, values_ptr, head_stride, APART, WIDTH0 + WIDTH1,
            HAS_BIAS, ACT, HALF, PAGED, BLOCK_T, ROWS,
        )  # fmt: skip
        if MORE:
            _finish(
                more_y, more_up, local + ROWS, slice_, bias_ptr, y_ptr, cos_sin_ptr, n_tokens,
                y_stride, number, first, width, in_pages, there, keys_ptr, values_ptr, head_stride,
                APART, WIDTH0 + WIDTH1, HAS_BIAS, ACT, HALF, PAGED, BLOCK_T, MORE,
            )  # fmt: skip


def _is_together(ranks: int, activation: str, sums: int, most: int) -> bool:
    """Whether one product has the ranks of all experts. That of gate_up has both members, each with
    sums of its own beside the tile's, which are so many in a thread's registers."""
    return ranks <= BLOCK_ER and (not is_gate_up(activation) or sums <= most)


def _can_hold(bank_b: torch.Tensor) -> bool:
    """Whether the accelerator can read B, and it takes the memory that a cut says."""
    return bank_b.element_size() == 2 and not bank_b.stride(0) % 8


def _b_in_boxes(bank_b: torch.Tensor, tall: int, members: int, rows: int) -> TensorDescriptor:
    """B as members of `tall` rows each; boxes have rows of some members, and all ranks."""
    ranks = bank_b.stride(0)
    shape, strides = [bank_b.shape[0] // tall, tall, ranks], [tall * ranks, ranks, 1]
    return TensorDescriptor(bank_b, shape, strides, [members, rows, block_er(ranks)])


def tile_linear_triton(
    x: torch.Tensor,
    joint: torch.Tensor,
    bias: torch.Tensor | None,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
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
    size_out = sum(widths)
    bank_a = joint[size_out:]
    members = tiled_widths(widths, activation)
    shape = tokens, size_in, sum(members), activation, x.element_size()
    cut = tiles or Tiles.choose(*shape, tma=True) or Tiles(64, 64, stages=3)
    if half:
        cut = replace(cut, rows=min(cut.pieces[0], half))
    rows, more = cut.pieces
    block_t = max(MIN_TOKENS, power_of_2(tokens))
    count = sum(cdiv(w, cut.rows) for w in members)
    shrinks = cdiv(bank_a.shape[0], SHRINK_ROWS) * cut.slices
    widths, parts = [*widths, 0, 0][:3], [*parts, -1, -1][:3]
    y = x.new_empty(tokens, result_width(widths, activation)) if out is None else out
    split = cut.split if y.dim() == 3 else 1
    # W as members, rows of each, and `in`: boxes of pairs have two members.
    tall, pair = half or (widths[0] if act else size_out), 2 if act else 1
    shape, strides = [size_out // tall, tall, size_in], [tall * size_in, size_in, 1]
    boxes = [[pair, r, cut.cols] for r in (rows, more or rows)]
    kind = experts * rank, activation, block_t * cut.rows * pair // (32 * cut.warps)
    together, early_b = _is_together(*kind, MAX_SUMS), (None, None)
    if cut.early_b and _can_hold(bank_b) and _is_together(*kind, MAX_EARLY_SUMS):
        # A member of gate_up without experts has no rows in B.
        tall = half or bank_b.shape[0] // max(1, sum(part >= 0 for part in parts[:pair]))
        early_b = [_b_in_boxes(bank_b, tall, pair, r) for r in (rows, more or rows)]
    launch(
        _tile_linear_kernel, (shrinks + count * split,),
        TensorDescriptor(x, list(x.shape), list(x.stride()), [block_t, cut.cols]),
        *(TensorDescriptor(joint, shape, strides, box) for box in boxes),
        TensorDescriptor(bank_a, list(bank_a.shape), [size_in, 1], [SHRINK_ROWS, cut.cols]),
        *early_b, joint, bias, bank_b, y, cos_sin,
        gates, scratch.s(x.dtype, tokens, bank_a.shape[0]),
        scratch.partial, scratch.tickets, counter,
        tokens, y.stride(-2), size_in, *(pages or NO_PAGES),
        WIDTH0=widths[0], WIDTH1=widths[1], WIDTH2=widths[2],
        PART0=parts[0], PART1=parts[1], PART2=parts[2],
        HAS_BIAS=bias is not None, ACT=act, HALF=half, PAGED=pages is not None,
        SPLIT=split, SLICES=cut.slices, RANK=rank, EXPERTS=experts,
        RANKS=bank_a.shape[0], SHRINK_ROWS=SHRINK_ROWS,
        BLOCK_T=block_t, BLOCK_E=max(16, power_of_2(experts)),
        BLOCK_ER=block_er(experts * rank),
        ROWS=rows, MORE=more, COLS=cut.cols, STAGES=cut.stages,
        TOGETHER=together or early_b[0] is not None, EARLY_B=early_b[0] is not None,
        num_warps=cut.warps, num_stages=cut.stages, **overlap(on_hopper(x)),
    )  # fmt: skip
    return y
