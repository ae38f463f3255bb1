"""Token gaps of running requests while adapters are loaded into the engine that serves them.

    python -m benchmarks.lora_load --model llama-3-8b

Streams of the base and of LoRAs decode; adapters are loaded beside them, one after the other, by
`add_lora` as a server does it, and then each is named by a request for the first time. For every
load: its bytes, how long it took, and the largest gap between two outputs of any stream from its
start to half a second after its first request's first token; beside the gaps of as long a time
without loads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import torch
from vllm_adafuse.cli.cmd_random import integers

from benchmarks import record
from benchmarks.engine import make_adapter, make_lora
from benchmarks.engine import write_config as write_backbone
from benchmarks.engine_options import SHAPES, Options
from benchmarks.lora import rank


class Streams:
    """Requests that run to the end of the measurement, and when each got its outputs.

    Args:
        llm: an AsyncLLM.
        prompt: tokens of each.
        vocabulary: token ids are below it.
    """

    def __init__(self, llm, prompt: int, vocabulary: int):
        self.llm, self.prompt, self.vocabulary = llm, prompt, vocabulary
        self.tasks: list[asyncio.Task] = []
        self.times: list[list[float]] = []

    def start(self, lora, tokens: int) -> asyncio.Task:
        """One more request; its task ends with it."""
        times: list[float] = []
        self.times.append(times)
        task = asyncio.create_task(self._run(len(self.times), lora, tokens, times))
        self.tasks.append(task)
        return task

    async def _run(self, number: int, lora, tokens: int, times: list[float]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(10, self.vocabulary, (self.prompt,), generator=draw).tolist()
        params = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        prompt = {"prompt_token_ids": ids}
        async for _ in self.llm.generate(prompt, params, f"r{number}", lora_request=lora):
            times.append(time.perf_counter())

    def gaps(self, start: float, end: float, count: int) -> list[float]:
        """Milliseconds between outputs of the first `count` streams that touch a time: rising."""
        return sorted(
            1e3 * (b - a) for times in self.times[:count] for a, b in zip(times, times[1:])
            if b > start and a < end
        )  # fmt: skip


async def measure(options: argparse.Namespace, root: Path) -> AsyncIterator[dict]:
    """A row of the time without loads, one for each load, and whether the streams outlived them."""
    from vllm import AsyncEngineArgs
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    write_backbone(Options(model=options.model, layers=options.layers), root / "base")
    vocabulary = json.loads((root / "base" / "config.json").read_text())["vocab_size"]
    first = {"lora0": make_lora(root / "base", root / "lora0", options.r)}
    for name, experts in zip(("small", "large"), options.experts):
        shape = experts, options.r, 2
        first[f"{name}0"] = make_adapter(root / "base", root / f"{name}0", shape)
    most = max(options.experts) * options.r
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(root / "base"), skip_tokenizer_init=True, load_format="dummy", dtype=options.dtype,
            max_model_len=options.prompt + options.tokens + 8, enable_lora=True, max_loras=4,
            max_lora_rank=rank(most), max_cpu_loras=64, gpu_memory_utilization=options.memory,
            enable_prefix_caching=False,
        )
    )  # fmt: skip
    streams = Streams(llm, options.prompt, vocabulary)
    lora = LoRARequest("lora0", 1, str(root / "lora0"))
    await llm.add_lora(lora)
    for i in range(options.streams):
        streams.start(lora if i % 2 else None, options.tokens)
    await asyncio.sleep(options.warm)
    start = time.perf_counter()
    await asyncio.sleep(options.quiet)
    quiet = streams.gaps(start, time.perf_counter(), options.streams)
    told = {"streams": options.streams, "median_ms": quiet[len(quiet) // 2]}
    yield {"what": "without loads", **told, "largest_ms": quiet[-1]}
    number = 2
    for turn in range(options.repeats):
        for kind, path in first.items():
            name = f"{kind}-{turn}"
            shutil.copytree(path, root / name, copy_function=os.link)
            start, number = time.perf_counter(), number + 1
            request = LoRARequest(name, number, str(root / name))
            await llm.add_lora(request)
            loaded = time.perf_counter()
            await streams.start(request, 4)
            await asyncio.sleep(0.5)
            found = streams.gaps(start, time.perf_counter(), options.streams)
            file = root / name / "adapter_model.safetensors"
            yield {
                "what": name, "bytes": file.stat().st_size, "load_s": loaded - start,
                "median_ms": found[len(found) // 2], "largest_ms": found[-1],
                "beyond_quiet_ms": found[-1] - quiet[-1],
            }  # fmt: skip
    running = sum(not task.done() for task in streams.tasks[: options.streams])
    yield {"what": "streams that ran to the end of it", "count": running}
    for task in streams.tasks:
        task.cancel()
    await asyncio.gather(*streams.tasks, return_exceptions=True)
    llm.shutdown()


async def save(options: argparse.Namespace, root: Path, out: Path | None, commit: str) -> Path:
    """Measures, and saves what it has after every row; returns the result file."""
    rows: list[dict] = [{"options": vars(options)}]
    path = None
    async for row in measure(options, root):
        print(json.dumps(row), flush=True)
        rows.append(row)
        path = record.save("lora_load", rows, out, commit, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers, while working")
    parser.add_argument("--streams", default=32, type=int)
    parser.add_argument("--prompt", default=128, type=int, help="tokens of each prompt")
    parser.add_argument("--tokens", default=10000, type=int, help="that each stream may generate")
    parser.add_argument("--r", default=16, type=int, help="of the LoRAs and of each expert")
    parser.add_argument("--experts", default="8,32", type=integers, help="of two mixtures")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--warm", default=5.0, type=float, metavar="S", help="before all")
    parser.add_argument("--quiet", default=5.0, type=float, metavar="S", help="without loads")
    parser.add_argument("--memory", default=0.7, type=float, help="of the GPU")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default="", help="of the measured code")
    options = parser.parse_args()
    out, commit = options.__dict__.pop("out"), options.__dict__.pop("commit")
    # Adapters are made with threads, whose locks a forked engine would wait for.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    with tempfile.TemporaryDirectory() as scratch:
        path = asyncio.run(save(options, Path(scratch), out, commit))
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
