"""The paper's table: what dynamic adapters cost at batch 1, decoding.

    python -m benchmarks.paper                              # transformers, both 7B shapes
    python -m benchmarks.paper --where vllm                 # the same inside vLLM, CUDA graphs
    python -m benchmarks.paper --model tiny --repeats 1     # without a GPU
    python -m benchmarks.paper --report                     # docs/paper.md from the result files

Random weights; the same sizes of adapter in every row. Rows take turns on one backbone and leave
nothing behind: a row is put on, a prompt runs, each token is timed until the host has read it, and
it is taken off. Launches are counted by torch's profiler, in a step of their own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.engine import SHAPES, write_config
from benchmarks.paper_rows import ROWS, Mixture, missing_package
from benchmarks.profile import count_launches

ENGINES = ("stock", "lora", "layer_wise", "adafuse")


@dataclass
class Options:
    """What to measure; checked at construction."""

    where: str = "transformers"
    models: list[str] = field(default_factory=lambda: ["llama-2-7b", "mistral-7b"])
    layers: int | None = None
    rows: list[str] = field(default_factory=lambda: list(ROWS))
    engines: list[str] = field(default_factory=lambda: list(ENGINES))
    prompt: int = 32
    tokens: int = 24
    seconds: float = 2.0
    repeats: int = 3
    experts: int = 8
    top_k: int = 2
    r: int = 16
    dtype: str = "bfloat16" if torch.cuda.is_available() else "float32"
    memory: float = 0.2
    cache: float | None = None

    def __post_init__(self):
        for name, values, known in (("models", self.models, SHAPES), ("rows", self.rows, ROWS)):
            if unknown := [v for v in values if v not in known]:
                raise ValueError(f"{name} has {unknown[0]}, expected of {', '.join(known)}")
        if self.rows[:1] != ["backbone"] and self.where == "transformers":
            raise ValueError(
                f"rows are {self.rows}, expected backbone first: overheads are over it"
            )
        self.mixture  # noqa: B018 (its checks)

    @property
    def mixture(self) -> Mixture:
        return Mixture(self.experts, self.top_k, self.r)


def make_backbone(options: Options, model: str, device: str):
    """A transformers model with random weights, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks import engine

    with tempfile.TemporaryDirectory() as scratch:
        write_config(engine.Options(model=model, layers=options.layers), Path(scratch))
        config = AutoConfig.from_pretrained(scratch, trust_remote_code=False)
    with torch.device(device):
        built = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, options.dtype), trust_remote_code=False
        )
    return built.eval().requires_grad_(False)


class Stream:
    """One sequence: a prompt, then a token at a time, greedy."""

    def __init__(self, model, options: Options):
        self.model = model
        device, vocab = next(model.parameters()).device, model.config.vocab_size
        prompt = torch.randint(vocab, (1, options.prompt), device=device)
        self._advance(self.model(prompt, use_cache=True))

    def _advance(self, out) -> None:
        self.cache = out.past_key_values
        self.token = out.logits[:, -1:].argmax(-1)

    def step(self) -> int:
        """The next token, on the host."""
        self._advance(self.model(self.token, past_key_values=self.cache, use_cache=True))
        return int(self.token)

    def time(self, tokens: int, seconds: float) -> list[float]:
        """Milliseconds of each of at most so many tokens, for about so many seconds."""
        for _ in range(2):
            self.step()
        begin, taken = time.perf_counter(), []
        while len(taken) < tokens and time.perf_counter() - begin < seconds or len(taken) < 3:
            start = time.perf_counter()
            self.step()
            taken.append((time.perf_counter() - start) * 1e3)
        return taken


def reset(device: str) -> int:
    """Frees what is unused; the bytes that are still held."""
    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


