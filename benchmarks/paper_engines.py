"""The paper's rows inside vLLM: whole engines at batch 1, with CUDA graphs where there is a GPU."""

from __future__ import annotations

import os
import random
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import engine, record
from benchmarks.engine import SHAPES
from benchmarks.profile import counted, launch_profiler
from benchmarks.prompts import Ids
from benchmarks.turns import decode_ms, timed

if TYPE_CHECKING:
    from benchmarks.paper import Options

SHORT, LONG = 8, 40  # tokens of two generations: their difference is decoding alone


def _start_profile(worker) -> None:
    worker.launches = launch_profiler()
    worker.launches.start()


def _stop_profile(worker) -> dict[str, int]:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    worker.launches.stop()
    return counted(worker.launches)


def launches_per_token(one: engine.Engine, prompt: int, vocab: int) -> dict[str, float]:
    """Kernels and copies of a decoding step; those inside a CUDA graph count one by one."""
    found = []
    for tokens in (SHORT, LONG):
        one.llm.collective_rpc(_start_profile)
        timed(one, [(prompt, tokens)], Ids(vocab, random.Random(1)))
        found.append(one.llm.collective_rpc(_stop_profile)[0])
    short, long = found
    return {key: round((long[key] - short[key]) / (LONG - SHORT)) for key in long if key in short}


def measure_vllm(options: Options, model: str) -> list[dict[str, Any]]:
    """One row per engine; they stay side by side and take turns."""
    # This process may have touched the GPU, which a forked engine could not use then.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    settings = engine.Options(
        model=model, layers=options.layers, engines=options.engines, batches=[1], prefill=[(1, 8)],
        prompt=options.prompt, repeats=options.repeats, experts=options.experts,
        top_k=options.top_k, r=options.r, dtype=options.dtype, memory=options.memory,
        cache=options.cache, settings=engine.FRESH,
    )  # fmt: skip
    vocab, rows = SHAPES[model][-1], []
    ids = Ids(vocab, random.Random(0))
    with tempfile.TemporaryDirectory() as scratch:
        root, engines = Path(scratch), {}
        engine.write_config(settings, root / "base")
        times: dict[str, list[float]] = {}
        for kind, started in engine.start_all(options.engines, settings, root):
            if isinstance(started, Exception):
                raise started
            engines[kind], figures = started
            rows.append({"where": "vllm", "model": model, "row": kind, "unit": "ms/token"})
            rows[-1]["peak_bytes"] = figures["model_bytes"]
            if options.cache is None:
                rows[-1]["start_s"] = figures["start_s"]
            times[kind] = []
        for repeat in range(options.repeats + 1):
            for kind, one in engines.items():
                value = decode_ms(one, 1, options.prompt, settings.steps, ids)
                if repeat:  # the first is warm-up
                    times[kind].append(value)
        base = statistics.median(times[options.engines[0]])
        for row in rows:
            row |= record.summary(times[row["row"]])
            row["overhead"] = row["median"] / base - 1
            row |= launches_per_token(engines[row["row"]], options.prompt, vocab)
        for one in engines.values():
            one.stop()
    return rows
