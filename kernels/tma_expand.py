"""LoRA expand of long batches, with what follows the projection:

    y[t, n] + Σ_e B[n, e] (gates[t, e] s[t, p(n), e])     p(n): the linear that column n belongs to

then gate_up's activation, or the rotary embedding of q and k (device/epilogues.py). The same as `expand`, for
thousands of tokens on Hopper and later, where it is bound by the traffic of y alone: a program
keeps s of its tokens in registers and walks along the columns, while the tensor memory accelerator
brings the next tiles of y and of B, all experts in one product of up to 128 ranks, and takes the
last results away; two programs to a processor wait by turns. Of more ranks it takes the first
experts, and cuBLAS has added the others before (dense_expand.py); of pages it takes the blocks that
are listed for its tokens (page_routes.py), most often one. SGMM (AdaFuse,
arXiv 2603.11873, section 3).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_adafuse.kernels.configs import ExpandConfig
from vllm_adafuse.kernels.device.epilogues import activate, result_of, rotate, turns_of_heads
from vllm_adafuse.kernels.device.gates import load_gates, weigh
from vllm_adafuse.kernels.device.slices import group_of_tiles, grouped_tiles
from vllm_adafuse.kernels.dispatch import choose_wide, choose_wide_many, experts_at_once
from vllm_adafuse.kernels.kv_slots import NO_KV_SLOTS, KVSlots, head_in_kv, rows_in_kv
from vllm_adafuse.kernels.launch import launch, overlap
from vllm_adafuse.kernels.operands import Projection, Step
from vllm_adafuse.kernels.page_routes import TILE_TOKENS
from vllm_adafuse.kernels.plans import on_hopper
from vllm_adafuse.kernels.whole import cdiv


@triton.jit
def _weighed(
    lora_a_out_desc, gates_ptr, rows, token_mask, n_experts, block, first_token, first_rank,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """s of a block of experts, by the gates. From a descriptor, so that it lies in registers as
    products take it; what comes by pointers lies in shared memory, and every product fetches it
    from there."""
    gates = load_gates(gates_ptr, rows, token_mask, n_experts, block, BLOCK_T, BLOCK_E, RANK)
    return weigh(lora_a_out_desc.load([first_token, first_rank + block * BLOCK_E * RANK]), gates)


@triton.jit
def _of_members(
    lora_a_out_desc, gates_ptr, rows, token_mask, n_experts, block, first_token, first_rank, of_up,
    EPILOGUE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """`_weighed` of both members of pairs, which are the same but for gate_up."""
    of_block = _weighed(
        lora_a_out_desc, gates_ptr, rows, token_mask, n_experts, block, first_token, first_rank,
        BLOCK_T, BLOCK_E, RANK,
    )  # fmt: skip
    of_block_up = of_block
    if EPILOGUE == 1 or EPILOGUE == 2:
        of_block_up = _weighed(
            lora_a_out_desc, gates_ptr, rows, token_mask, n_experts, block, first_token, of_up,
            BLOCK_T, BLOCK_E, RANK,
        )  # fmt: skip
    return of_block, of_block_up


@triton.jit
def _add_delta(
    y_desc, b_desc, lora_a_out_desc, lora_a_out, of_second, gates_ptr, listed_ptr, count, rows,
    token_mask, n_experts, first_token, column, first_rank, first_block, second_block,
    BLOCKS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """A tile of y, and to it s B, [BLOCK_T, COLS] float32, of one or two BLOCKS, whose s is there,
    or of all that are listed if it is 0."""
    y = y_desc.load([first_token, column]).to(tl.float32)
    if BLOCKS == 0:
        for i in tl.range(0, count, num_stages=1):
            block = tl.load(listed_ptr + i)
            b = b_desc.load([column, block * BLOCK_E * RANK])
            of_block = _weighed(
                lora_a_out_desc, gates_ptr, rows, token_mask, n_experts, block, first_token,
                first_rank, BLOCK_T, BLOCK_E, RANK,
            )  # fmt: skip
            y = tl.dot(of_block, b.T, y, input_precision="ieee")
    else:
        b = b_desc.load([column, first_block * BLOCK_E * RANK])
        y = tl.dot(lora_a_out, b.T, y, input_precision="ieee")
        if BLOCKS == 2:
            b = b_desc.load([column, second_block * BLOCK_E * RANK])
            y = tl.dot(of_second, b.T, y, input_precision="ieee")
    return y


@triton.jit
def _store_tile(out_desc, tile, first_token, offset, within):
    """Leaves a finished tile of the slice that begins at column `offset`; `within`: its column
    there."""
    out_desc.store([first_token, offset + within], tile.to(out_desc.dtype))


@triton.jit
def _walk(
    y_desc, b_desc, out_desc, lora_a_out_desc, gates_ptr, cos_sin_ptr, listed_ptr, count,
    first_block, first_token, n_tokens, n_experts, slice_idx, first_tile, end, offset, piece,
    keys_ptr, values_ptr, kv_starts, slot_mask, head_stride,
    EPILOGUE: tl.constexpr, APART: tl.constexpr, STEP: tl.constexpr, KV: tl.constexpr,
    RANK: tl.constexpr, SIZE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK_T: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program's tiles, side by side; BLOCKS: how many its tokens have, 0 for any number."""
    rows = first_token + tl.arange(0, BLOCK_T)
    token_mask = rows < n_tokens
    of_up = SIZE if EPILOGUE == 1 or EPILOGUE == 2 else slice_idx * SIZE
    lora_a_out, lora_a_out_up, of_second, of_second_up, second_block = 0, 0, 0, 0, 0
    if BLOCKS == 2:
        second_block = tl.load(listed_ptr + 1)
        of_second, of_second_up = _of_members(
            lora_a_out_desc, gates_ptr, rows, token_mask, n_experts, second_block, first_token,
            slice_idx * SIZE, of_up, EPILOGUE, BLOCK_T, BLOCK_E, RANK,
        )  # fmt: skip
    if BLOCKS:  # those of one or two stay in registers
        lora_a_out, lora_a_out_up = _of_members(
            lora_a_out_desc, gates_ptr, rows, token_mask, n_experts, first_block, first_token,
            slice_idx * SIZE, of_up, EPILOGUE, BLOCK_T, BLOCK_E, RANK,
        )  # fmt: skip
    if EPILOGUE == 3:  # a program's tiles are the same piece of their heads, so all turn alike
        cos, sin = turns_of_heads(cos_sin_ptr, rows, token_mask, slice_idx, piece, APART, COLS)
    for tile in tl.range(first_tile, end, num_stages=STAGES):
        within = tile * STEP + piece
        y = _add_delta(
            y_desc, b_desc, lora_a_out_desc, lora_a_out, of_second, gates_ptr, listed_ptr, count, rows,
            token_mask, n_experts, first_token, offset + within, slice_idx * SIZE, first_block,
            second_block, BLOCKS, BLOCK_T, BLOCK_E, RANK,
        )  # fmt: skip
        if EPILOGUE != 0:
            up = _add_delta(
                y_desc, b_desc, lora_a_out_desc, lora_a_out_up, of_second_up, gates_ptr, listed_ptr,
                count, rows, token_mask, n_experts, first_token, offset + within + APART, of_up,
                first_block, second_block, BLOCKS, BLOCK_T, BLOCK_E, RANK,
            )  # fmt: skip
            if EPILOGUE == 3:
                y, up = rotate(y, up, cos.to(tl.float32), sin.to(tl.float32))
                if not KV:
                    _store_tile(out_desc, up, first_token, offset, within + APART)
                elif slice_idx == 0:
                    _store_tile(out_desc, up, first_token, offset, within + APART)
                    _store_tile(out_desc, y, first_token, offset, within)
                else:
                    at = head_in_kv(keys_ptr, values_ptr, kv_starts, slice_idx, tile, head_stride)
                    at = at[:, None] + (piece + tl.arange(0, COLS))[None, :]
                    mask = slot_mask[:, None]
                    tl.store(at, y.to(out_desc.dtype), mask=mask)
                    tl.store(at + APART, up.to(out_desc.dtype), mask=mask)
            else:
                y = activate(y, up, EPILOGUE)
        if not KV:
            _store_tile(out_desc, y, first_token, offset, within)


