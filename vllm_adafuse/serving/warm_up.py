"""Compiles all kernels that a served model can need before the first request does.

Triton compiles a kernel when it is first launched. Which one a step launches, and how it is cut,
hangs on its number of tokens: without this a first long prompt or an odd batch would wait for
seconds. vLLM warms its own kernels at a few numbers of tokens only (worker:
compile_or_warm_up_model), so here each projection, norm and activation of another shape runs alone,
once for every number of tokens at which a choice may change. Our kernels do not run there: threads
compile them, so that all cores do.

It happens in the model's first forward. That is vLLM's profile run: the device still has room, all
ranks are in it together, and nothing is captured yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm_adafuse.kernels.dispatch import MAX_TILE_TOKENS
from vllm_adafuse.kernels.launch import compile_only
from vllm_adafuse.serving.bank import bias_of
from vllm_adafuse.serving.layer_wise import FfnActivation
from vllm_adafuse.serving.norm import FusedNorm

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")


def token_counts(most: int) -> list[int]:
    """Numbers of tokens up to `most`, one of each kind that kernels tell apart, falling.

    Blocks are powers of two, and every limit stands at one: so those, their neighbours, and what
    lies between.
    """
    powers = [1 << i for i in range(most.bit_length())]
    near = {p + d for p in powers for d in (-1, 0, 1)} | {p * 3 // 2 for p in powers}
    return sorted((n for n in near | {most} if 1 <= n <= most), reverse=True)


def warm_up(model: torch.nn.Module, most: int, prepare: Callable[[int], None]) -> None:
    """Has all kernels compiled that this rank's part of an adapted model can launch.

    Args:
        model: the decoder, wrapped and loaded, on a GPU.
        most: tokens of the largest step.
        prepare: number of tokens -> routes them, before the parts run.
    """
    started = time.perf_counter()
    # First those whose kernels take the compiler longest.
    counts = sorted(token_counts(most), key=lambda tokens: tokens > MAX_TILE_TOKENS)
    with compile_only() as kernels:
        kinds = run_parts(model, counts, prepare)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    logger.info(
        "AdaFuse: kernels of %d parts for %d numbers of tokens are ready: %d, in %.1f s (less from "
        "Triton's cache)", kinds, len(counts), len(kernels), time.perf_counter() - started,
    )  # fmt: skip


@torch.inference_mode()
def run_parts(model: torch.nn.Module, counts: Sequence[int], prepare: Callable[[int], None]) -> int:
    """Runs each kind of projection by itself for these numbers of tokens; returns how many kinds.

    Ranks of tensor parallelism have the same kinds in the same order: sums over them meet.
    """
    parts = dict(_parts(model)).values()
    for tokens in counts:
        prepare(tokens)
        for run in parts:
            run(tokens)
    return len(parts)


def _parts(model: torch.nn.Module) -> Iterator[tuple[tuple, Callable[[int], None]]]:
    """What runs alone, after a key that parts of one kind share."""
    modules = list(model.modules())
    norms = {m.bank: m for m in modules if isinstance(m, FusedNorm)}
    whole: set[LinearBase] = set()
    for block in modules:
        if isinstance(getattr(block, "act_fn", None), FfnActivation):
            both = block.gate_up_proj, block.down_proj
            whole.update(both)
            yield ("ffn", *map(_kind, both)), _Ffn(block)
    for layer in modules:
        bank = getattr(layer, "adafuse_bank", None)
        if bank is not None and layer not in whole:
            norm = norms.get(bank)
            yield (norm is not None, *_kind(layer)), _Projection(layer, norm)


def _kind(layer: LinearBase) -> tuple:
    """Equal where two projections launch the same kernels."""
    bank, method = getattr(layer, "adafuse_bank", None), layer.quant_method
    if bank is None:
        return ()
    slices = getattr(bank, "slices", bank)
    shapes = tuple((name, b.dtype, *b.shape) for name, b in bank.named_buffers(recurse=False))
    activation, bias = getattr(method, "activation", ""), bias_of(layer) is not None
    gate, cache = getattr(bank, "gate", None), getattr(bank, "cache", None) is not None
    return type(method), activation, bias, gate, cache, *slices.parts, *slices.widths, shapes


def _apply(layer: LinearBase, x: torch.Tensor) -> torch.Tensor:
    return layer.quant_method.apply(layer, x, bias_of(layer))


def _inputs(layer: LinearBase, tokens: int) -> torch.Tensor:
    size = getattr(layer, "input_size_per_partition", layer.input_size)
    like = layer.adafuse_bank.lora_b
    return torch.zeros(tokens, size, dtype=like.dtype, device=like.device)


class _Projection:
    """A projection, and the norm that ends it; with and without pages for its keys and values."""

    def __init__(self, layer: LinearBase, norm: FusedNorm | None):
        self.layer, self.norm = layer, norm

    def __call__(self, tokens: int) -> None:
        x, cache = _inputs(self.layer, tokens), getattr(self.layer.adafuse_bank, "cache", None)
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
