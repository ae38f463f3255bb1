"""What experts add to a tile of `tile_linear`, for all its tokens:

    acc[t, m] += Σ_e B[m, e] s[t, p(m), e]            m over the rows of a tile, p(m) their part

A tile of gate_up has rows of both members, [gate | up], of different parts: each is a product of
its own. Where the ranks of all experts fit into one product (`with_deltas`), B can come before the
tile's loop begins and wait in shared memory (`held_b`); else a chunk of ranks comes at a time
(`add_deltas`). SGMM (AdaFuse, arXiv 2603.11873, section 3).
"""

from __future__ import annotations

import triton
import triton.language as tl
from vllm_adafuse.kernels.shrink import wait_for_shrink


@triton.jit
def apart(acc, ACT: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr):
    """The two members of a tile [T, 2 * ROWS], [T, ROWS] each; without an activation the tile."""
    y, up = acc, acc
    if ACT != 0:
        y, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_T, 2, ROWS]), [0, 2, 1]))
    return y, up


@triton.jit
def held_b(
    b_desc, local, first,
    ACT: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_ER: tl.constexpr,
):  # fmt: skip
    """B of a tile, all members [members * rows, BLOCK_ER], through the tensor memory accelerator;
    rows past the part's end may be anything, ranks past the last are zero."""
    member, row = 0, first + local
    if ACT == 3:
        member, row = first // HALF + local // HALF * 2, local % HALF
    MEMBERS: tl.constexpr = 2 if ACT != 0 else 1
    return tl.reshape(b_desc.load([member, row, 0]), [MEMBERS * ROWS, BLOCK_ER])


@triton.jit
def s_of_parts(
    s_ptr, counter_ptr, n_tokens, part, adds,
    PART1: tl.constexpr, ACT: tl.constexpr, RANKS: tl.constexpr, SIZE: tl.constexpr,
    SHRINK_TILES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_ER: tl.constexpr,
):  # fmt: skip
    """s [T, BLOCK_ER] of a part, zero if nothing `adds`; and that of up, if it has its own."""
    wait_for_shrink(counter_ptr, SHRINK_TILES)
    tokens, ranks = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_ER)
    inside = (ranks < SIZE)[None, :]
    at = s_ptr + tokens[:, None] * RANKS + ranks[None, :]
    mask = (tokens < tl.where(adds, n_tokens, 0))[:, None] & inside
    s = tl.load(at + part * SIZE, mask=mask, other=0.0, cache_modifier=".cg")
    s_up = s
    if (ACT == 1 or ACT == 2) and PART1 >= 0:
        mask = (tokens < n_tokens)[:, None] & inside
        s_up = tl.load(at + PART1 * SIZE, mask=mask, other=0.0, cache_modifier=".cg")
    return s, s_up


