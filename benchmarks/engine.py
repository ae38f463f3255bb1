"""Decode and prefill of whole vLLM engines, the stock backbone beside ours and beside LoRA.

    python -m benchmarks.engine --model llama-2-7b --batches 1,8,32,128 --repeats 5
    python -m benchmarks.engine --engines stock,lora,adafuse,adafuse:16/16/2 --memory 0.2

Engines: `stock`, the bare backbone; `lora`, vLLM's own LoRA with one static adapter of rank r;
`adafuse`, or `adafuse:E/r/k` for other experts, ranks and top-k than the options say;
`layer_wise`, or `layer_wise:E/r/k`, the same with a router in every linear.

Random weights (`load_format="dummy"`), random prompts, full CUDA graphs, greedy. The engines live
side by side in processes of their own and take turns, so that drift of the clock hits all alike.
Decode time per step is the difference of a long and a short generation over the difference of
their lengths; prefill is the time of prompts with one token each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm_adafuse.cli.cmd_random import integers
from vllm_adafuse.random_adapter import make_random_adapter

from benchmarks import record

SHAPES = {
    "llama-2-7b": ("LlamaForCausalLM", 4096, 11008, 32, 32, 32, 32000),
    "mistral-7b": ("MistralForCausalLM", 4096, 14336, 32, 32, 8, 32000),
    "llama-2-13b": ("LlamaForCausalLM", 5120, 13824, 40, 40, 40, 32000),
    "qwen2.5-0.5b": ("Qwen2ForCausalLM", 896, 4864, 24, 14, 2, 151936),
    "tiny": ("LlamaForCausalLM", 128, 256, 2, 4, 2, 1000),
}

# Our engines, and the routing of their adapters.
OURS = {"adafuse": "pre_gated", "layer_wise": "layer_wise"}


@dataclass
class Options:
    """What to measure; checked at construction."""

    model: str = "llama-2-7b"
    layers: int | None = None
    engines: list[str] = field(default_factory=lambda: ["stock", "adafuse"])
    batches: list[int] = field(default_factory=lambda: [1, 8, 32, 128])
    prefill: tuple[int, int] = (16, 1000)
    prompt: int = 128
    steps: tuple[int, int] = (8, 136)
    repeats: int = 5
    experts: int = 8
    top_k: int = 2
    r: int = 16
    dtype: str = "bfloat16"
    memory: float = 0.4

    def __post_init__(self):
        if self.model not in SHAPES:
            raise ValueError(f"model is {self.model}, expected one of {', '.join(SHAPES)}")
        for kind in self.engines:
            self.mixture(kind)

    def mixture(self, kind: str) -> tuple[int, int, int] | None:
        """(E, r, k) of an engine of ours; None for the others.

        Raises:
            ValueError: not an engine's name.
        """
        if kind in ("stock", "lora"):
            return None
        if kind in OURS:
            return self.experts, self.r, self.top_k
        name, _, numbers = kind.partition(":")
        parts = numbers.split("/")
        if name not in OURS or len(parts) != 3 or not all(part.isdigit() for part in parts):
            raise ValueError(
                f"engine {kind}: expected stock, lora, adafuse, layer_wise, or adafuse:E/r/k"
            )
        return int(parts[0]), int(parts[1]), int(parts[2])


def write_config(options: Options, path: Path) -> None:
    """A checkpoint directory with nothing but a config.json."""
    from vllm_adafuse.tiny import tiny_config

    name, hidden, inter, layers, heads, kv_heads, vocab = SHAPES[options.model]
    config = tiny_config(
        name,
        hidden_size=hidden,
        intermediate_size=inter,
        num_hidden_layers=options.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        vocab_size=vocab,
        max_position_embeddings=16384,
    )
    config.save_pretrained(path)


def _loaded_bytes(worker) -> int:
    """Device memory of weights, banks and passports; 0 where vLLM does not count it (CPU)."""
    return getattr(worker.model_runner, "model_memory_usage", 0)


def make_lora(base: Path, out: Path, r: int) -> Path:
    """A random PEFT LoRA on all linears of a backbone."""
    from safetensors.torch import save_file
    from vllm_adafuse.backbone import Backbone

    backbone, tensors = Backbone.from_path(str(base)), {}
    for name, (size_in, size_out) in backbone.linears.items():
        for part, shape in (("A", (r, size_in)), ("B", (size_out, r))):
            value = torch.randn(shape) * shape[1] ** -0.5
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = value.bfloat16()
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": r,
        "lora_alpha": 2 * r,
        "target_modules": sorted(backbone.modules()),
        "base_model_name_or_path": str(base),
        "bias": "none",
    }
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def make_adapter(
    base: Path, out: Path, mixture: tuple[int, int, int], routing: str = "pre_gated"
) -> Path:
    """A random adapter of (E, r, k) on all linears of a backbone."""
    experts, r, top_k = mixture
    return make_random_adapter(
        base, out, num_experts=experts, top_k=top_k, r=r, dtype=torch.bfloat16, routing=routing
    )


@dataclass
class Engine:
    """A running engine, and what each of its requests carries."""

    llm: Any
    lora: Any = None


def start(kind: str, options: Options, root: Path) -> tuple[Engine, dict]:
    """One engine of a kind on the shared backbone."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    extra, lora, name = {}, None, kind.replace("/", "-").replace(":", "-")
    if mixture := options.mixture(kind):
        routing = OURS[kind.partition(":")[0]]
        adapter = make_adapter(root / "base", root / name, mixture, routing)
        extra["hf_overrides"] = {"adafuse_adapter": str(adapter)}
    if kind == "lora":
        lora = LoRARequest("lora", 1, str(make_lora(root / "base", root / name, options.r)))
        extra |= {"enable_lora": True, "max_lora_rank": max(8, options.r), "max_loras": 1}
    longest = max(options.prefill[1] + 8, options.prompt + options.steps[1] + 8)
    begin = time.perf_counter()
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # for the function below
    llm = LLM(
        str(root / "base"),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=options.dtype,
        gpu_memory_utilization=options.memory,
        max_model_len=longest,
        max_num_seqs=max(options.batches),
        enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": sorted(set(options.batches))},
        **extra,
    )
    seconds = time.perf_counter() - begin
    loaded = llm.collective_rpc(_loaded_bytes)[0]
    return Engine(llm, lora), {"start_s": seconds, "model_bytes": int(loaded)}


