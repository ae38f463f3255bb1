"""Decode time of the trained adapters, each in a vLLM engine, beside the bare backbone.

Every engine lives in a process of its own. All start at the same time, which takes about as long as
one; then this process asks each in turn for one measurement, while the others stand still.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_any
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.prompts import Ids
from benchmarks.quality.methods import Method, methods
from benchmarks.quality.sizes import SIZES, Size
from benchmarks.turns import Engine, decode_ms

BATCHES, REPEATS, STEPS, PROMPT = (1, 32), 5, (8, 136), 64
STOCK = "stock"
START_SECONDS, TURNS_SECONDS = 60, 30  # with less time left no engine is started
STOP_SECONDS = 10  # for an engine to end by itself
LONGEST_WAIT = 3600.0  # at once: the system knows no endless number of seconds
# Of the GPU, free when an engine starts (vLLM refuses else); bytes of keys and values, which are
# given so that no engine measures what others take meanwhile.
MEMORY, CACHE = 0.02, 1 << 29


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
        skip_tokenizer_init=True,
        dtype="bfloat16",
        gpu_memory_utilization=MEMORY,
        kv_cache_memory_bytes=CACHE,
        max_model_len=512,
        max_num_seqs=max(BATCHES),
        max_num_batched_tokens=max(BATCHES) * PROMPT,  # no kernels for more need be compiled
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
        **extra,
    )
    return Engine(llm, lora)


def serve_times(answer: Connection, name: str, size: Size, work: Path) -> None:
    """A process with one engine: says "ready", then answers batches with ms per decode step.

    Args:
        answer: to the process that asks; batch 0, or its end, ends this one.
        name: of the method, or STOCK.
        size: of the experiment.
        work: its folder; the engine's log goes there.
    """
    log = os.open(work / f"speed-{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the engine's process ends, too
    torch.set_num_threads(1)  # vLLM forks this process: a pool of threads would hang in the copy
    try:
        engine = start(methods(size).get(name), size, work)
    except Exception as e:
        traceback.print_exc()
        answer.send(f"{type(e).__name__}: {e}"[:500])
        return
    try:
        answer.send("ready")
        ids = Ids(size.vocab, random.Random(0))
        while batch := answer.recv():
            answer.send(decode_ms(engine, batch, PROMPT, STEPS, ids))
    except EOFError:
        pass
    finally:
        engine.stop()


class Engines:
    """Engines in processes of their own, in a `with` block.

    Attributes:
        ready: name -> its connection, of those that started.
        errors: name -> why another did not.
    """

    def __init__(self, names: list[str], size: Size, work: Path):
        context = multiprocessing.get_context("spawn")
        self.ready: dict[str, Connection] = {}
        self.errors: dict[str, str] = {}
        self._processes, self._starting = {}, {}
        for name in names:
            self._starting[name], theirs = context.Pipe()
            process = context.Process(target=serve_times, args=(theirs, name, size, work))
            process.start()
            theirs.close()
            self._processes[name] = process

    def wait(self, until: float) -> None:
        """Until all have started, or failed, or time is up."""
        begin = time.time()
        while self._starting and (left := until - time.time()) > 0:
            there = wait_any(list(self._starting.values()), min(left, LONGEST_WAIT))
            for name in [n for n, c in self._starting.items() if c in there]:
                connection = self._starting.pop(name)
                try:
                    said = connection.recv()
                except EOFError:
                    said = "its process ended while it started"
                if said == "ready":
                    self.ready[name] = connection
                else:
                    self.errors[name] = said
        for name in self._starting:
            self.errors[name] = f"not started within {time.time() - begin:.0f} s"
        self._stop(list(self._starting), 1)  # starting would disturb what is timed

    def ask(self, name: str, batch: int, until: float) -> float | None:
        """ms per decode step; None if there is none by then, or the engine failed."""
        connection = self.ready[name]
        try:
            connection.send(batch)
            left = min(LONGEST_WAIT, max(0.0, until - time.time()))
            return connection.recv() if connection.poll(left) else None
        except (EOFError, OSError):
            self.errors[name] = "its process ended while it was timed"
            del self.ready[name]
            return None

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *_) -> None:
        self._stop(list(self._processes), STOP_SECONDS)

    def _stop(self, names: list[str], seconds: float) -> None:
        import psutil

        stopped = [self._processes.pop(name) for name in names]
        for process in stopped:
            process.terminate()
        until = time.time() + seconds
        for process in stopped:
            process.join(max(0.0, until - time.time()))
            if process.is_alive():
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()  # it holds the GPU's memory
                process.kill()
                process.join()


def _file(work: Path, name: str) -> Path:
    return work / "speed" / f"{name}.json"


def _write(work: Path, name: str, figures: dict[str, Any]) -> None:
    part = _file(work, name).with_suffix(".part")
    part.write_text(json.dumps(figures, indent=1))
    part.rename(_file(work, name))


def take_turns(engines: Engines, work: Path, deadline: float) -> None:
    """Times all engines that started; writes a file for each method after each size."""
    times: dict[tuple[str, int], list[float]] = {}
    for batch in BATCHES:
        for repeat in range(REPEATS + 1):
            for name in list(engines.ready):
                value = engines.ask(name, batch, deadline)
                if value is None and name in engines.ready:
                    return  # no time
                if value is not None and repeat:  # the first is warm-up
                    times.setdefault((name, batch), []).append(value)
        for name in engines.ready:
            if name != STOCK and STOCK in engines.ready:
                _write(work, name, {
                    str(b): {"unit": "ms per decode step", **record.summary(times[name, b]),
                             "stock": statistics.median(times[STOCK, b])}
                    for b in BATCHES if (name, b) in times
                })  # fmt: skip


def measure_all(
    size_name: str, names: list[str], work: Path, deadline: float, say: Callable[[str], None]
) -> bool:
    """Times methods that have no figures yet; writes `work/speed`, a file for each.

    What is distilled is served as what is not, and all weights as the bare backbone: not timed.
    All engines live at the same time: each has CACHE bytes of the GPU, and what its process needs.

    Args:
        size_name: of the experiment.
        names: of methods.
        work: its folder.
        deadline: no measurement is waited for longer.
        say: takes a line for people.

    Returns:
        Whether all have figures.
    """
    size = SIZES[size_name]
    folder = work / "speed"
    folder.mkdir(exist_ok=True)

    def lacking(name: str) -> bool:  # one that failed gets another chance
        file = _file(work, name)
        return not file.exists() or "error" in json.loads(file.read_text())

    served = [n for n in names if (m := methods(size)[n]).mixture and not m.teacher]
    missing = [n for n in served if lacking(n)]
    there = [n for n in missing if (work / "runs" / f"{n}-s{size.seeds[0]}.json").exists()]
    if not missing:
        return True
    left = deadline - time.time()
    if left < START_SECONDS + TURNS_SECONDS or not there:
        say(f"not timed: {len(there)} adapters, {left:.0f} s left")
        return False
    say(f"timing in vLLM: {len(there)} adapters and the backbone")
    with Engines([STOCK, *there], size, work) as engines:
        engines.wait(deadline - TURNS_SECONDS)
        say(f"started: {', '.join(engines.ready) or 'none'}")
        if STOCK in engines.ready:
            take_turns(engines, work, deadline)
    bare = engines.errors.get(STOCK)
    for name in there:
        error = f"the bare backbone: {bare}" if bare else engines.errors.get(name)
        if error and lacking(name):  # figures of a smaller batch stay
            say(f"not timed: {name}, {error}")
            _write(work, name, {"error": error})
    return not any(lacking(n) for n in missing)
