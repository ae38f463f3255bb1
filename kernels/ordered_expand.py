"""LoRA expand of long batches whose tokens are in the order of their experts (order_routes.py):

    y[t, n] + Σ_e B[n, e] (gates[t, e] s[t, p(n), e])     p(n): the part that column n belongs to

then gate_up's activation, or the rotary embedding of q and k (pairs.py). The same as `expand`. A
tile of neighbours needs a few experts: their s and B are loaded side by side, for one product of a
few dozen ranks. The program keeps s and walks along the columns, with the next
tiles of y and B under way. SGMM's segments (AdaFuse, arXiv 2603.11873, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.blocks import group_of_tiles, grouped_tiles
from vllm_adafuse.kernels.launch import launch, overlap
from vllm_adafuse.kernels.order_routes import ORDER_TILE, Order
from vllm_adafuse.kernels.paged_cache import NO_PAGES, Pages, rows_in_pages, starts_of_head
from vllm_adafuse.kernels.pairs import activate, result_of, rotate, turns_of_heads
from vllm_adafuse.kernels.plans import on_hopper
from vllm_adafuse.kernels.whole import cdiv, power_of_2


@triton.jit
def _chosen(present, chunk, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    """Of a chunk of the experts in a word of bits: their numbers, and whether there is one, each
    [1, CHUNK, 1]; and the count of all."""
    experts = tl.arange(0, BLOCK_E)
    bits = ((present >> experts.to(tl.int64)) & 1).to(tl.int32)
    before = tl.cumsum(bits, 0) - bits
    slots = chunk * CHUNK + tl.arange(0, CHUNK)
    match = (before[None, :] == slots[:, None]) & (bits[None, :] != 0)
    numbers = tl.sum(tl.where(match, experts[None, :], 0), 1)
    count = tl.sum(bits, 0)
    return numbers[None, :, None], (slots < count)[None, :, None], count


@triton.jit
def _weighted(
    s_at, gates_at, here, experts, there,
    RANK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """s [BLOCK_T, CHUNK * RANK] of a chunk of experts, weighted by the gates."""
    mask = here[:, None, None] & there
    gates = tl.load(gates_at[:, None, None] + experts, mask=mask, other=0.0)
    at = s_at[:, None, None] + experts * RANK + tl.arange(0, RANK)[None, None, :]
    s = tl.load(at, mask=mask, other=0.0)
    # Not a bare product: what other tokens see of an expert must not matter.
    s = tl.where(gates != 0, s.to(tl.float32) * gates, 0.0).to(s.dtype)
    return tl.reshape(s, (BLOCK_T, CHUNK * RANK))


@triton.jit
def _columns_of_b(
    b_at, experts, there, RANK: tl.constexpr, CHUNK: tl.constexpr, COLS: tl.constexpr
):
    """B [COLS, CHUNK * RANK] of a chunk of experts."""
    at = b_at[:, None, None] + experts * RANK + tl.arange(0, RANK)[None, None, :]
    return tl.reshape(tl.load(at, mask=there, other=0.0), (COLS, CHUNK * RANK))


@triton.jit
def _add(
    y, s, first_experts, first_there, s_at, gates_at, b_at, present, chunks, here,
    RANK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y + the deltas of a tile's experts; s: the first chunk's, which is all as a rule."""
    b = _columns_of_b(b_at, first_experts, first_there, RANK, CHUNK, COLS)
    y = tl.dot(s, tl.trans(b), y, input_precision="ieee")
    for chunk in range(1, chunks):
        experts, there, _ = _chosen(present, chunk, CHUNK, BLOCK_E)
        more = _weighted(s_at, gates_at, here, experts, there, RANK, CHUNK, BLOCK_T)
        b = _columns_of_b(b_at, experts, there, RANK, CHUNK, COLS)
        y = tl.dot(more, tl.trans(b), y, input_precision="ieee")
    return y


