"""Rotary embeddings that the projection of queries and keys applies itself."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm_adafuse.kernels.pairs import can_rotate


class Turned(torch.nn.Module):
    """Stands where an attention block had its rotary embedding: queries and keys come turned."""

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return query, key


class SharedRotary(torch.nn.Module):
    """The rotary embedding of all layers, and a step's cosines and sines in a static buffer.

    Args:
        rows: tokens of the largest step.
        follows_qkv: in this family nothing comes between the projection and the embedding.

    Attributes:
        cos_sin: [rows, D], cosines of each token's position, then sines; once `take` has taken.
    """

    def __init__(self, rows: int, follows_qkv: bool):
        super().__init__()
        self.rows, self.follows_qkv = rows, follows_qkv
        self.stock: torch.nn.Module | None = None

    def take(self, layer: LinearBase, block: torch.nn.Module) -> bool:
        """Takes the rotary embedding out of an attention block, if this projection can do it."""
        rotary = getattr(block, "rotary_emb", None)
        if not self.follows_qkv or getattr(block, "qkv_proj", None) is not layer:
            return False
        if not _is_plain(rotary, layer) or getattr(block, "qk_norm", False):
            return False
        if self.stock is None:
            self.stock = rotary
            cache = rotary.cos_sin_cache
            cos_sin = cache.new_zeros(self.rows, cache.shape[1])
            self.register_buffer("cos_sin", cos_sin, persistent=False)
        if self.stock is not rotary:  # layers of other bases
            return False
        block.rotary_emb = Turned()
        return True

    def forward(self, positions: torch.Tensor) -> None:
        """Looks up the step's cosines and sines.

        Args:
            positions: [T] int64.
        """
        if self.stock is not None:
            rows = self.cos_sin[: positions.shape[0]]
            torch.index_select(self.stock.cos_sin_cache, 0, positions, out=rows)


def _is_plain(rotary: torch.nn.Module | None, layer: LinearBase) -> bool:
    """The embedding turns whole heads, halves against halves, by one table."""
    if not isinstance(rotary, RotaryEmbedding) or not isinstance(layer, QKVParallelLinear):
        return False
    kind, heads = type(rotary), {layer.head_size, layer.v_head_size, rotary.head_size}
    return (
        kind.forward_native is RotaryEmbedding.forward_native
        and kind.forward_cuda is RotaryEmbedding.forward_cuda
        and rotary.is_neox_style
        and heads == {rotary.rotary_dim}
        and can_rotate(rotary.rotary_dim)
    )
