"""`vllm serve` under load, the bare backbone against ours: latency and throughput by request rate.

    python -m benchmarks.serve --model llama-2-7b --rates 1,4,16,inf --num-prompts 200

Random weights, random prompts, greedy, vLLM's own `vllm bench serve` as the client, in this process:
its imports are paid once. `inf` sends all requests at once: the throughput at saturation. Nothing is
asked of a hub: the tokenizer has a word for every id.

Servers start all at once on one GPU, as many as it holds (`--group`), and take turns at each rate:
one is loaded while the others rest, `--repeats` times; a figure is the median.

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
import signal
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_adafuse.server import Server, started_server, vllm_serve, wait_until_healthy

from benchmarks import engine, record
from benchmarks.engine_options import SHAPES, cache_needs
from benchmarks.lora import rank
from benchmarks.phases import imported, phase

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

# GiB of an engine beside its weights and its cache: adapters, a step, graphs, libraries.
BESIDE = 7.0
START_S = 600  # that servers may take

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
    memory: float = 0.9
    group: int | None = None
    repeats: int = 3

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
        for name in ("group", "repeats"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")

    @property
    def cache_gib(self) -> float:
        """Keys and values of all requests at once, and some to spare."""
        sizes = {"batches": [self.num_prompts], "prompt": self.input_len, "prefill": []}
        (need,) = cache_needs(vars(self) | sizes | {"steps": (1, self.output_len)}).values()
        return round(need * 1.1 + 0.5, 1)

    @property
    def engine_gib(self) -> float:
        """What an engine takes of a device, roughly."""
        _, hidden, inter, layers, heads, kv_heads, vocab = SHAPES[self.model]
        of_layer = hidden * (2 * hidden + 2 * kv_heads * (hidden // heads) + 3 * inter)
        weights = (self.layers or layers) * of_layer + 2 * vocab * hidden
        width = 4 if self.dtype in ("float", "float32") else 2  # bytes
        return weights * width / (1 << 30) + self.cache_gib + BESIDE

    def groups(self, device_bytes: int | None) -> list[list[str]]:
        """Engines that run at the same time, on a device of so many bytes; None: of any size."""
        size = self.group or len(self.engines)
        if self.group is None and device_bytes is not None:
            size = max(1, int(self.memory * device_bytes / (1 << 30) / self.engine_gib))
        return [self.engines[at : at + size] for at in range(0, len(self.engines), size)]


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
    # The share is what must be free, and no more is asked of it.
    argv += ["--gpu-memory-utilization", "0.05", "--no-enable-prefix-caching"]
    argv += ["--kv-cache-memory-bytes", str(int(options.cache_gib * (1 << 30)))]
    if kind == "adafuse":
        overrides = {"adafuse_adapter": str(root / "adapter")}
        argv += ["--hf-overrides", json.dumps(overrides)]
    if names := names_of(kind, root):
        argv += many_options(kind, names, options, root)
    return vllm_serve(root / "base", *argv)


def bench_serve(argv: Sequence[str], log: Path) -> dict[str, Any]:
    """One run of `vllm bench serve`; its result, as it would save it.

    Args:
        argv: its arguments.
        log: the file that takes what it prints, behind what there is.

    Raises:
        RuntimeError: it failed.
    """
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    with log.open("a") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            return main(parser.parse_args(argv))
        except (Exception, SystemExit) as e:
            raise RuntimeError(f"vllm bench serve failed: {e!r}; {log} has what it printed") from e


def load(
    server: Server, rate: str, options: Options, root: Path, seed: int, names: list[str]
) -> dict[str, float]:
    """One run of `vllm bench serve`; its figures.

    Args:
        server: of `command`.
        rate: requests per second.
        options: the load.
        root: has the backbone.
        seed: of the prompts.
        names: the adapters that requests name, empty for the backbone.

    Raises:
        RuntimeError: the client failed, or a request did.
    """
    argv = ["--backend", "openai", "--base-url", server.url, "--model", str(root / "base")]
    argv += ["--dataset-name", "random", "--ignore-eos", "--seed", str(seed)]
    argv += ["--temperature", "0", "--disable-tqdm"]
    argv += ["--random-input-len", str(options.input_len)]
    argv += ["--random-output-len", str(options.output_len)]
    argv += ["--num-prompts", str(options.num_prompts), "--request-rate", rate]
    argv += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"]
    if names:
        argv += ["--lora-modules", *names, "--lora-assignment", "random"]
    content = bench_serve(argv, server.log.with_suffix(".client.log"))
    if content["completed"] != options.num_prompts:
        raise RuntimeError(f"{content['completed']} of {options.num_prompts} requests completed")
    asked = options.num_prompts * options.input_len, options.num_prompts * options.output_len
    found = content["total_input_tokens"], content["total_output_tokens"]
    if found != asked:
        raise RuntimeError(f"{found} tokens in and out, expected {asked}")
    return {name: float(content[name]) for name in FIGURES}


@contextmanager
def running(commands: Mapping[str, list[str]], logs: Path) -> Iterator[dict[str, Server]]:
    """The healthy servers of commands, started at once; all are told to end before any is waited for.

    Raises:
        ServerError: one of them does not start.
    """
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        try:
            with phase("servers start"):
                for kind, argv in commands.items():
                    log = logs / f"serve-{kind.replace(':', '-')}.log"
                    servers[kind] = stack.enter_context(started_server(argv, log))
                for server in servers.values():
                    wait_until_healthy(server, START_S)
            yield servers
        finally:
            for server in servers.values():
                server.process.send_signal(signal.SIGINT)


def device_bytes() -> int | None:
    """The memory of this machine's GPU; None where there is none. Makes no context on it."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return None
    return current_platform.get_device_total_memory()


