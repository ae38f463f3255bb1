"""What would be lost without `layer_expand`.

    python -m benchmarks.deletions

Random weights of bfloat16, shapes of Llama-2-7B and Llama-3-8B (Mistral-7B's are the same).
Projections that are routed in their layers, from x on: `one` is `layer_expand`, `two` are
`route_layer` and `expand`, `dense` the same without asking of each expert whether it is there, as
`expand` does with fewer than 8 tokens. `product`: the part of all that is the same.

Everything runs from CUDA graphs. Compiles with all cores first. Half a minute on one H200.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from vllm_adafuse.kernels import expand
from vllm_adafuse.kernels.expand import expand_weighted_triton
from vllm_adafuse.kernels.launch import compile_only
from vllm_adafuse.kernels.layer_expand import layer_expand_triton
from vllm_adafuse.kernels.pairs import is_gate_up
from vllm_adafuse.kernels.registry import matmul_f32
from vllm_adafuse.kernels.route_layer import LayerGate, route_layer_triton
from vllm_adafuse.tuning import Product, time_us

from benchmarks import record

# hidden, intermediate, heads, KV heads
SHAPES = {"llama-2-7b": (4096, 11008, 32, 32), "llama-3-8b": (4096, 14336, 32, 8)}
SHAPES["tiny"] = (128, 192, 2, 1)
# Bytes of weights that a run of a graph reads, more than any cache holds.
READ = 256 << 20


@dataclass
class Options:
    """What to measure; mixtures are E/r/k."""

    models: list[str] = field(default_factory=lambda: ["llama-2-7b", "llama-3-8b"])
    short: list[int] = field(default_factory=lambda: [1, 2, 4, 6, 8, 16, 32, 64])
    short_mixtures: list[tuple[int, int, int]] = field(default_factory=lambda: [(8, 16, 2)])
    repeats: int = 7
    device: str = "cuda"


def products(model: str) -> list[Product]:
    hidden, inter, heads, kv_heads = SHAPES[model]
    kv = hidden // heads * kv_heads
    return [
        Product("qkv", hidden, (hidden, kv, kv), "rotary", hidden // heads),
        Product("o", hidden, (hidden,)),
        Product("gate_up", hidden, (inter, inter), "silu"),
        Product("down", inter, (hidden,)),
    ]


def normal(options: Options, *shape: int, scale: float = 1.0) -> torch.Tensor:
    # Triton's interpreter does not know bfloat16.
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float16
    return (torch.randn(*shape, device=options.device) * scale).to(dtype)


def short_cases(
    p: Product, mixture: tuple[int, int, int], tokens: int, options: Options
) -> dict[str, Callable[[], object]]:
    """A projection that is routed in its layer, on as many copies as no cache holds."""
    (experts, rank, top_k), out, count = mixture, sum(p.widths), len(p.widths)
    columns, logits = count * experts * rank, 3 * count * experts  # routers of float32
    rows = -(-(out + columns + logits) // 16) * 16
    activation = p.activation if is_gate_up(p.activation) else ""
    copies = copies_of(p, options)
    layers = [
        (normal(options, rows, p.size_in, scale=p.size_in**-0.5),
         normal(options, out, experts, rank))
        for _ in range(copies)
    ]  # fmt: skip
    x, device = normal(options, tokens, p.size_in), options.device
    gate, parts = LayerGate(top_k, (experts,) * count), list(range(count))
    scales = torch.ones(experts, device=device)
    gates = torch.zeros(tokens, count, experts, device=device)
    present = torch.zeros(1, dtype=torch.int64, device=device)

    def one():
        for joint, b in layers:
            both = matmul_f32(x, joint.t())
            layer_expand_triton(
                both, columns, logits, None, None, scales, gates, present, b, parts, p.widths,
                activation, gate,
            )  # fmt: skip

    def two():
        for joint, b in layers:
            both = matmul_f32(x, joint.t())
            low, z = both[:, out : out + columns], both[:, out + columns :][:, :logits]
            s = both.new_empty(tokens, count, experts * rank, dtype=x.dtype)
            route_layer_triton(low, z, None, scales, gates, present, s, gate)
            expand_weighted_triton(both[:, :out], s, None, b, present, parts, p.widths, activation)

    def dense():
        limit, expand.MIN_DENSE_TOKENS = expand.MIN_DENSE_TOKENS, 0
        expand._plan.cache_clear()
        try:
            two()
        finally:
            expand.MIN_DENSE_TOKENS = limit
            expand._plan.cache_clear()

    def product():
        for joint, _ in layers:
            matmul_f32(x, joint.t())

    return {"one": one, "two": two, "dense": dense, "product": product}


def copies_of(p: Product, options: Options) -> int:
    return max(2, READ // (2 * sum(p.widths) * p.size_in)) if options.device == "cuda" else 1


def timed(function: Callable[[], object], calls: int, options: Options) -> dict:
    if options.device == "cuda":
        times = time_us(function, calls, options.repeats)
    else:  # to see that all runs
        begin = time.perf_counter()
        function()
        times = [(time.perf_counter() - begin) * 1e6 / calls]
    ordered = sorted(times)
    quarter = len(times) // 4
    return {
        "median": statistics.median(times), "spread": ordered[-1 - quarter] - ordered[quarter],
        "all": times,
    }  # fmt: skip


def of_short(options: Options) -> Iterator[tuple]:
    for model, mixture in itertools.product(options.models, options.short_mixtures):
        for p, tokens in itertools.product(products(model), options.short):
            yield model, p, mixture, tokens


def compile_all(options: Options) -> None:
    with compile_only():
        for _, p, mixture, tokens in of_short(options):
            for run in short_cases(p, mixture, tokens, options).values():
                run()


def measure_short(options: Options) -> Iterator[dict]:
    for model, p, mixture, tokens in of_short(options):
        row = {"what": "short", "model": model, "mixture": mixture, "tokens": tokens}
        row["projection"] = p.name
        for name, run in short_cases(p, mixture, tokens, options).items():
            row[name] = timed(run, copies_of(p, options), options)
        yield row


def shown(row: dict) -> str:
    figures = {k: v for k, v in row.items() if isinstance(v, dict) and "median" in v}
    text = "  ".join(f"{k} {v['median']:8.2f} ±{v['spread']:5.2f}" for k, v in figures.items())
    first, *others = (figures[k]["median"] for k in ("one", "two", "dense")
                      if k in figures)  # fmt: skip
    better = f"  best other {min(others) - first:+8.2f} us" if others else ""
    mixture = "/".join(map(str, row["mixture"]))
    return (
        f"{row['what']:5} {row['model']:10} {mixture:8} {row['tokens']:5} {row['projection']:7} "
        f"{text}{better}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cpu: tiny shapes, to see that all runs")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default="", help="of the measured code")
    arguments = parser.parse_args()
    options = Options(device=arguments.device)
    if arguments.device != "cuda":
        options = Options(["tiny"], [1, 5], [(4, 8, 2)], 1, arguments.device)
    rows, begin = [{"options": vars(options)}], time.perf_counter()
    if options.device == "cuda":
        compile_all(options)
        print(f"compiled: {time.perf_counter() - begin:.0f} s", flush=True)
    for row in measure_short(options):
        rows.append(row)
        print(shown(row), flush=True)
    print(f"{time.perf_counter() - begin:.0f} s")
    path = record.save("deletions", rows, arguments.out or Path("/tmp"), arguments.commit)
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
