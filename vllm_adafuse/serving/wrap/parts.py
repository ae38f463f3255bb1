"""The parts of a wrapped model that launch kernels, each to be run by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm_adafuse.serving.projections import bias_of
from vllm_adafuse.serving.wrap import bank_of
from vllm_adafuse.serving.wrap.blocks import FusedNorm
from vllm_adafuse.serving.wrap.layer_wise import FfnActivation


def parts_of(model: torch.nn.Module) -> Iterator[tuple[tuple, Callable[[int], None]]]:
    """A function of a number of tokens for each part, after a key that parts of one kind share."""
    modules = list(model.modules())
    norms = {m.bank: m for m in modules if isinstance(m, FusedNorm)}
    whole: set[LinearBase] = set()
    for block in modules:
        if isinstance(getattr(block, "act_fn", None), FfnActivation):
            both = block.gate_up_proj, block.down_proj
            whole.update(both)
            yield ("ffn", *map(_kind, both)), _Ffn(block)
    for layer in modules:
        bank = bank_of(layer)
        if bank is not None and layer not in whole:
            norm = norms.get(bank)
            yield (norm is not None, *_kind(layer)), _Projection(layer, norm)


def _kind(layer: LinearBase) -> tuple:
    """Equal where two projections launch the same kernels."""
    bank, method = bank_of(layer), layer.quant_method
    if bank is None:
        return ()
    shapes = tuple((name, b.dtype, *b.shape) for name, b in bank.named_buffers(recurse=False))
    bias, cache, slices = bias_of(layer) is not None, bank.cache is not None, bank.slices
    return (
        type(method), method.epilogue, bias, bank.gate, cache, *slices.adapted, *slices.widths,
        shapes,
    )  # fmt: skip


def _apply(layer: LinearBase, x: torch.Tensor) -> torch.Tensor:
    return layer.quant_method.apply(layer, x, bias_of(layer))


def _inputs(layer: LinearBase, tokens: int) -> torch.Tensor:
    bank = bank_of(layer)
    like = bank.lora_b
    return torch.zeros(tokens, bank.slices.size_in, dtype=like.dtype, device=like.device)


class _Projection:
    """A projection, and the norm that ends it; with and without pages for its keys and values."""

    def __init__(self, layer: LinearBase, norm: FusedNorm | None):
        self.layer, self.norm = layer, norm

    def __call__(self, tokens: int) -> None:
        x, cache = _inputs(self.layer, tokens), bank_of(self.layer).cache
        y = _apply(self.layer, x)
        if cache is not None:
            with cache.rehearsal(tokens, x.dtype, x.device):
                _apply(self.layer, x)
        if self.norm is not None:
            self.norm(y, y.new_zeros(tokens, self.norm.weight.shape[0]))


class _Ffn:
    """An MLP whose experts are mixed at its output."""

    def __init__(self, block: torch.nn.Module):
        self.block = block

    def __call__(self, tokens: int) -> None:
        up = self.block.gate_up_proj
        x = self.block.act_fn(_apply(up, _inputs(up, tokens)))
        _apply(self.block.down_proj, x)
