"""`vllm serve` under load, the bare backbone against ours: latency and throughput by request rate.

    python -m benchmarks.serve --model llama-2-7b --rates 1,4,16,inf --num-prompts 200

Random weights, random prompts, greedy, vLLM's own `vllm bench serve` as the client. The servers run
one after the other on the same GPU. `inf` sends all requests at once: the throughput at saturation.
Nothing is asked of a hub: the tokenizer has a word for every id.

    python -m benchmarks.serve --model llama-3-8b --engines stock,loras:1,loras:8,loras:32,mixtures:4

Many adapters: `loras:N` and `mixtures:N` are a server of ours with N of them, `vllm:N` vLLM's own LoRA
with N LoRAs; each request names one of them, drawn at random.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vllm_adafuse.server import Server, running_server, vllm_serve

from benchmarks import engine, record
from benchmarks.lora import rank

# Of `vllm bench serve`'s result; ms but for the first two, which are per second.
FIGURES = (
    "request_throughput",
    "output_throughput",
    "median_ttft_ms",
    "p99_ttft_ms",
    "median_tpot_ms",
    "p99_tpot_ms",
    "median_itl_ms",
    "p99_itl_ms",
)

MANY = re.compile(r"(loras|mixtures|vllm):([1-9]\d*)")


@dataclass
class Options:
    """What to serve, and the load."""

    model: str = "llama-2-7b"
    layers: int | None = None
    engines: list[str] = field(default_factory=lambda: ["stock", "adafuse"])
    rates: list[str] = field(default_factory=lambda: ["1", "4", "16", "inf"])
    num_prompts: int = 200
    input_len: int = 512
    output_len: int = 128
    experts: int = 8
    top_k: int = 2
    r: int = 16
    dtype: str = "bfloat16"
    memory: float = 0.85

    def __post_init__(self):
        unknown = [
            k for k in self.engines if k not in ("stock", "adafuse") and not MANY.fullmatch(k)
        ]
        if unknown:
            raise ValueError(
                f"engines has {', '.join(unknown)}, expected stock, adafuse, loras:N, mixtures:N or "
                "vllm:N"
            )
        for rate in self.rates:
            if not float(rate) > 0:
                raise ValueError(f"rates has {rate}, expected numbers above 0, or inf")


def save_tokenizer(path: Path, vocab: int) -> None:
    """A tokenizer with a word for every id, so that text has as many words as it has tokens and
    prompts keep the length that was asked for."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Special tokens are found within words, too: those two are in no other. And one is long: vLLM
    # takes no text longer than as many of the longest token as may be, spaces included.
    begin, end = "<begin of text>", "</s>"
    words = {begin: 0, end: 1} | {f"w{i}": i for i in range(2, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=begin))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=end
    ).save_pretrained(path)


def names_of(kind: str, root: Path) -> list[str]:
    """The adapters that requests of an engine name; makes those that are not there under `root`,
    as copies of the first of their kind."""
    if (many := MANY.fullmatch(kind)) is None:
        return []
    first = "mixture" if many[1] == "mixtures" else "lora"
    names = [f"{first}{i}" for i in range(int(many[2]))]
    for name in names:
        if not (root / name).exists():
            shutil.copytree(root / first, root / name, copy_function=os.link)
    return names


def many_options(kind: str, names: list[str], options: Options, root: Path) -> list[str]:
    """What `vllm serve` is told of the adapters of one engine."""
    ranks = options.experts * options.r if kind.startswith("mixtures") else options.r
    argv = ["--enable-lora", "--max-loras", str(len(names)), "--max-lora-rank", str(rank(ranks))]
    if kind.startswith("vllm"):
        argv += ["--additional-config", json.dumps(engine.VLLM_LORA)]
    return [*argv, "--lora-modules", *(f"{name}={root / name}" for name in names)]


def command(kind: str, options: Options, root: Path) -> list[str]:
    """The `vllm serve` command of one engine."""
    longest = options.input_len + options.output_len + 16
    argv = ["--load-format", "dummy", "--dtype", options.dtype, "--max-model-len", str(longest)]
    argv += ["--gpu-memory-utilization", str(options.memory), "--no-enable-prefix-caching"]
    if kind == "adafuse":
        overrides = {"adafuse_adapter": str(root / "adapter")}
        argv += ["--hf-overrides", json.dumps(overrides)]
    if names := names_of(kind, root):
        argv += many_options(kind, names, options, root)
    return vllm_serve(root / "base", *argv)