def measure(options: Options, logs: Path) -> Iterator[dict]:
    """A row for each engine and rate."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        with phase("adapters are made"):
            make(options, root)
        for group in options.groups(device_bytes()):
            commands = {kind: command(kind, options, root) for kind in group}
            with running(commands, logs) as servers:
                names = {kind: names_of(kind, root) for kind in group}
                with phase("warm-up"):
                    for kind, server in servers.items():
                        load(server, "inf", options, root, 1, names[kind])
                for rate in options.rates:
                    with phase(f"rate {rate}"):
                        rows = take_turns(servers, rate, options, root, names)
                    yield from rows


def make(options: Options, root: Path) -> None:
    """Writes the backbone, and the adapters that engines have, under `root`."""
    engine.write_config(options, root / "base")
    save_tokenizer(root / "base", SHAPES[options.model][-1])
    mixture = (options.experts, options.r, options.top_k)
    if "adafuse" in options.engines:
        engine.make_adapter(root / "base", root / "adapter", mixture)
    if any(kind.startswith("mixtures") for kind in options.engines):
        engine.make_adapter(root / "base", root / "mixture", mixture)
    if any(kind.startswith(("loras", "vllm")) for kind in options.engines):
        engine.make_lora(root / "base", root / "lora", options.r)


def take_turns(
    servers: Mapping[str, Server], rate: str, options: Options, root: Path,
    names: Mapping[str, list[str]],
) -> list[dict]:  # fmt: skip
    """A row for each server: medians of its turns at a rate, and the throughput of each turn."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in servers}
    for _ in range(options.repeats):
        for kind, server in servers.items():
            found[kind].append(load(server, rate, options, root, 0, names[kind]))
    rows = []
    for kind, turns in found.items():
        row: dict[str, Any] = {"engine": kind, "rate": rate}
        row |= {name: statistics.median(turn[name] for turn in turns) for name in FIGURES}
        row["all"] = [turn["output_throughput"] for turn in turns]
        print(
            f"{kind:12} {rate:>5}/s: {row['output_throughput']:9.1f} tokens/s "
            f"({min(row['all']):.1f} to {max(row['all']):.1f}), TTFT "
            f"{row['median_ttft_ms']:7.1f} ms (p99 {row['p99_ttft_ms']:.1f}), TPOT "
            f"{row['median_tpot_ms']:6.2f} ms (p99 {row['p99_tpot_ms']:.2f})",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Options()
    add = parser.add_argument
    add("--model", default=defaults.model, choices=SHAPES)
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
    add("--memory", default=defaults.memory, type=float,
        help="of the GPU, for all servers that run at the same time")  # fmt: skip
    add("--group", type=int, help="servers at the same time; default as many as the GPU holds")
    add("--repeats", default=defaults.repeats, type=int, help="turns of each server at a rate")
    add("--out", type=Path, help="folder of the result file and the servers' logs")
    add("--commit", default="", help="of the measured code")
    arguments = vars(parser.parse_args())
    out, commit = arguments.pop("out"), arguments.pop("commit")
    options = Options(**arguments)
    imported()
    logs = out or Path(tempfile.mkdtemp())
    logs.mkdir(parents=True, exist_ok=True)
    rows, path = [{"options": vars(options)}], None
    for row in measure(options, logs):
        rows.append(row)
        path = record.save("serve", rows, out, commit, path)
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
