"""Who writes a step's keys and values into vLLM's KV cache: the projection that makes them, where
that is certain to be right, or vLLM's own update, which is a launch more.

vLLM's Attention calls `unified_kv_cache_update`, which hands the keys to the backend's
`do_kv_cache_update`. `wrap.hooks.take_cache` puts a `LayerCache` in the place of that method. When
the projection's op runs it claims the pages; when the update comes for the same forward, it finds
that done. Both run in Python in an eager step and while a FULL graph is captured, whose replays
repeat the projection alone. A PIECEWISE graph holds the projection and not the update, and no
step's metadata is known at its capture: there nothing is claimed, and vLLM's update runs as it
always does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm_adafuse.kernels.kv_slots import KVSlots
from vllm_adafuse.serving import vllm_api

# As the model computes them: a cache of one of these has no scales.
PLAIN_DTYPES = ("auto", "float16", "bfloat16")


def can_write(attention: Any) -> bool:
    """Whether all that ever reads an attention layer's keys and values is its KV cache, in the
    layout of vLLM's FlashAttention, as they are.

    Read against vLLM 0.26, 0.32 and 0.33: FlashAttentionImpl.forward reads keys and values
    themselves for encoders and with context parallelism only.
    """
    if not current_platform.is_cuda() or type(attention) is not Attention:
        return False
    # Brings compiled kernels along, which a model's inspection at start can do without.
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    impl = attention.impl
    return (
        type(impl) is FlashAttentionImpl
        and not attention.attn_backend.forward_includes_kv_cache_update
        and attention.attn_type == impl.attn_type == AttentionType.DECODER
        and attention.kv_sharing_target_layer_name is None
        and attention.kv_cache_dtype in PLAIN_DTYPES
        and not vllm_api.finds_scales(attention)
        and attention.head_size == attention.head_size_v
        and impl.dcp_world_size == impl.pcp_world_size == 1
    )


class LayerCache:
    """The KV cache of one attention layer, shared by it and the projection of q, k and v.

    Args:
        attention: of which `can_write` holds; its keys and values come unchanged from the
            projection.

    Attributes:
        name: of the layer.
        claims: how often the projection has taken it upon itself to write; a captured step counts
            once.
    """

    def __init__(self, attention: Attention):
        self.attention, self.name, self.claims = attention, attention.layer_name, 0
        self._stock_update = attention.impl.do_kv_cache_update
        self._written: Any = None  # the forward whose keys are in their pages
        self._rehearsed: KVSlots | None = None

    def claim(self, tokens: int, dtype: torch.dtype) -> KVSlots | None:
        """Pages for the keys and values of this forward, which the caller is going to write."""
        self._written = None
        if self._rehearsed is not None:
            return self._rehearsed
        if not is_forward_context_available():
            return None
        context = get_forward_context()
        slots = self._slots(context, tokens)
        pages = None if slots is None else self._pages(slots, dtype)
        if pages is not None:
            self._written = context
            self.claims += 1
        return pages

    def _slots(self, context: Any, tokens: int) -> torch.Tensor | None:
        """The forward's slots, if it is an ordinary step, eager or in a FULL graph."""
        if (
            context.cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE
            or context.ubatch_slices is not None
            or not isinstance(context.attn_metadata, dict)  # none in profile runs
            or self.name not in context.attn_metadata
            or not isinstance(context.slot_mapping, dict)
            or context.no_compile_layers.get(self.name) is not self.attention
        ):
            return None
        slots = context.slot_mapping.get(self.name)
        if slots is None or slots.dtype != torch.int64 or slots.shape != (tokens,):
            return None
        return slots if slots.is_contiguous() else None

    def _pages(self, slots: torch.Tensor, dtype: torch.dtype) -> KVSlots | None:
        """Keys and values [blocks, block, heads, D] of the bound cache, if its layout is the one
        known. Made anew for every claim: to keep them would keep a cache that vLLM gives up."""
        attention = self.attention
        cache = attention.kv_cache
        # Kernels store 16 bytes at a time.
        if not isinstance(cache, torch.Tensor) or cache.dtype != dtype or cache.data_ptr() % 16:
            return None
        layout = _layout(cache.shape, cache.stride(), attention.num_kv_heads, attention.head_size)
        if layout is None:
            return None
        shape, strides = layout
        # cache.transpose(1, 2).split(size, -1), as FlashAttentionImpl does, at a third of its cost.
        keys = cache.as_strided(shape, strides)
        values = cache.as_strided(shape, strides, cache.storage_offset() + shape[3])
        return KVSlots(keys, values, slots, shape[1], *strides[:3])

    def update(self, *arguments: Any, **options: Any) -> None:
        """In the place of the backend's `do_kv_cache_update`, if the projection has not done it."""
        written, self._written = self._written, None
        if written is None or written is not get_forward_context():
            self._stock_update(*arguments, **options)

    @contextmanager
    def rehearsal(self, tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
        """Meanwhile every claim gets pages of no use, laid out like those of a step: before there
        is a KV cache, so that the kernels that will write it can be compiled."""
        heads, size = self.attention.num_kv_heads, self.attention.head_size
        memory = torch.zeros(1, 16, heads, 2 * size, dtype=dtype, device=device)
        slots = torch.full((tokens,), -1, device=device)
        self._rehearsed = KVSlots.of(*memory.split(size, -1), slots)
        try:
            yield
        finally:
            self._rehearsed = None


@functools.lru_cache
def _layout(
    shape: torch.Size, strides: tuple[int, ...], heads: int, size: int
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Shape and strides [blocks, block, heads, D] of keys and of values in a cache
    [blocks, heads, block, 2 D]; None if it is laid out otherwise than is known."""
    if len(shape) != 4 or (shape[1], shape[3]) != (heads, 2 * size):
        return None
    blocks, _, block_size, _ = shape
    block, head, row, column = strides
    if column != 1 or block % 16 or row % 16 or (heads > 1 and head % 16):
        return None
    if blocks * block_size >= 1 << 31:
        return None
    # Of a single head the stride may be anything.
    return (blocks, block_size, heads, size), (block, row, head * (heads > 1), 1)