def load(
    server: Server, rate: str, options: Options, root: Path, seed: int, names: list[str]
) -> dict:
    """One run of `vllm bench serve`; its figures.

    Args:
        server: of `command`.
        rate: requests per second.
        options: the load.
        root: for the result.
        seed: of the prompts.
        names: the adapters that requests name, empty for the backbone.

    Raises:
        RuntimeError: the client failed, or a request did.
    """
    result = root / f"result-{rate}.json"
    result.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve"]
    argv += ["--backend", "openai", "--base-url", server.url, "--model", str(root / "base")]
    argv += ["--dataset-name", "random", "--ignore-eos", "--seed", str(seed)]
    argv += ["--temperature", "0"]
    argv += ["--random-input-len", str(options.input_len)]
    argv += ["--random-output-len", str(options.output_len)]
    argv += ["--num-prompts", str(options.num_prompts), "--request-rate", rate]
    argv += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"]
    argv += ["--save-result", "--result-dir", str(root), "--result-filename", result.name]
    if names:
        argv += ["--lora-modules", *names, "--lora-assignment", "random"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode or not result.is_file():
        raise RuntimeError(f"vllm bench serve failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    content = json.loads(result.read_text())
    if content["completed"] != options.num_prompts:
        raise RuntimeError(f"{content['completed']} of {options.num_prompts} requests completed")
    asked = options.num_prompts * options.input_len, options.num_prompts * options.output_len
    found = content["total_input_tokens"], content["total_output_tokens"]
    if found != asked:
        raise RuntimeError(f"{found} tokens in and out, expected {asked}")
    return {name: content[name] for name in FIGURES}


def measure(options: Options, logs: Path) -> Iterator[dict]:
    """A row for each engine and rate."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        engine.write_config(options, root / "base")
        save_tokenizer(root / "base", engine.SHAPES[options.model][-1])
        mixture = (options.experts, options.r, options.top_k)
        if "adafuse" in options.engines:
            engine.make_adapter(root / "base", root / "adapter", mixture)
        if any(kind.startswith("mixtures") for kind in options.engines):
            engine.make_adapter(root / "base", root / "mixture", mixture)
        if any(kind.startswith(("loras", "vllm")) for kind in options.engines):
            engine.make_lora(root / "base", root / "lora", options.r)
        for kind in options.engines:
            log = logs / f"serve-{kind.replace(':', '-')}.log"
            with running_server(command(kind, options, root), log, timeout=600) as server:
                names = names_of(kind, root)
                load(server, "inf", options, root, 1, names)  # warm-up
                for rate in options.rates:
                    figures = load(server, rate, options, root, 0, names)
                    row = {"engine": kind, "rate": rate} | figures
                    print(
                        f"{kind:12} {rate:>5}/s: {row['output_throughput']:9.1f} tokens/s, TTFT "
                        f"{row['median_ttft_ms']:7.1f} ms (p99 {row['p99_ttft_ms']:.1f}), TPOT "
                        f"{row['median_tpot_ms']:6.2f} ms (p99 {row['p99_tpot_ms']:.2f})",
                        flush=True,
                    )
                    yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Options()
    add = parser.add_argument
    add("--model", default=defaults.model, choices=engine.SHAPES)
    add("--layers", type=int, help="fewer layers, while working")
    add("--engines", default=defaults.engines, type=lambda t: t.split(","))
    add("--rates", default=defaults.rates, type=lambda t: t.split(","), help="requests per second")
    add("--num-prompts", default=defaults.num_prompts, type=int)
    add("--input-len", default=defaults.input_len, type=int)
    add("--output-len", default=defaults.output_len, type=int)
    add("--experts", default=defaults.experts, type=int)
    add("--top-k", default=defaults.top_k, type=int)
    add("--r", default=defaults.r, type=int)
    add("--dtype", default=defaults.dtype)
    add("--memory", default=defaults.memory, type=float)
    add("--out", type=Path, help="folder of the result file and the servers' logs")
    add("--commit", default="", help="of the measured code")
    arguments = vars(parser.parse_args())
    out, commit = arguments.pop("out"), arguments.pop("commit")
    options = Options(**arguments)
    logs = out or Path(tempfile.mkdtemp())
    logs.mkdir(parents=True, exist_ok=True)
    rows, path = [{"options": vars(options)}], None
    for row in measure(options, logs):
        rows.append(row)
        path = record.save("serve", rows, out, commit, path)
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