@triton.jit(do_not_specialize=["n_tokens"])
def _ordered_expand_kernel(
    y_ptr, out_ptr, s_ptr, b_ptr, gates_ptr, order_ptr, present_ptr, cos_sin_ptr,
    n_tokens, y_stride, out_stride, s_stride, n_experts,
    keys_ptr, values_ptr, slots_ptr, block_size, block_stride, row_stride, head_stride,
    TILES0: tl.constexpr, TILES1: tl.constexpr, TILES2: tl.constexpr,
    ACT: tl.constexpr, APART: tl.constexpr, PAGED: tl.constexpr,
    RANK: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr, COLS: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # launched while the kernel before it ends
        tl.extra.cuda.gdc_wait()
    # A tile has both members of its pairs.
    WIDE: tl.constexpr = COLS * (2 if ACT == 3 else 1)
    part, first_tile, end, before = group_of_tiles(tl.program_id(0), TILES0, TILES1, TILES2, LOOP)
    offset = before * WIDE
    tile_t = tl.program_id(1)
    place = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    here = place < n_tokens
    rows = tl.load(order_ptr + place, mask=here, other=0)
    present, size = tl.load(present_ptr + tile_t), n_experts * RANK
    experts, there, count = _chosen(present, 0, CHUNK, BLOCK_E)
    chunks = tl.cdiv(count, CHUNK)
    gates_at = gates_ptr + rows * n_experts
    s_at = s_ptr + rows.to(tl.int64) * s_stride + part * size
    s = _weighted(s_at, gates_at, here, experts, there, RANK, CHUNK, BLOCK_T)
    s_up_at, s_up = s_at, s
    if ACT == 1 or ACT == 2:
        s_up_at = s_at + size
        s_up = _weighted(s_up_at, gates_at, here, experts, there, RANK, CHUNK, BLOCK_T)
    columns = tl.arange(0, COLS)
    if ACT == 3:  # a tile is a whole head, so all of a program's turn alike
        cos, sin = turns_of_heads(cos_sin_ptr, rows, here, part, 0, COLS, COLS)
    y_at = y_ptr + rows.to(tl.int64)[:, None] * y_stride + columns[None, :]
    b_at = b_ptr + columns.to(tl.int64) * size
    starts_in_y = out_ptr + rows.to(tl.int64) * out_stride
    in_pages, slotted = rows_in_pages(
        slots_ptr, rows, here, block_size, block_stride, row_stride, PAGED
    )
    for tile in tl.range(first_tile, end, num_stages=STAGES):
        first = offset + tile * WIDE
        y = tl.load(y_at + first, mask=here[:, None], other=0.0).to(tl.float32)
        b_here = b_at + first.to(tl.int64) * size
        y = _add(
            y, s, experts, there, s_at, gates_at, b_here, present, chunks, here,
            RANK, CHUNK, BLOCK_E, BLOCK_T, COLS,
        )  # fmt: skip
        if ACT != 0:
            up = tl.load(y_at + first + APART, mask=here[:, None], other=0.0).to(tl.float32)
            up = _add(
                up, s_up, experts, there, s_up_at, gates_at, b_here + APART * size, present,
                chunks, here, RANK, CHUNK, BLOCK_E, BLOCK_T, COLS,
            )  # fmt: skip
        starts, kept = starts_of_head(
            starts_in_y + first, here, keys_ptr, values_ptr, in_pages, slotted, part, tile,
            head_stride, PAGED,
        )  # fmt: skip
        out_at, mask = starts[:, None] + columns[None, :], kept[:, None]
        if ACT == 3:
            y, up = rotate(y, up, cos.to(tl.float32), sin.to(tl.float32))
            tl.store(out_at + APART, up.to(out_ptr.dtype.element_ty), mask=mask)
        elif ACT != 0:
            y = activate(y, up, ACT)
        tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class OrderedBlocks:
    """How it is cut; tiles have `ORDER_TILE` tokens.

    Attributes:
        columns: of a tile.
        loop: tiles of a program, side by side.
        warps: of a program.
        stages: tiles under way.
        ranks: that one product takes, at least those of one expert.
    """

    columns: int = 64
    loop: int = 16
    warps: int = 4
    stages: int = 2
    ranks: int = 64

    @classmethod
    def choose(cls, activation: str, rank: int) -> OrderedBlocks:
        """What the compiler keeps in registers; not yet tuned."""
        return cls(ranks=max(rank, 32 if activation == "rotary" else 64))


def ordered_expand_triton(
    y: torch.Tensor,
    s: torch.Tensor,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    order: Order,
    widths: Sequence[int],
    activation: str = "",
    blocks: OrderedBlocks | None = None,
    cos_sin: torch.Tensor | None = None,
    pages: Pages | None = None,
    in_place: bool = False,
) -> torch.Tensor:
    """One launch; for what `dispatch.orders` holds.

    Args:
        y: [T, out], W x; rows contiguous. Overwritten with `in_place`, and if it is contiguous and
            no gate_up follows.
        s: [T, P E R], A x of all experts, not yet weighted; rows contiguous.
        bank_b: [out, E, R], dtype of y.
        gates: [N, E] float32, N >= T.
        order: of the step's tokens.
        widths: columns of each part.
        activation: "", "silu", "gelu_tanh", or "rotary" of q, k, v.
        blocks: how to cut, default `OrderedBlocks.choose`.
        cos_sin: [>= T, D], with "rotary"; see `rotate_torch`.
        pages: where k and v go with "rotary", whose columns of the result stay undefined then.
        in_place: what follows gate_up stays in gate's columns of y, see `result_of`.

    Returns:
        [T, out], or [T, I] after silu or gelu_tanh; contiguous, or in y.
    """
    tokens, _, (_, experts, rank) = *y.shape, bank_b.shape
    cut = blocks or OrderedBlocks.choose(activation, rank)
    half = cos_sin.shape[1] // 2 if activation == "rotary" else 0
    result = result_of(y, widths, activation, in_place)
    groups, tiles = grouped_tiles(widths, activation, half, cut.columns, cut.loop)
    launch(
        _ordered_expand_kernel, (groups, cdiv(tokens, ORDER_TILE)),
        y, result, s, bank_b, gates, order.rows, order.present, cos_sin,
        tokens, y.stride(0), result.stride(0), s.stride(0), experts,
        *(pages or NO_PAGES),
        **tiles, PAGED=pages is not None, RANK=rank, CHUNK=max(1, cut.ranks // rank),
        BLOCK_E=max(2, power_of_2(experts)), BLOCK_T=ORDER_TILE, STAGES=cut.stages,
        num_warps=cut.warps, **overlap(on_hopper(y)),
    )  # fmt: skip
    return result
