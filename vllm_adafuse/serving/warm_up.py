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
from collections.abc import Callable, Sequence

import torch
from vllm.logger import init_logger
from vllm_adafuse.kernels.dispatch import MAX_TILE_TOKENS
from vllm_adafuse.kernels.launch import compile_only
from vllm_adafuse.kernels.whole import token_counts
from vllm_adafuse.serving.wrap.parts import parts_of

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")


def warm_up(model: torch.nn.Module, most: int, prepare: Callable[[int], None]) -> None:
    """Has all kernels compiled that this rank's part of an adapted model can launch.

    Args:
        model: the decoder, wrapped and loaded, on a GPU.
        most: tokens of the largest step.
        prepare: number of tokens -> routes them, before the parts run.
    """
    started = time.perf_counter()
    counts = slowest_first(token_counts(most))
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
    parts = dict(parts_of(model)).values()
    for tokens in counts:
        prepare(tokens)
        for run in parts:
            run(tokens)
    return len(parts)


def slowest_first(counts: Sequence[int]) -> list[int]:
    """Numbers of tokens, first those whose kernels take the compiler longest."""
    return sorted(counts, key=lambda tokens: tokens > MAX_TILE_TOKENS)
