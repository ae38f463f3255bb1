"""A projection and the deltas of its experts in one launch, for some dozens of tokens:

    y[t] = W x[t] + bias + Σ_e B[:, e] s[t, p, e]          s[t, p, e] = gates[t, e] A[p, e] x[t]

and at once what follows it (device/epilogues.py): gate_up's activation, the rotary embedding of q and k.

W and A are one tensor, [W; A], cut into tiles of rows, all tokens to a tile. The first programs
take the tiles of A and leave s. For the others the expand is some steps more of the same product,
[x | s] [W | B]: when those of `in` are about to end, they wait for s, and go on with s for x and B
for W, so that nothing comes after the loop. With so many tokens x is read as often as W: all come
through the tensor memory accelerator, without which the loop is bound by its addresses. Hence
Hopper and later; elsewhere `projection` takes cuBLAS. Where rows come in pairs, one TMA block
of the accelerator's has both members, so that one product takes them and each thread ends with the
two columns that belong together. SGMM (AdaFuse, arXiv 2603.11873, section 3), inside the base
product; `decode_gemm` is the same for fewer tokens, and says why waiting cannot hang.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_adafuse.kernels.configs import MAX_SHRINK_SPLIT_K, GemmConfig
from vllm_adafuse.kernels.device.epilogues import (
    EPILOGUES,
    activate,
    is_gate_up,
    result_width,
    rotate,
    tiled_widths,
    turns_of_heads,
)
from vllm_adafuse.kernels.device.pdl import prefetch_pairs
from vllm_adafuse.kernels.device.sync import (
    all_sums,
    fence,
    is_last,
    leave_sums,
    range_of_k,
    wait_for_shrink,
)
from vllm_adafuse.kernels.device.tma_steps import active_blocks, apart, loop_over
from vllm_adafuse.kernels.dispatch import MAX_TILE_TOKENS, default_config
from vllm_adafuse.kernels.kv_slots import NO_KV_SLOTS, KVSlots, rows_in_kv, starts_of_head
from vllm_adafuse.kernels.launch import launch, overlap
from vllm_adafuse.kernels.operands import Projection, Step
from vllm_adafuse.kernels.plans import on_hopper, waits_in_loops
from vllm_adafuse.kernels.room import tile_tokens, with_room
from vllm_adafuse.kernels.whole import cdiv, power_of_2

# Rows of A in a tile.
SHRINK_ROWS = 64


def workspace_sizes(lora_a: torch.Tensor) -> tuple[int, int, int]:
    """What a projection may need of a `Workspace`: bytes, floats, semaphores."""
    ranks = lora_a.numel() // lora_a.shape[-1]
    bytes_ = MAX_TILE_TOKENS * ranks * lora_a.element_size()
    tiles = cdiv(ranks, SHRINK_ROWS)
    return bytes_, MAX_SHRINK_SPLIT_K * tiles * SHRINK_ROWS * MAX_TILE_TOKENS, tiles


@triton.jit
def _shrink_tile(
    pid, x_desc, a_desc, gates_ptr, lora_a_out_ptr, partial_ptr, split_k_semaphore_ptr,
    semaphore_ptr, n_tokens, size_in, used, RANKS: tl.constexpr, RANK: tl.constexpr,
    EXPERTS: tl.constexpr, SHRINK_SPLIT_K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, SHRINK_ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A slice of `in` for one tile of A; whoever is the last of its tile leaves s [T, ranks].
    One of whose experts none is used is of the first slice alone, which leaves zeros."""
    tile, pid_k = pid // SHRINK_SPLIT_K, pid % SHRINK_SPLIT_K
    begin, end = range_of_k(size_in, pid_k, SHRINK_SPLIT_K, COLS)
    end = tl.where(used, end, begin)
    sums = tl.zeros([BLOCK_T, SHRINK_ROWS], dtype=tl.float32)
    for start in tl.range(begin, end, COLS, num_stages=STAGES):
        a = a_desc.load([tile * SHRINK_ROWS, start])
        sums = tl.dot(x_desc.load([0, start]), a.T, sums, input_precision="ieee")
    last = True
    if (SHRINK_SPLIT_K > 1) & used:
        leave_sums(sums, partial_ptr, tile, pid_k, SHRINK_SPLIT_K, BLOCK_T, SHRINK_ROWS)
        last = is_last(split_k_semaphore_ptr + tile, SHRINK_SPLIT_K)
    if last:
        if (SHRINK_SPLIT_K > 1) & used:
            sums = all_sums(partial_ptr, tile, SHRINK_SPLIT_K, BLOCK_T, SHRINK_ROWS)
        tokens, ranks = tl.arange(0, BLOCK_T), tile * SHRINK_ROWS + tl.arange(0, SHRINK_ROWS)
        token_mask, experts = tokens < n_tokens, tl.arange(0, BLOCK_E)
        # Spread over ranks by a product with ones: to gather would be a load per element.
        its = (experts[:, None] == (ranks // RANK % EXPERTS)[None, :]).to(tl.float32)
        gates_at = gates_ptr + tokens[:, None] * EXPERTS + experts[None, :]
        chosen = token_mask[:, None] & (experts < EXPERTS)[None, :]
        gates = tl.load(gates_at, mask=chosen, other=0.0)
        gates = tl.dot(gates, its, input_precision="tf32x3")
        # Not a bare product: what another token sees of this expert must not matter.
        lora_a_out = tl.where(gates != 0, sums * gates, 0.0).to(lora_a_out_ptr.dtype.element_ty)
        lora_a_out_at = lora_a_out_ptr + tokens[:, None] * RANKS + ranks[None, :]
        tl.store(lora_a_out_at, lora_a_out, mask=token_mask[:, None] & (ranks < RANKS)[None, :])
        if PDL:
            fence()
        tl.debug_barrier()
        tl.atomic_add(semaphore_ptr, 1, sem="release")


@triton.jit
def _columns(local, width, EPILOGUE: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
    """Columns of a slice that `ROWS` of its first members from `local` on are: how far in its head
    the first one is, the head, the columns, and which of them are there."""
    head, within, start = 0, 0, local
    if EPILOGUE == 3:
        head, within = local // HALF, tl.multiple_of(local % HALF, ROWS)
        start = tl.multiple_of(head * (2 * HALF) + within, ROWS)
    columns = start + tl.arange(0, ROWS)
    return within, head, columns, columns < width


@triton.jit
def _finish(
    y, up, local, pid_k, bias_ptr, y_ptr, cos_sin_ptr, n_tokens, y_stride, number, first, width,
    kv_starts, slot_mask, keys_ptr, values_ptr, head_stride,
    APART: tl.constexpr, TURNED: tl.constexpr,
    HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr, KV: tl.constexpr,
    BLOCK_T: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From the members of a tile, deltas included, to a tile of the result."""
    tokens = tl.arange(0, BLOCK_T)
    token_mask = tokens < n_tokens
    within, head, columns, col_mask = _columns(local, width, EPILOGUE, HALF, ROWS)
    if HAS_BIAS:
        bias_at = bias_ptr + first + columns
        y += tl.load(bias_at, mask=col_mask, other=0.0).to(tl.float32)[None, :]
        if EPILOGUE != 0:
            up += tl.load(bias_at + APART, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    y_at = y_ptr + pid_k * n_tokens * y_stride
    y_at += tokens[:, None] * y_stride + (first + columns)[None, :]
    mask = token_mask[:, None] & col_mask[None, :]
    if EPILOGUE == 3:
        if first < TURNED:  # v is not turned
            cos, sin = turns_of_heads(cos_sin_ptr, tokens, token_mask, 0, within, HALF, ROWS)
            y, up = rotate(y, up, cos.to(tl.float32), sin.to(tl.float32))
        if KV:
            starts, kept = starts_of_head(
                y_ptr + tokens * y_stride + (first + head * (2 * HALF)), token_mask,
                keys_ptr, values_ptr, kv_starts, slot_mask, number, head, head_stride, KV,
            )  # fmt: skip
            y_at = starts[:, None] + (within + tl.arange(0, ROWS))[None, :]
            mask = kept[:, None] & col_mask[None, :]
        tl.store(y_at + HALF, up.to(y_ptr.dtype.element_ty), mask=mask)
    elif EPILOGUE != 0:
        y = activate(y, up, EPILOGUE)
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def _tma_gemm_kernel(
    x_desc, w_desc, piece1_w_desc, a_desc, lora_a_out_desc, b_desc, piece1_b_desc, up_desc,
    piece1_up_desc, w_ptr, bias_ptr, y_ptr, cos_sin_ptr, gates_ptr, active_ptr, lora_a_out_ptr,
    partial_ptr, split_k_semaphore_ptr, semaphore_ptr, n_tokens, y_stride, size_in, keys_ptr,
    values_ptr, slots_ptr, block_size, block_stride, row_stride, head_stride, WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr, WIDTH2: tl.constexpr, ADAPTED0: tl.constexpr, ADAPTED1: tl.constexpr,
    ADAPTED2: tl.constexpr, HAS_BIAS: tl.constexpr, EPILOGUE: tl.constexpr, HALF: tl.constexpr,
    KV: tl.constexpr, SPLIT_K: tl.constexpr, SHRINK_SPLIT_K: tl.constexpr, RANK: tl.constexpr,
    EXPERTS: tl.constexpr, RANKS: tl.constexpr, SHRINK_ROWS: tl.constexpr, LISTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr, PIECE1: tl.constexpr,
    COLS: tl.constexpr, STAGES: tl.constexpr, WAITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    SHRINK_TILES: tl.constexpr = (RANKS + SHRINK_ROWS - 1) // SHRINK_ROWS
    SHRINKS: tl.constexpr = SHRINK_TILES * SHRINK_SPLIT_K
    bits = -1
    if LISTED:  # written once a step, long before
        bits = tl.load(active_ptr)
    if pid < SHRINKS:
        used = True
        if LISTED:
            OF_TILE: tl.constexpr = SHRINK_ROWS // RANK
            first = pid // SHRINK_SPLIT_K * OF_TILE % EXPERTS
            used = (bits >> first) & ((1 << OF_TILE) - 1) != 0
        if PDL:  # launched before the kernel in front of it has ended
            tl.extra.cuda.gdc_wait()
        if used | (pid % SHRINK_SPLIT_K == 0):
            _shrink_tile(
                pid, x_desc, a_desc, gates_ptr, lora_a_out_ptr, partial_ptr, split_k_semaphore_ptr,
                semaphore_ptr, n_tokens, size_in, used, RANKS, RANK, EXPERTS, SHRINK_SPLIT_K,
                BLOCK_T, BLOCK_E, SHRINK_ROWS, COLS, STAGES, PDL,
            )  # fmt: skip
    else:
        # Which tile of which slice, and which slice of `in`. With EPILOGUE a tile has both members.
        tile, pid_k = (pid - SHRINKS) // SPLIT_K, (pid - SHRINKS) % SPLIT_K
        TALL: tl.constexpr = ROWS + PIECE1
        WIDE: tl.constexpr = TALL * (2 if EPILOGUE == 3 else 1)
        TILES0: tl.constexpr = (WIDTH0 + WIDE - 1) // WIDE
        TILES1: tl.constexpr = (WIDTH1 + WIDE - 1) // WIDE if EPILOGUE == 0 or EPILOGUE == 3 else 0
        # B has no rows for slices without experts.
        SKIP1: tl.constexpr = WIDTH0 if ADAPTED0 < 0 else 0
        SKIP2: tl.constexpr = SKIP1 + (WIDTH1 if ADAPTED1 < 0 else 0)
        second, third = tile >= TILES0, tile >= TILES0 + TILES1
        local = tile - tl.where(third, TILES0 + TILES1, tl.where(second, TILES0, 0))
        local *= TALL
        width = tl.where(third, WIDTH2, tl.where(second, WIDTH1, WIDTH0))
        first = tl.where(third, WIDTH0 + WIDTH1, tl.where(second, WIDTH0, 0))
        linear_idx = tl.where(third, ADAPTED2, tl.where(second, ADAPTED1, ADAPTED0))
        skipped = tl.where(third, SKIP2, tl.where(second, SKIP1, 0))
        number = second.to(tl.int32) + third.to(tl.int32)
        APART: tl.constexpr = HALF if EPILOGUE == 3 else WIDTH0
        MEMBERS: tl.constexpr = 2 if EPILOGUE != 0 else 1
        # Where the tile is in W, and in B, which has no rows for slices without experts.
        member, row, b_member, b_row = 0, local, 0, local
        if EPILOGUE == 0:
            row, b_row = first + local, first - skipped + local
        if EPILOGUE == 3:
            member, row = first // HALF + local // HALF * 2, local % HALF
            b_member, b_row = member - skipped // HALF, row
        if PDL:
            if EPILOGUE != 0:  # behind a norm, which lets it begin early
                start = member * APART + row
                prefetch_pairs(w_ptr, start, WIDTH0 + WIDTH1 + WIDTH2, size_in, APART, ROWS)
                if PIECE1:
                    start += ROWS
                    prefetch_pairs(w_ptr, start, WIDTH0 + WIDTH1 + WIDTH2, size_in, APART, PIECE1)
            tl.extra.cuda.gdc_wait()
        tokens = tl.arange(0, BLOCK_T)
        kv_starts, slot_mask = rows_in_kv(
            slots_ptr, tokens, tokens < n_tokens, block_size, block_stride, row_stride, KV
        )
        # Steps of `in`, then steps of ranks, in which s stands for x, and B for W. Each member of
        # gate_up has an s of its own, and B of one beside zeros, which lie outside of it.
        GATED: tl.constexpr = EPILOGUE == 1 or EPILOGUE == 2
        SIZE: tl.constexpr = EXPERTS * RANK
        OF_LINEAR: tl.constexpr = (SIZE + COLS - 1) // COLS
        HAS_UP: tl.constexpr = GATED and ADAPTED1 >= 0
        blocks, of_part = 0, OF_LINEAR
        if LISTED:
            blocks, of_part = active_blocks(bits, COLS // RANK, OF_LINEAR)
        of_gate = of_part if ADAPTED0 >= 0 else 0
        of_in = tl.cdiv(size_in, COLS)
        if GATED:
            steps = of_in + of_gate + (of_part if HAS_UP else 0)
        else:
            steps = of_in + tl.where(linear_idx >= 0, of_part, 0)
        size = tl.cdiv(steps, SPLIT_K)
        begin, end = pid_k * size, tl.minimum(pid_k * size + size, steps)
        acc = tl.zeros([BLOCK_T, MEMBERS * ROWS], dtype=tl.float32)
        piece1 = tl.zeros([BLOCK_T, MEMBERS * PIECE1 if PIECE1 else 16], dtype=tl.float32)
        # s must be there before the loop asks for it, as many steps ahead as there are stages.
        ahead = of_in - STAGES
        if not WAITS:  # a loop up to the ranks, and another behind it
            acc, piece1 = loop_over(
                acc, piece1, begin, tl.minimum(end, of_in), of_in, of_gate, blocks, ahead,
                x_desc, w_desc, piece1_w_desc, lora_a_out_desc, b_desc, piece1_b_desc, up_desc,
                piece1_up_desc, semaphore_ptr, member, row, b_member, b_row, linear_idx, SIZE, False,
                ADAPTED1, LISTED, MEMBERS, ROWS, PIECE1, COLS, STAGES, SHRINK_TILES, False,
            )  # fmt: skip
            begin = tl.maximum(begin, of_in)
        if (begin > ahead) & (end > of_in):
            wait_for_shrink(semaphore_ptr, SHRINK_TILES)
            if PDL:
                fence()
        acc, piece1 = loop_over(
            acc, piece1, begin, end, of_in, of_gate, blocks, ahead,
            x_desc, w_desc, piece1_w_desc, lora_a_out_desc, b_desc, piece1_b_desc, up_desc,
            piece1_up_desc, semaphore_ptr, member, row, b_member, b_row, linear_idx, SIZE, HAS_UP,
            ADAPTED1, LISTED, MEMBERS, ROWS, PIECE1, COLS, STAGES, SHRINK_TILES, WAITS,
        )  # fmt: skip
        y, up = apart(acc, EPILOGUE, BLOCK_T, ROWS)
        _finish(
            y, up, local, pid_k, bias_ptr, y_ptr, cos_sin_ptr, n_tokens, y_stride, number, first,
            width, kv_starts, slot_mask, keys_ptr, values_ptr, head_stride, APART, WIDTH0 + WIDTH1,
            HAS_BIAS, EPILOGUE, HALF, KV, BLOCK_T, ROWS,
        )  # fmt: skip
        if PIECE1:
            piece1_y, piece1_up = apart(piece1, EPILOGUE, BLOCK_T, PIECE1)
            _finish(
                piece1_y, piece1_up, local + ROWS, pid_k, bias_ptr, y_ptr, cos_sin_ptr, n_tokens,
                y_stride, number, first, width, kv_starts, slot_mask, keys_ptr, values_ptr,
                head_stride, APART, WIDTH0 + WIDTH1, HAS_BIAS, EPILOGUE, HALF, KV, BLOCK_T, PIECE1,
            )  # fmt: skip


def _tma_blocks(
    matrix: torch.Tensor, tall: int, members: int, pieces: Sequence[int], cols: int
) -> list[TensorDescriptor]:
    """A matrix as members of `tall` rows each, for every piece of a tile: a TMA block has so many
    rows of some members."""
    size = matrix.stride(0)
    shape, strides = [matrix.shape[0] // tall, tall, size], [tall * size, size, 1]
    return [TensorDescriptor(matrix, shape, strides, [members, rows, cols]) for rows in pieces]


def _lists_blocks(experts: int, rank: int, cols: int) -> bool:
    """Whether ranks come in several whole blocks of `cols`, and experts with bits in `active` in
    whole tiles of A and whole blocks: then those without a token are left out."""
    whole = 64 % rank == 0 and cols % rank == 0 and experts * rank % max(SHRINK_ROWS, cols) == 0
    return whole and experts <= 64 and 1 < experts * rank // cols <= 16


def tma_gemm_triton(
    x: torch.Tensor,
    p: Projection,
    step: Step,
    config: GemmConfig | None = None,
    out: torch.Tensor | None = None,
    kv_slots: KVSlots | None = None,
) -> torch.Tensor:
    """One launch for up to 128 tokens; see `vllm_adafuse.kernels.projection.projection`.

    Args:
        x: [T, in]; rows begin at multiples of 16 bytes.
        p: the projection, of which `dispatch.can_tile` holds; its semaphore is zero, and of this
            launch alone until the next step.
        step: the step's buffers.
        config: how to cut, default `dispatch.default_config`; `shrink_cols` is not used, and
            `split_k` only with split-K sums in `out`.
        out: where the result goes, [T, out] with contiguous rows, or [split_k, T, out] contiguous,
            float32, to leave the sums of each slice of `in` unadded; default a new tensor.
        kv_slots: where k and v go with "rotary", whose columns of the result stay undefined then.
    """
    (tokens, size_in), shape, workspace = x.shape, p.shape, step.workspace
    widths, adapted, epilogue = shape.widths, shape.adapted, shape.kernel_epilogue
    index, half = EPILOGUES.index(epilogue), shape.head_dim // 2
    experts, rank, fused = shape.num_experts, shape.rank, p.fused_weight
    size_out = sum(widths)
    lora_a = fused[size_out:]
    members = tiled_widths(widths, epilogue)
    key = tokens, size_in, sum(members), epilogue, x.element_size()
    config = config or default_config(*key, tma=True) or GemmConfig(64, 64, stages=3)
    if half:
        config = replace(config, rows=min(config.pieces[0], half))
    rows, piece1 = config.pieces
    block_t = tile_tokens(tokens)
    x, there = with_room(x, block_t)
    count = sum(cdiv(w, config.rows) for w in members)
    shrinks = cdiv(lora_a.shape[0], SHRINK_ROWS) * config.shrink_split_k
    widths, adapted = [*widths, 0, 0][:3], [*adapted, -1, -1][:3]
    y = x.new_empty(tokens, result_width(widths, epilogue)) if out is None else out
    split_k = config.split_k if y.dim() == 3 else 1
    # W as members, rows of each, and `in`: TMA blocks of pairs have two members. B likewise, but
    # for gate_up, each of whose members is by itself.
    pair, pieces = 2 if index else 1, (rows, piece1 or rows)
    tall, ranks = half or (widths[0] if index else size_out), lora_a.shape[0]
    lora_a_out, b = workspace.view(x.dtype, tokens, ranks), p.lora_b.flatten(1)
    of_b = [b[: widths[0]], b[-widths[0] :]] if is_gate_up(epilogue) else [b]
    w_blocks = _tma_blocks(fused[:size_out], tall, pair, pieces, config.cols)
    b_blocks = [_tma_blocks(one, half or one.shape[0], pair, pieces, config.cols) for one in of_b]
    up_blocks = b_blocks[1] if len(of_b) > 1 else [None, None]
    launch(
        _tma_gemm_kernel, (shrinks + count * split_k,),
        TensorDescriptor(x, [there, size_in], list(x.stride()), [block_t, config.cols]), *w_blocks,
        TensorDescriptor(lora_a, list(lora_a.shape), [size_in, 1], [SHRINK_ROWS, config.cols]),
        TensorDescriptor(lora_a_out, [tokens, ranks], [ranks, 1], [block_t, config.cols]),
        *b_blocks[0], *up_blocks, fused, p.bias, y, step.cos_sin, step.gates, step.active, lora_a_out,
        workspace.partial_sums, workspace.split_k_semaphores, p.semaphore,
        tokens, y.stride(-2), size_in, *(kv_slots or NO_KV_SLOTS),
        WIDTH0=widths[0], WIDTH1=widths[1], WIDTH2=widths[2],
        ADAPTED0=adapted[0], ADAPTED1=adapted[1], ADAPTED2=adapted[2],
        HAS_BIAS=p.bias is not None, EPILOGUE=index, HALF=half, KV=kv_slots is not None,
        SPLIT_K=split_k, SHRINK_SPLIT_K=config.shrink_split_k, RANK=rank, EXPERTS=experts,
        RANKS=ranks, SHRINK_ROWS=SHRINK_ROWS, LISTED=_lists_blocks(experts, rank, config.cols),
        BLOCK_T=block_t, BLOCK_E=max(16, power_of_2(experts)),
        ROWS=rows, PIECE1=piece1, COLS=config.cols, STAGES=config.stages, WAITS=waits_in_loops(x),
        num_warps=config.warps, num_stages=config.stages, **overlap(on_hopper(x)),
    )  # fmt: skip
    return y
