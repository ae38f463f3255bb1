"""Decode time of the trained adapters, each in a vLLM engine, beside the bare backbone."""

from __future__ import annotations

import fcntl
import json
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.engine import Engine, timed
from benchmarks.quality.methods import Method, methods
from benchmarks.quality.sizes import SIZES, Size

BATCHES, REPEATS, STEPS = (1, 32), 5, (8, 136)
START_SECONDS = 75  # what an engine and its figures may take, when time is limited
PROCESSES = 4  # that start engines at the same time; they measure one at a time
MEMORY, CACHE = 0.06, 1 << 30  # of the GPU for each engine; bytes of keys and values


def write_peft(adapter: Path, out: Path) -> Path:
    """A mixture of one expert as a PEFT LoRA, for vLLM's own LoRA."""
    from safetensors.torch import load_file, save_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = {
        f"base_model.model.{name}.weight": tensor[0].contiguous()
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
        if ".lora_" in name
    }
    out.mkdir(exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors")
    kept = ("r", "lora_alpha", "target_modules", "base_model_name_or_path")
    content = {key: config[key] for key in kept} | {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none",
    }  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(content))
    return out


def start(method: Method | None, size: Size, work: Path) -> Engine:
    """The engine of a method's first seed; None: the bare backbone."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    extra: dict[str, Any] = {}
    lora = None
    if method and method.mixture:
        adapter = work / "runs" / f"{method.name}-s{size.seeds[0]}"
        if method.group == "static":
            peft = write_peft(adapter, work / "runs" / f"{method.name}-peft")
            lora = LoRARequest(method.name, 1, str(peft))
            rank = max(8, method.total_rank)
            extra = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        else:
            extra = {"hf_overrides": {"adafuse_adapter": str(adapter)}}
    llm = LLM(
        str(work / "base"),
        dtype="bfloat16",
        gpu_memory_utilization=MEMORY,
        kv_cache_memory_bytes=CACHE,  # no profiling, which other engines' starts would disturb
        max_model_len=512,
        max_num_seqs=max(BATCHES),
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
        **extra,
    )
    return Engine(llm, lora)


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """The GPU for one process at a time; engines of the others stand still."""
    with open(work / "gpu.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _meet(work: Path, i: int, count: int) -> None:
    """Waits until all processes have started their engines: starting disturbs what is timed."""
    (work / "speed" / f"ready-{i}").touch()
    until = time.time() + START_SECONDS
    while len(list((work / "speed").glob("ready-*"))) < count and time.time() < until:
        time.sleep(0.5)


def measure(
    size: Size, names: list[str], work: Path, deadline: float, i: int = 0, count: int = 1
) -> None:
    """Times methods, and writes a file for each in `work/speed`.

    The bare backbone takes turns with the methods of each call, and its figures stand in their
    rows: compare within a row.

    Args:
        size: of the experiment.
        names: of methods.
        work: folder of the experiment.
        deadline: no engine is started that would not be done by then.
        i, count: number of this process, of how many.
    """
    (work / "speed").mkdir(exist_ok=True)
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    rng = random.Random(0)
    engines = {"stock": start(None, size, work)}
    for name in names:
        if time.time() + START_SECONDS > deadline:
            break
        try:
            engines[name] = start(methods(size)[name], size, work)
        except Exception as e:  # the others are timed all the same; the report tells of it
            traceback.print_exc()
            _write(work, name, {"error": f"{type(e).__name__}: {e}"[:500]})
    _meet(work, i, count)
    times: dict[tuple[str, int], list[float]] = {}
    for batch in BATCHES:
        for repeat in range(REPEATS + 1):
            with alone(work):
                for name, engine in engines.items():
                    short, long = (
                        timed(engine, batch, 64, steps, size.vocab, rng) for steps in STEPS
                    )
                    if repeat:  # the first is warm-up
                        value = (long - short) / (STEPS[1] - STEPS[0]) * 1e3
                        times.setdefault((name, batch), []).append(value)
        for name in engines:
            if name != "stock":
                _write(work, name, {
                    str(b): {"unit": "ms per decode step", **record.summary(times[name, b]),
                             "stock": statistics.median(times["stock", b])}
                    for b in BATCHES if (name, b) in times
                })  # fmt: skip
    for engine in engines.values():
        engine.llm.llm_engine.engine_core.shutdown()


def _file(work: Path, name: str) -> Path:
    return work / "speed" / f"{name}.json"


def _write(work: Path, name: str, figures: dict[str, Any]) -> None:
    part = _file(work, name).with_suffix(".part")
    part.write_text(json.dumps(figures, indent=1))
    part.rename(_file(work, name))


def measure_all(size_name: str, names: list[str], work: Path, deadline: float, jobs: int) -> bool:
    """Times methods that have no figures yet, in processes that start at the same time.

    What is distilled is served as what is not, and all weights as the bare backbone: not timed.

    Returns:
        Whether all have figures.
    """
    size = SIZES[size_name]
    missing = [
        name for name in names
        if (m := methods(size)[name]).mixture and not m.teacher and not _file(work, name).exists()
    ]  # fmt: skip
    there = [n for n in missing if (work / "runs" / f"{n}-s{size.seeds[0]}.json").exists()]
    if not missing:
        return True
    if time.time() + START_SECONDS > deadline:
        return False
    count = min(PROCESSES, jobs, len(there))
    processes = []
    for old in (work / "speed").glob("ready-*"):
        old.unlink()
    for i in range(count):
        command = [sys.executable, "-m", "benchmarks.quality.speed", size_name, str(work),
                   str(deadline), str(i), str(count), *there[i::count]]  # fmt: skip
        with open(work / f"speed-{i}.log", "w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log))
    for process in processes:
        try:
            process.wait(max(1.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            process.terminate()
    return all(_file(work, name).exists() for name in missing)


if __name__ == "__main__":
    _, chosen, folder, until, number, of, *some = sys.argv
    measure(SIZES[chosen], some, Path(folder), float(until), int(number), int(of))
