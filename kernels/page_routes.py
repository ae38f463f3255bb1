"""A step's routes where every request names its adapter: a gate for each token and expert page.

    gates[t, p] = 0                                        page p is not of t's adapter
                = scale                                    it is, and that is a plain LoRA
                = Σ_j weights[c_j, id] [experts[c_j, id] = expert of p]            a mixture

and in long steps, for every 128 tokens, which blocks of pages have one of their gates: what the
expands skip by. id is the token's id, c_j one of the k columns that a mixture has among the
passports: what its router says of every id of the vocabulary. Adapters come and go by what stands
in `directory` and in the passports, at addresses that a CUDA graph remembers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.configs import BLOCK_ER, MAX_BITS, PAGE_RANKS
from vllm_adafuse.kernels.dispatch import MAX_ACTIVE_TOKENS
from vllm_adafuse.kernels.launch import launch
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.spread_routes import list_active
from vllm_adafuse.kernels.whole import cdiv, power_of_2

# Rows of `directory`; from COLUMNS on the columns of a slot.
OWNER, EXPERT, TOP_K, SCALE, COLUMNS = range(5)
# Pages of a block, which one product of the expands takes, and tokens of a tile.
BLOCK_PAGES = BLOCK_ER // PAGE_RANKS
TILE_TOKENS = 128


class PageGates(NamedTuple):
    """What `page_routes` writes, static buffers.

    Attributes:
        gates: [N, P] float32, its first T rows.
        active: [2 + P] int64, as `spread_routes` writes it; bits of up to 64 pages.
        tile_blocks: [ceil(N / 128), 1 + ceil(P / 8)] int32, in steps of more than 256 tokens: of
            every 128 tokens how many blocks of 8 pages have a gate, then which, in rising order.
        semaphores: int32 of any shape, zeroed.
    """

    gates: torch.Tensor
    active: torch.Tensor
    tile_blocks: torch.Tensor
    semaphores: torch.Tensor


def new_tile_blocks(rows: int, pages: int, device: torch.device | None = None) -> torch.Tensor:
    """[ceil(N / 128), 1 + blocks] int32 for `page_routes` to write: no block yet."""
    size = cdiv(rows, TILE_TOKENS), 1 + cdiv(pages, BLOCK_PAGES)
    return torch.zeros(size, dtype=torch.int32, device=device)


def list_blocks(gates: torch.Tensor, tile_blocks: torch.Tensor) -> None:
    """Writes how many blocks of pages each tile of tokens has gates of, and which; gates [T, P]."""
    for of_tile, listed in zip(gates.split(TILE_TOKENS), tile_blocks):
        blocks = ((of_tile != 0).any(0).nonzero()[:, 0] // BLOCK_PAGES).unique()
        listed[0], listed[1 : 1 + len(blocks)] = len(blocks), blocks


@triton.jit(do_not_specialize=["n_tokens"])
def _page_routes_kernel(
    token_ptr, slots_ptr, directory_ptr, table_ids_ptr, table_weights_ptr,
    gates_ptr, active_ptr, tile_blocks_ptr, semaphores_ptr, n_tokens, vocab_size, n_pages,
    n_semaphores, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_PAGES: tl.constexpr,
    ONE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    rows = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = rows < n_tokens
    slot = tl.load(slots_ptr + rows, mask=token_mask, other=-1)
    known = slot >= 0
    top_k = tl.load(directory_ptr + 2 * n_pages + slot, mask=known, other=0)
    scale = tl.load(directory_ptr + 3 * n_pages + slot, mask=known, other=0)
    scale = scale.to(tl.float32, bitcast=True)
    token = tl.load(token_ptr + rows, mask=token_mask, other=0).to(tl.int64)
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
    most = tl.max(top_k)
    count, bits = 0, tl.zeros([], dtype=tl.int64)
    listed_ptr = tile_blocks_ptr + pid * (1 + (n_pages + BLOCK_PAGES - 1) // BLOCK_PAGES)
    for start in range(0, n_pages, BLOCK_P):
        pages = start + tl.arange(0, BLOCK_P)
        page_mask = pages < n_pages
        owner = tl.load(directory_ptr + pages, mask=page_mask, other=-1)
        expert = tl.load(directory_ptr + n_pages + pages, mask=page_mask, other=-1)
        own = (slot[:, None] == owner[None, :]) & known[:, None]
        gates = tl.where(own & (top_k == 0)[:, None], scale[:, None], 0.0)
        for j in range(most):
            chosen = token_mask & (j < top_k)
            column = tl.load(directory_ptr + (4 + j) * n_pages + slot, mask=chosen, other=0)
            at = column.to(tl.int64) * vocab_size + token
            ids = tl.load(table_ids_ptr + at, mask=chosen, other=-1)
            weights = tl.load(table_weights_ptr + at, mask=chosen, other=0.0)
            gates += tl.where(own & (ids[:, None] == expert[None, :]), weights[:, None], 0.0)
        at = rows.to(tl.int64)[:, None] * n_pages + pages[None, :]
        tl.store(gates_ptr + at, gates, mask=token_mask[:, None] & page_mask[None, :])
        if ONE:
            used = tl.max((gates != 0.0).to(tl.int32), 0)
            place = count + tl.cumsum(used, 0)
            tl.store(active_ptr + 1 + place, pages.to(tl.int64), mask=used != 0)
            count += tl.sum(used, 0)
            if BITS:
                bits += tl.sum(used.to(tl.int64) << pages.to(tl.int64), 0)
        else:
            BLOCKS: tl.constexpr = BLOCK_P // BLOCK_PAGES
            used = tl.reshape(tl.max((gates != 0.0).to(tl.int32), 0), (BLOCKS, BLOCK_PAGES))
            used = tl.max(used, 1)
            blocks = start // BLOCK_PAGES + tl.arange(0, BLOCKS)
            place = count + tl.cumsum(used, 0)
            tl.store(listed_ptr + place, blocks, mask=used != 0)
            count += tl.sum(used, 0)
    if not ONE:
        tl.store(listed_ptr, count)
    if pid == 0:
        if ONE:
            tl.store(active_ptr + 1, count.to(tl.int64))
        if ONE and BITS:
            tl.store(active_ptr, bits)
        else:
            tl.store(active_ptr, -1)
        at = tl.arange(0, 256)
        for start in range(0, n_semaphores, 256):
            tl.store(semaphores_ptr + start + at, at * 0, mask=start + at < n_semaphores)


def page_routes_triton(token_ids, slots, directory, table_ids, table_weights, into) -> None:
    """One launch; see `page_routes`."""
    tokens, pages = token_ids.shape[0], into.gates.shape[1]
    one = tokens <= MAX_ACTIVE_TOKENS
    block_p = min(32, max(BLOCK_PAGES, power_of_2(pages)))
    block = max(16, power_of_2(tokens)) if one else TILE_TOKENS
    launch(
        _page_routes_kernel, (cdiv(tokens, block),),
        token_ids, slots, directory, table_ids, table_weights, *into,
        tokens, table_ids.shape[1], pages, into.semaphores.numel(),
        BLOCK_T=block, BLOCK_P=block_p, BLOCK_PAGES=BLOCK_PAGES, ONE=one,
        BITS=pages <= MAX_BITS, num_warps=8 if block >= 128 else 4,
    )  # fmt: skip


def page_routes_torch(token_ids, slots, directory, table_ids, table_weights, into) -> None:
    """The reference; see `page_routes`."""
    gates, active, tile_blocks, semaphores = into
    tokens, (_, vocab_size) = token_ids.shape[0], table_ids.shape
    slot = slots[:tokens].long()
    own = (slot >= 0)[:, None] & (directory[OWNER] == slot[:, None])
    at = slot.clamp(min=0)
    top_k = directory[TOP_K][at] * (slot >= 0)
    scale = directory[SCALE].view(torch.float32)[at][:, None]
    rows = gates[:tokens].copy_(torch.where(own & (top_k == 0)[:, None], scale, 0.0))
    ids = token_ids.long().clamp(0, vocab_size - 1)
    for j in range(int(top_k.max()) if tokens else 0):
        column = directory[COLUMNS + j][at].clamp(min=0).long()
        match = table_ids[column, ids][:, None] == directory[EXPERT]
        match &= own & (j < top_k)[:, None]
        rows += torch.where(match, table_weights[column, ids][:, None], 0.0)
    if tokens <= MAX_ACTIVE_TOKENS:
        list_active((rows != 0).any(0), active)
    else:
        list_blocks(rows, tile_blocks)
        active[0] = -1
    semaphores.zero_()


def _run(token_ids, *arguments) -> None:
    run = page_routes_triton if token_ids.is_cuda else page_routes_torch
    run(token_ids, *arguments[:4], PageGates(*arguments[4:]))


def _fake(*arguments) -> None:
    return None


_op = register_op(
    "page_routes(Tensor token_ids, Tensor slots, Tensor directory, Tensor table_ids, "
    "Tensor table_weights, Tensor(a!) gates, Tensor(b!) active, Tensor(c!) tile_blocks, "
    "Tensor(d!) semaphores) -> ()",
    _run,
    _fake,
)


def page_routes(
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    directory: torch.Tensor,
    table_ids: torch.Tensor,
    table_weights: torch.Tensor,
    into: PageGates,
) -> None:
    """Writes the gates of T tokens and what there is of pages among them, zeroes the semaphores.

    Args:
        token_ids: [T] int32 or int64; ids outside the vocabulary are clamped into it. Contiguous
            like all here.
        slots: [N] int32, N >= T: of each token the slot of its adapter, below 0 for none.
        directory: [4 + C, P] int32: of each page its adapter's slot (-1: free) and its expert; of
            each slot the number k of its columns in the tables (0: a plain LoRA), the bits of a
            LoRA's float32 scale, and which columns.
        table_ids: [C, V] int32, passports: experts of every token id.
        table_weights: [C, V] float32, LoRA's scale included.
        into: where they go.
    """
    _op(token_ids, slots, directory, table_ids, table_weights, *into)