@triton.jit(do_not_specialize=["n_tokens"])
def _tma_expand_kernel(
    y_desc, b_desc, out_desc, lora_a_out_desc, gates_ptr, cos_sin_ptr, tile_blocks_ptr,
    n_tokens, keys_ptr, values_ptr, slots_ptr, block_size, block_stride, row_stride, head_stride,
    TILES0: tl.constexpr, TILES1: tl.constexpr, TILES2: tl.constexpr,
    EPILOGUE: tl.constexpr, APART: tl.constexpr, KV: tl.constexpr, PIECES: tl.constexpr,
    RANK: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, LISTED: tl.constexpr,
    MANY: tl.constexpr, BLOCK_T: tl.constexpr, COLS: tl.constexpr, LOOP: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # launched while the kernel before it ends
        tl.extra.cuda.gdc_wait()
    # From one tile to the next: whole heads, of each of which a tile has a piece of both halves.
    STEP: tl.constexpr = 2 * APART if EPILOGUE == 3 else COLS
    SIZE: tl.constexpr = EXPERTS * RANK
    group, piece = tl.program_id(0) // PIECES, tl.program_id(0) % PIECES * COLS
    slice_idx, first_tile, end, before = group_of_tiles(group, TILES0, TILES1, TILES2, LOOP)
    offset = before * STEP
    first_token = tl.program_id(1) * BLOCK_T
    rows = first_token + tl.arange(0, BLOCK_T)
    kv_starts, slot_mask = rows_in_kv(
        slots_ptr, rows, rows < n_tokens, block_size, block_stride, row_stride, KV
    )
    listed_ptr, count, first_block = tile_blocks_ptr, 1, 0
    if LISTED:
        BLOCKS: tl.constexpr = (EXPERTS + BLOCK_E - 1) // BLOCK_E
        listed_ptr += first_token // LISTED * (1 + BLOCKS)
        count = tl.load(listed_ptr)
        listed_ptr += 1
        first_block = tl.load(listed_ptr, mask=count > 0, other=0)
    if ((count == 2) if MANY else (count < 2)):
        _walk(
            y_desc, b_desc, out_desc, lora_a_out_desc, gates_ptr, cos_sin_ptr, listed_ptr,
            count, first_block, first_token, n_tokens, EXPERTS, slice_idx, first_tile, end,
            offset, piece, keys_ptr, values_ptr, kv_starts, slot_mask, head_stride,
            EPILOGUE, APART, STEP, KV, RANK, SIZE, BLOCK_E, 2 if MANY else 1, BLOCK_T, COLS, STAGES,
        )  # fmt: skip
    if MANY:  # in turn: that many adapters in a tile are few tiles
        if count > 2:
            _walk(
                y_desc, b_desc, out_desc, lora_a_out_desc, gates_ptr, cos_sin_ptr, listed_ptr,
                count, first_block, first_token, n_tokens, EXPERTS, slice_idx, first_tile, end,
                offset, piece, keys_ptr, values_ptr, kv_starts, slot_mask, head_stride,
                EPILOGUE, APART, STEP, KV, RANK, SIZE, BLOCK_E, 0, BLOCK_T, COLS, 1,
            )  # fmt: skip


def tma_expand_triton(
    y: torch.Tensor,
    lora_a_out: torch.Tensor,
    p: Projection,
    step: Step,
    config: ExpandConfig | None = None,
    kv_slots: KVSlots | None = None,
) -> torch.Tensor:
    """One launch, two on pages; for what `dispatch.tma_expands` holds. Adds the deltas of the first
    `dispatch.experts_at_once`, or of the pages that `tile_blocks` lists.

    Args:
        y: [T, out], W x with the deltas of the other experts, if any; rows contiguous.
            Overwritten with `strided_out`, and if it is contiguous and no gate_up follows.
        lora_a_out: [T, S E R], A x of all experts, of which the first are not yet weighted; rows contiguous,
            16 bytes aligned.
        p: the projection.
        step: the step's buffers.
        config: how to cut, default `dispatch.choose_wide`.
        kv_slots: where k and v go with "rotary", whose columns of the result stay undefined then.

    Returns:
        [T, out], or [T, I] after silu or gelu_tanh; contiguous, or in y.
    """
    tokens, widths, epilogue = y.shape[0], p.shape.widths, p.shape.kernel_epilogue
    config = config or choose_wide(tokens, widths, epilogue)
    result = result_of(y, widths, epilogue, p.strided_out)
    tile_blocks = step.blocks_of(p.shape, tokens)
    operands = y, lora_a_out, result, p, step, kv_slots
    _launch(operands, config, tile_blocks)
    if tile_blocks is not None:
        _launch(operands, choose_wide_many(config), tile_blocks, many=True)
    return result


def _launch(
    operands: tuple, config: ExpandConfig, tile_blocks: torch.Tensor | None, many: bool = False
) -> None:
    """One launch; many: for tiles of tokens with several blocks, which need registers that the
    others lack then."""
    y, lora_a_out, result, p, step, kv_slots = operands
    (tokens, out), shape, lora_b = y.shape, p.shape, p.lora_b
    experts, rank = shape.num_experts, shape.rank
    of_shape = experts, rank, shape.widths, shape.kernel_epilogue, shape.head_dim // 2
    groups, constants = _plan(*of_shape, config, on_hopper(y))
    columns, ranks = constants["COLS"], constants["BLOCK_E"] * rank
    block, size = [config.tokens, columns], experts * rank
    out_desc = y_desc = TensorDescriptor.from_tensor(y, block)
    if result.data_ptr() != y.data_ptr():
        out_desc = TensorDescriptor.from_tensor(result, block)
    launch(
        _tma_expand_kernel, (groups, cdiv(tokens, config.tokens)),
        y_desc, TensorDescriptor(lora_b, [out, size], [size, 1], [columns, ranks]), out_desc,
        TensorDescriptor.from_tensor(lora_a_out, [config.tokens, ranks]), step.gates, step.cos_sin,
        tile_blocks, tokens, *(kv_slots or NO_KV_SLOTS), KV=kv_slots is not None,
        LISTED=0 if tile_blocks is None else TILE_TOKENS, MANY=many, **constants,
    )  # fmt: skip


@functools.cache
def _plan(
    experts: int, rank: int, widths: tuple, epilogue: str, half: int,
    config: ExpandConfig, hopper: bool,
) -> tuple[int, dict]:  # fmt: skip
    """Groups of tiles, and the kernel's constants."""
    groups, tiles = grouped_tiles(widths, epilogue, half, config.columns, config.loop)
    columns = min(config.columns, tiles["COLS"])
    pieces = tiles["COLS"] // columns
    return groups * pieces, tiles | {
        "PIECES": pieces, "COLS": columns,
        "RANK": rank, "EXPERTS": experts, "BLOCK_E": experts_at_once(experts, rank),
        "BLOCK_T": config.tokens, "STAGES": config.stages, "num_warps": config.warps,
        **overlap(hopper),
    }  # fmt: skip
