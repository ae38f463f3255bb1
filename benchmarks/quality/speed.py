"""Decode time of the trained adapters, each in a vLLM engine, beside the bare backbone."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.engine import Engine, timed
from benchmarks.quality.methods import Method, methods
from benchmarks.quality.sizes import Size

BATCHES, REPEATS, STEPS = (1, 32), 5, (8, 136)
START_SECONDS = 90  # what one more engine may take, when time is limited
MEMORY = 0.06  # of the GPU, for each engine


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
        max_model_len=512,
        max_num_seqs=max(BATCHES),
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
        **extra,
    )
    return Engine(llm, lora)


def measure(size: Size, names: list[str], work: Path, deadline: float) -> bool:
    """Times methods that have no figures yet; whether all have.

    The bare backbone takes turns with the methods of each call, and its figures stand in their
    rows: compare within a row.
    """
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    file = work / "speed.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    missing = [methods(size)[n] for n in names if n not in rows and n != "full"]
    missing = [m for m in missing if not m.teacher]  # the same engine as what is not distilled
    if not missing:
        return True
    rng = random.Random(0)
    engines = {"stock": start(None, size, work)}
    for method in missing:
        if time.time() + START_SECONDS + 20 > deadline:
            break
        try:
            engines[method.name] = start(method, size, work)
        except Exception as e:  # the others are timed all the same; the report tells of it
            traceback.print_exc()
            rows[method.name] = {"error": f"{type(e).__name__}: {e}"[:500]}
    times: dict[tuple[str, int], list[float]] = {}
    for batch in BATCHES:
        for repeat in range(REPEATS + 1):
            for name, engine in engines.items():
                short, long = (
                    timed(engine, batch, 64, steps, size.vocab, rng) for steps in STEPS
                )
                if repeat:  # the first is warm-up
                    value = (long - short) / (STEPS[1] - STEPS[0]) * 1e3
                    times.setdefault((name, batch), []).append(value)
    for name in engines:
        if name == "stock":
            continue
        rows[name] = {
            str(batch): {
                "unit": "ms per decode step",
                **record.summary(times[name, batch]),
                "stock": statistics.median(times["stock", batch]),
            }
            for batch in BATCHES
        }
    file.write_text(json.dumps(rows, indent=1))
    for engine in engines.values():
        engine.llm.llm_engine.engine_core.shutdown()
    return all(method.name in rows for method in missing)