def timed(
    engine: Engine, count: int, length: int, tokens: int, vocab: int, rng: random.Random
) -> float:
    """Seconds for `count` random prompts of `length` ids, `tokens` tokens each."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [
        {"prompt_token_ids": [rng.randrange(3, vocab) for _ in range(length)]} for _ in range(count)
    ]
    begin = time.perf_counter()
    engine.llm.generate(prompts, params, use_tqdm=False, lora_request=engine.lora)
    return time.perf_counter() - begin


def measure(options: Options) -> list[dict]:
    """Runs every engine in turn at every size; one row per engine and size."""
    vocab, rng = SHAPES[options.model][-1], random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_config(options, root / "base")
        engines, rows = {}, []
        for kind in options.engines:
            engines[kind], figures = start(kind, options, root)
            rows.append({"engine": kind, "what": "start", **figures})
            print(f"start    {kind:8} {figures}", flush=True)
        short, long = options.steps
        sizes = [("decode", batch) for batch in options.batches] + [("prefill", options.prefill[0])]
        for what, batch in sizes:
            times: dict[str, list[float]] = {kind: [] for kind in engines}
            for repeat in range(options.repeats + 1):
                for kind, engine in engines.items():
                    if what == "decode":
                        small = timed(engine, batch, options.prompt, short, vocab, rng)
                        large = timed(engine, batch, options.prompt, long, vocab, rng)
                        value = (large - small) / (long - short) * 1e3
                    else:
                        length = options.prefill[1]
                        value = timed(engine, batch, length, 1, vocab, rng) * 1e3
                    if repeat:  # the first is warm-up
                        times[kind].append(value)
            base = statistics.median(times[options.engines[0]])
            for kind, values in times.items():
                row = {"engine": kind, "what": what, "batch": batch, "unit": "ms"}
                row |= record.summary(values)
                row["overhead"] = row["median"] / base - 1
                rows.append(row)
                print(
                    f"{what:8} {batch:4} {kind:8} {row['median']:9.3f} ms "
                    f"({row['min']:.3f} to {row['max']:.3f}) {row['overhead']:+.1%}",
                    flush=True,
                )
        for engine in engines.values():
            engine.llm.llm_engine.engine_core.shutdown()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama-2-7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer layers, while working")
    parser.add_argument("--engines", default="stock,adafuse", type=lambda t: t.split(","))
    parser.add_argument("--batches", default="1,8,32,128", type=integers)
    parser.add_argument("--prefill", default="16,1000", type=integers, help="prompts, tokens each")
    parser.add_argument("--prompt", default=128, type=int, help="tokens before decoding")
    parser.add_argument("--steps", default="8,136", type=integers, help="short and long generation")
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--experts", default=8, type=int)
    parser.add_argument("--top-k", default=2, type=int)
    parser.add_argument("--r", default=16, type=int)
    parser.add_argument("--memory", default=0.4, type=float)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default="", help="of the measured code")
    arguments = vars(parser.parse_args())
    out, commit = arguments.pop("out"), arguments.pop("commit")
    # vLLM forks this process: a pool of threads would hang in the copy.
    torch.set_num_threads(1)
    options = Options(**arguments)
    rows = measure(options)
    path = record.save("engine", [{"options": vars(options)}, *rows], out, commit)
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
