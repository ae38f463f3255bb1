"""Keys and values that the projection of q, k and v leaves in the pages of a KV cache:

    keys[slots[t] // block, slots[t] % block, h] = k[t, h]      likewise values; none if slot < 0

where they would lie in the projection's result otherwise, for a launch of its own to copy. A head's
columns stand side by side in both, so kernels store as before, only from another start.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class KVSlots(NamedTuple):
    """Where a step's keys and values go, in the order of a kernel's arguments.

    Attributes:
        keys, values: [blocks, block_size, heads, D] of the projection's dtype, D contiguous;
            heads begin at multiples of 16 bytes.
        slots: [T] int64, block * block_size + place in it; -1 for a token to leave out.
        block_size: tokens of a page.
        block_stride, row_stride, head_stride: of keys and of values.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    block_size: int
    block_stride: int
    row_stride: int
    head_stride: int

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> KVSlots:
        """Raises ValueError: the two are not laid out alike, or a row's columns have gaps."""
        if keys.stride() != values.stride() or keys.stride(3) != 1:
            raise ValueError(
                f"pages of keys and values have strides {keys.stride()} and {values.stride()}, "
                "expected the same ones that end in 1"
            )
        block, row, head, _ = keys.stride()
        # Of a single head the stride may be anything.
        return cls(keys, values, slots, keys.shape[1], block, row, head * (keys.shape[2] > 1))


NO_KV_SLOTS: tuple[Any, ...] = (None,) * len(KVSlots._fields)


@triton.jit
def rows_in_kv(
    slots_ptr, tokens, token_mask, block_size, block_stride, row_stride, KV: tl.constexpr
):
    """Where tokens' rows begin in pages, [T], and who has one."""
    kv_starts, slot_mask = tokens.to(tl.int64), token_mask
    if KV:
        slots = tl.load(slots_ptr + tokens, mask=token_mask, other=-1)
        slot_mask = slots >= 0
        # Fits 32 bits, in which a division is short; a block's place may not.
        slots = slots.to(tl.int32)
        kv_starts = (slots // block_size).to(tl.int64) * block_stride
        kv_starts += slots % block_size * row_stride
    return kv_starts, slot_mask


@triton.jit
def head_in_kv(keys_ptr, values_ptr, kv_starts, slice_idx, head, head_stride):
    """Where a head of each token begins in pages, [T], of keys (slice 1) or values (slice 2).

    kv_starts: from `rows_in_kv`.
    """
    return tl.where(slice_idx == 2, values_ptr, keys_ptr) + kv_starts + head * head_stride


@triton.jit
def starts_of_head(
    in_y, token_mask, keys_ptr, values_ptr, kv_starts, slot_mask, slice_idx, head, head_stride,
    KV: tl.constexpr,
):  # fmt: skip
    """Where a head of each token begins, [T], and who has it: in y, or for keys (slice 1) and
    values (slice 2) in their pages.

    in_y: [T], where it begins in y; kv_starts, slot_mask: from `rows_in_kv`.
    """
    starts, kept = in_y, token_mask
    if KV:
        in_kv = head_in_kv(keys_ptr, values_ptr, kv_starts, slice_idx, head, head_stride)
        # Both at 16 bytes; without being told, Triton 3.9 stores element by element.
        starts = tl.multiple_of(tl.where(slice_idx > 0, in_kv, in_y), 16)
        kept = tl.where(slice_idx > 0, slot_mask, token_mask)
    return starts, kept


def kv_slots_torch(y: torch.Tensor, pages: KVSlots, widths: list[int]) -> None:
    """Copies keys and values of y [T, q + k + v columns] to their pages: the reference."""
    kept = pages.slots >= 0
    slots = pages.slots[kept]
    block, row = slots // pages.block_size, slots % pages.block_size
    _, k, v = y[: len(kept)].split(list(widths), 1)
    for to, columns in ((pages.keys, k), (pages.values, v)):
        to[block, row] = columns[kept].unflatten(1, to.shape[2:])
