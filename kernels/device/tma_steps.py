"""The steps of a tile of `tma_gemm`, one product of [x | s] and [W | B]:

    acc[t, m] = Σ_k x[t, k] W[m, k] + Σ_e s[t, p(m), e] B[m, e]   m over the rows of a tile, p(m)
                                                                   their linear

Steps of `in` come first, then steps of ranks, in which s stands for x, and B for W: a descriptor is
a value like others, so each step chooses its own, and all are one pipeline. Each member of gate_up
has an s of its own: B of one comes beside zeros, which lie outside of its descriptor and are not
read. Of many experts the steps are those of blocks in which one is active. SGMM (AdaFuse, arXiv
2603.11873, section 3).
"""

from __future__ import annotations

import triton
import triton.language as tl
from vllm_adafuse.kernels.device.sync import wait_now


@triton.jit
def apart(acc, EPILOGUE: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr):
    """The two members of a tile [T, 2 * ROWS], [T, ROWS] each; without an activation the tile."""
    y, up = acc, acc
    if EPILOGUE != 0:
        y, up = tl.split(tl.permute(tl.reshape(acc, [BLOCK_T, 2, ROWS]), [0, 2, 1]))
    return y, up


@triton.jit
def active_blocks(bits, EXPERTS: tl.constexpr, BLOCKS: tl.constexpr):
    """Blocks of EXPERTS experts of which one is active, four bits for each in rising order, and
    how many they are; bits: of experts, BLOCKS of them at most 16."""
    MASK: tl.constexpr = (1 << EXPERTS) - 1
    blocks, count = tl.zeros([], dtype=tl.int64), 0
    for block in tl.static_range(BLOCKS):
        slot_mask = (bits >> (block * EXPERTS)) & MASK != 0
        blocks |= tl.where(slot_mask, block, 0).to(tl.int64) << (4 * count)
        count += slot_mask.to(tl.int32)
    return blocks, count


@triton.jit
def rank_of_step(step, blocks, COLS: tl.constexpr, LISTED: tl.constexpr):
    """Where the ranks of a linear's step begin, counted within the linear; see `active_blocks`."""
    if LISTED:
        step = ((blocks >> (4 * step)) & 15).to(tl.int32)
    return step * COLS


@triton.jit
def loop_over(
    acc, piece1, begin, end, of_in, of_gate, blocks, ahead,
    x_desc, w_desc, piece1_w_desc, lora_a_out_desc, b_desc, piece1_b_desc, up_desc, piece1_up_desc,
    semaphore_ptr, member, row, b_member, b_row, linear_idx,
    SIZE: tl.constexpr, HAS_UP: tl.constexpr, ADAPTED1: tl.constexpr, LISTED: tl.constexpr,
    MEMBERS: tl.constexpr, ROWS: tl.constexpr, PIECE1: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr, SHRINK_TILES: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Some steps of a tile's product: those before `of_in` of W and x, others of B and s, for
    which it waits, if it WAITS, in step `ahead`; of_gate: how many of these are gate's, if up has
    steps of its own."""
    for step in tl.range(begin, end, num_stages=STAGES):
        if WAITS:
            wait_now(semaphore_ptr, SHRINK_TILES, (step == ahead) & (end > of_in))
        at, of_member, of_row, of_s = step * COLS, member, row, 0
        from_x, from_w, from_more = x_desc, w_desc, piece1_w_desc
        if step >= of_in:
            at = rank_of_step(step - of_in, blocks, COLS, LISTED)
            of_member, of_row, of_s = b_member, b_row, linear_idx * SIZE
            from_x, from_w, from_more = lora_a_out_desc, b_desc, piece1_b_desc
        if HAS_UP:
            if step >= of_in + of_gate:
                at = rank_of_step(step - of_in - of_gate, blocks, COLS, LISTED)
                of_member, of_s = -1, ADAPTED1 * SIZE
                from_w, from_more = up_desc, piece1_up_desc
        x = from_x.load([0, of_s + at])
        w = from_w.load([of_member, of_row, at])
        acc = tl.dot(x, tl.reshape(w, [MEMBERS * ROWS, COLS]).T, acc, input_precision="ieee")
        if PIECE1:
            w = from_more.load([of_member, of_row + ROWS, at])
            w = tl.reshape(w, [MEMBERS * PIECE1, COLS])
            piece1 = tl.dot(x, w.T, piece1, input_precision="ieee")
    return acc, piece1