@torch.no_grad()
def measure_transformers(options: Options, model: str) -> list[dict]:
    """One row per system."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    built = make_backbone(options, model, device)
    found: dict[str, dict[str, Any]] = {}
    for name in options.rows:
        found[name] = {"where": "transformers", "model": model, "row": name, "unit": "ms/token"}
        if package := missing_package(name):
            found[name]["skipped"] = f"package {package} is not installed"
            print(f"{model} {name}: skipped, {found[name]['skipped']}", flush=True)
    running = [name for name in options.rows if "skipped" not in found[name]]
    times: dict[str, list[float]] = {name: [] for name in running}
    for repeat in range(options.repeats):
        for name in running:
            held = reset(device)
            with ROWS[name](built, options.mixture) as adapted:
                if device == "cuda":  # what putting it on took is not its memory
                    torch.cuda.reset_peak_memory_stats()
                stream = Stream(adapted, options)
                taken = stream.time(options.tokens, options.seconds)
                times[name].append(statistics.median(taken))
                if repeat == 0:
                    if device == "cuda":
                        peak = torch.cuda.max_memory_allocated()
                        found[name] |= {"peak_bytes": peak, "added_bytes": peak - held}
                    found[name] |= count_launches(stream.step)
                del stream, adapted
            print(f"{model} {name} {times[name][-1]:.2f} ms/token", flush=True)
    base = statistics.median(times["backbone"])
    for name in running:
        found[name] |= record.summary(times[name])
        found[name]["overhead"] = found[name]["median"] / base - 1
    return list(found.values())


def show(row: dict) -> str:
    if "skipped" in row:
        return f"{row['where']:12} {row['model']:12} {row['row']:18} skipped: {row['skipped']}"
    return (
        f"{row['where']:12} {row['model']:12} {row['row']:18} {row['median']:8.2f} ms "
        f"({row['min']:.2f} to {row['max']:.2f}) {row['overhead']:+8.1%} "
        f"{row.get('kernels', '?'):>6} launches {row.get('peak_bytes', 0) / 1e9:7.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words, defaults = (lambda text: text.split(",")), Options()
    parser.add_argument("--where", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--model", "--models", dest="models", default=defaults.models, type=words)
    parser.add_argument("--layers", type=int, help="fewer layers, while working")
    parser.add_argument("--rows", default=defaults.rows, type=words, help=", ".join(ROWS))
    parser.add_argument("--engines", default=defaults.engines, type=words, help="with vllm")
    parser.add_argument("--prompt", default=defaults.prompt, type=int)
    parser.add_argument("--tokens", default=defaults.tokens, type=int, help="timed, per repeat")
    parser.add_argument(
        "--seconds", default=defaults.seconds, type=float, help="of timing, at most"
    )
    parser.add_argument("--repeats", default=defaults.repeats, type=int)
    parser.add_argument("--experts", default=defaults.experts, type=int)
    parser.add_argument("--top-k", default=defaults.top_k, type=int)
    parser.add_argument("--r", default=defaults.r, type=int)
    parser.add_argument("--dtype", default=defaults.dtype)
    parser.add_argument("--memory", default=defaults.memory, type=float, help="of each vLLM engine")
    parser.add_argument(
        "--cache", type=float, metavar="GIB",
        help="of keys and values, for each vLLM engine: then they start all at once",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default="", help="of the measured code")
    parser.add_argument("--report", action="store_true", help="write docs/paper.md and its plots")
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="for --report")
    parser.add_argument("--docs", type=Path, help="for --report")
    arguments = vars(parser.parse_args())
    out, commit, report, results, docs = (
        arguments.pop(name) for name in ("out", "commit", "report", "results", "docs")
    )
    if report:
        from benchmarks.paper_report import ROOT, write_report

        print(write_report(results, docs or ROOT / "docs"))
        return
    options = Options(**arguments)
    rows: list[dict] = []
    for model in options.models:
        if options.where == "vllm":
            from benchmarks.paper_engines import measure_vllm

            rows += measure_vllm(options, model)
        else:
            rows += measure_transformers(options, model)
            reset("cuda" if torch.cuda.is_available() else "cpu")
    for row in rows:
        print(show(row), flush=True)
    path = record.save("paper", [{"options": vars(options)}, *rows], out, commit)
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