@triton.jit
def with_deltas(
    acc, b, s, s_up,
    PART0: tl.constexpr, PART1: tl.constexpr, ACT: tl.constexpr,
    BLOCK_T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The members of a tile, deltas included; b of `held_b` or `load_b`, s of `s_of_parts`."""
    if ACT == 1 or ACT == 2:
        # Products of both members, of which one is used: B comes as one tile. `fma`, since a sum
        # would become the product's own first value, and products wait then (see add_deltas).
        y, up = apart(acc, ACT, BLOCK_T, ROWS)
        if PART0 >= 0:
            delta, _ = apart(tl.dot(s, b.T, input_precision="ieee"), ACT, BLOCK_T, ROWS)
            y = tl.fma(delta, 1.0, y)
        if PART1 >= 0:
            delta, second = apart(tl.dot(s_up, b.T, input_precision="ieee"), ACT, BLOCK_T, ROWS)
            if PART0 >= 0:
                delta = second
            up = tl.fma(delta, 1.0, up)
    else:
        y, up = apart(tl.dot(s, b.T, acc, input_precision="ieee"), ACT, BLOCK_T, ROWS)
    return y, up


@triton.jit
def load_b(
    b_ptr, local, width, first, chunk, wanted, ONLY: tl.constexpr, APART: tl.constexpr,
    ACT: tl.constexpr, HALF: tl.constexpr, SIZE: tl.constexpr, BLOCK_ER: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """A chunk of B for a tile, all members [members * rows, BLOCK_ER]; rows past the part's end may
    be anything, and all where it is not `wanted`. ONLY: zeros for the other member."""
    MEMBERS: tl.constexpr = 2 if ACT != 0 else 1
    place = tl.arange(0, MEMBERS * ROWS)
    member, column = place // ROWS, local + place % ROWS
    if ACT == 3:
        column = column // HALF * (2 * HALF) + column % HALF
    rows = tl.where(wanted, first + tl.minimum(column, width - 1) + member * APART, 0)
    ranks = chunk * BLOCK_ER + tl.arange(0, BLOCK_ER)
    at = b_ptr + rows.to(tl.int64)[:, None] * SIZE + ranks[None, :]
    if ONLY < 0 and SIZE % BLOCK_ER == 0:
        return tl.load(at)
    mask = (ranks < SIZE)[None, :] & ((member == ONLY) | (ONLY < 0))[:, None]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def _add_delta(
    acc, local, b_ptr, s_ptr, counter_ptr, n_tokens, width, first, part,
    ONLY: tl.constexpr, WAITS: tl.constexpr, APART: tl.constexpr, ACT: tl.constexpr,
    HALF: tl.constexpr, RANKS: tl.constexpr, SIZE: tl.constexpr, SHRINK_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_ER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """acc [T, members * rows] + s[part] B[rows]ᵀ; ONLY: see `load_b`; WAITS: for s."""
    tokens = tl.arange(0, BLOCK_T)
    s_at = s_ptr + tokens * RANKS + part * SIZE
    for chunk in tl.static_range((SIZE + BLOCK_ER - 1) // BLOCK_ER):
        ranks = chunk * BLOCK_ER + tl.arange(0, BLOCK_ER)
        b = load_b(
            b_ptr, local, width, first, chunk, True, ONLY, APART, ACT, HALF, SIZE, BLOCK_ER, ROWS
        )
        if WAITS and chunk == 0:  # B is on its way
            wait_for_shrink(counter_ptr, SHRINK_TILES)
        mask = (tokens < n_tokens)[:, None] & (ranks < SIZE)[None, :]
        s = tl.load(s_at[:, None] + ranks[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        acc = tl.dot(s, b.T, acc, input_precision="ieee")
    return acc


@triton.jit
def add_deltas(
    acc, local, b_ptr, s_ptr, counter_ptr, n_tokens, width, first, part, adds,
    WAITS: tl.constexpr, APART: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    ACT: tl.constexpr, HALF: tl.constexpr,
    RANKS: tl.constexpr, SIZE: tl.constexpr, SHRINK_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_ER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The deltas of a tile, before its members part: if a product went on with some of the sums of
    the one before, the compiler would have all products wait for one another (ptxas: C7511).
    WAITS: no product of this tile has waited for s before, which takes a way to the memory."""
    GATED: tl.constexpr = ACT == 1 or ACT == 2  # each with an s of its own, and so a product
    if adds:
        acc = _add_delta(
            acc, local, b_ptr, s_ptr, counter_ptr, n_tokens, width, first, part,
            0 if GATED else -1, WAITS, APART, ACT, HALF, RANKS, SIZE, SHRINK_TILES,
            BLOCK_T, BLOCK_ER, ROWS,
        )  # fmt: skip
    if GATED and PART1 >= 0:
        acc = _add_delta(
            acc, local, b_ptr, s_ptr, counter_ptr, n_tokens, width, first, PART1,
            1, WAITS and PART0 < 0, APART, ACT, HALF, RANKS, SIZE, SHRINK_TILES,
            BLOCK_T, BLOCK_ER, ROWS,
        )  # fmt: skip
    return acc
