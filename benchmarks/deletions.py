"""What would be lost without `ordered_expand` (and `order_routes`), and without `layer_expand`.

    python -m benchmarks.deletions

Random weights of bfloat16, shapes of Llama-2-7B and Llama-3-8B (Mistral-7B's are the same).

Rows `long`: qkv and gate_up in the steps that are put into order today, on Hopper: from 8192 tokens
on, mixtures that `wide_expand` refuses. `ordered` beside `expand`, which would run without it, and
`wide`: `dense_expand` and `wide_expand`, were they let. Each is the way from the product's result
to the projection's. `product`: the vendor's, once for both. `order`: `order_routes`, once a step.

Rows `short`: projections that are routed in their layers, from x on: `layer_expand` beside
`route_layer` and `expand`. `product`: the part of both that is the same.

Everything runs from CUDA graphs. Compiles with all cores first. About a minute on one H200.
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
import torch.nn.functional as F
from vllm_adafuse.kernels.dense_expand import dense_expand_triton
from vllm_adafuse.kernels.dispatch import experts_at_once, layer_expands
from vllm_adafuse.kernels.expand import expand_raw_triton, expand_weighted_triton
from vllm_adafuse.kernels.launch import compile_only
from vllm_adafuse.kernels.layer_expand import layer_expand_triton
from vllm_adafuse.kernels.order_routes import ORDER_TILE, Order, _order_torch, _order_triton
from vllm_adafuse.kernels.ordered_expand import ordered_expand_triton
from vllm_adafuse.kernels.pairs import is_gate_up
from vllm_adafuse.kernels.registry import matmul_f32
from vllm_adafuse.kernels.route_layer import LayerGate, route_layer_triton
from vllm_adafuse.kernels.spread_routes import list_present, new_present
from vllm_adafuse.kernels.wide_expand import wide_expand_triton
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
    long: list[int] = field(default_factory=lambda: [8192, 16384])
    long_mixtures: list[tuple[int, int, int]] = field(
        default_factory=lambda: [(64, 32, 2), (32, 64, 2), (64, 32, 8), (32, 8, 2), (64, 8, 2)]
    )
    short: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32, 64])
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


def long_cases(
    p: Product, mixture: tuple[int, int, int], tokens: int, options: Options
) -> dict[str, Callable[[], object]]:
    """The ways from a product's result on, each to be run by itself."""
    (experts, rank, top_k), out = mixture, sum(p.widths)
    count, device = len(p.widths), options.device
    joint = normal(options, out + count * experts * rank, p.size_in, scale=p.size_in**-0.5)
    x, b = normal(options, tokens, p.size_in), normal(options, out, experts, rank, scale=rank**-0.5)
    ids = torch.rand(tokens, experts, device=device).argsort(1)[:, :top_k].int()
    gates = torch.zeros(tokens, experts, device=device)
    gates.scatter_(1, ids.long(), 1 / top_k)
    present = new_present(experts, torch.device(device))
    list_present(gates.any(0), present)
    order = Order(
        torch.zeros(tokens, dtype=torch.int32, device=device),
        torch.zeros(-(-tokens // ORDER_TILE), dtype=torch.int64, device=device),
    )
    ordering = _order_triton if device == "cuda" else _order_torch
    ordering(ids, *order, tokens, experts)
    cos_sin = normal(options, tokens, p.head_dim) if p.head_dim else None
    first = experts_at_once(experts, rank)
    both = F.linear(x, joint)
    of_product = both.split((out, joint.shape[0] - out), 1)
    parts = list(range(count))
    behind = {"cos_sin": cos_sin, "in_place": False}

    def ordered():
        y, s = of_product
        return ordered_expand_triton(y, s, b, gates, order, p.widths, p.activation, **behind)

    def expand():
        y, s = of_product
        shared = b, gates, present, parts, p.widths, p.activation
        return expand_raw_triton(y, s, None, *shared, **behind)

    def wide():
        y, s = of_product
        if first < experts:
            dense_expand_triton(y, s, b, gates, parts, p.widths, first)
        return wide_expand_triton(y, s, b, gates, p.widths, p.activation, **behind)

    def again():
        torch.mm(x, joint.t(), out=both)

    return {
        "ordered": ordered, "expand": expand, "wide": wide,
        "product": lambda: F.linear(x, joint),
        "order": lambda: ordering(ids, *order, tokens, experts), "again": again,
    }  # fmt: skip


def apart(cases: dict[str, Callable]) -> dict[str, float]:
    """How far other ways end from `ordered`, of what that is on average."""
    results = {}
    for name in ("ordered", "expand", "wide"):
        if name in cases:
            cases["again"]()
            results[name] = cases[name]().float()
    expected = results.pop("ordered")
    return {
        name: float((y - expected).abs().max() / expected.abs().mean())
        for name, y in results.items()
    }


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
            expand_weighted_triton(
                both[:, :out], s, None, b, present, parts, p.widths, activation
            )

    def product():
        for joint, _ in layers:
            matmul_f32(x, joint.t())

    if not layer_expands(tokens, *layers[0][1].shape[1:]):
        return {"two": two, "product": product}
    return {"one": one, "two": two, "product": product}


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


def of_long(options: Options) -> Iterator[tuple]:
    """model, projection, mixture, tokens of each row; before a norm no step is put into order."""
    for model, mixture in itertools.product(options.models, options.long_mixtures):
        for p, tokens in itertools.product(products(model), options.long):
            if p.name in ("qkv", "gate_up"):
                yield model, p, mixture, tokens


def of_short(options: Options) -> Iterator[tuple]:
    for model, mixture in itertools.product(options.models, options.short_mixtures):
        for p, tokens in itertools.product(products(model), options.short):
            yield model, p, mixture, tokens


def compile_all(options: Options) -> None:
    """All that is known to compile; `wide` is not let have fewer than 16 ranks."""
    with compile_only():
        for make, rows in ((long_cases, of_long), (short_cases, of_short)):
            for _, p, mixture, tokens in rows(options):
                for name, run in make(p, mixture, tokens, options).items():
                    if name != "wide" or mixture[1] >= 16:
                        run()


def measure_long(options: Options) -> Iterator[dict]:
    for model, p, mixture, tokens in of_long(options):
        cases = long_cases(p, mixture, tokens, options)
        row = {"what": "long", "model": model, "mixture": mixture, "tokens": tokens}
        row["projection"] = p.name
        try:
            cases["wide"]()
        except Exception as e:  # of ranks that it is not let have
            row["wide_fails"] = f"{type(e).__name__}: {e}"[:200]
            del cases["wide"]
        row["apart"] = apart(cases)
        again = cases.pop("again")
        for name, run in cases.items():
            again()
            row[name] = timed(run, 1, options)
        yield row


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
    first, *others = (figures[k]["median"] for k in ("ordered", "expand", "wide", "one", "two")
                      if k in figures)  # fmt: skip
    better = f"  best other {min(others) - first:+8.2f} us" if others else ""
    mixture = "/".join(map(str, row["mixture"]))
    near = "".join(f"  {name} is apart {v:.3f}" for name, v in row.get("apart", {}).items())
    near += f"  {row['wide_fails']}" if "wide_fails" in row else ""
    return (
        f"{row['what']:5} {row['model']:10} {mixture:8} {row['tokens']:5} {row['projection']:7} "
        f"{text}{better}{near}"
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
        options = Options(
            ["tiny"], [70], [(8, 16, 2), (8, 32, 2), (5, 8, 1)], [1, 5], [(4, 8, 2)], 1,
            arguments.device,
        )  # fmt: skip
    rows, begin = [{"options": vars(options)}], time.perf_counter()
    if options.device == "cuda":
        compile_all(options)
        print(f"compiled: {time.perf_counter() - begin:.0f} s", flush=True)
    for measure in (measure_long, measure_short):
        for row in measure(options):
            rows.append(row)
            print(shown(row), flush=True)
    print(f"{time.perf_counter() - begin:.0f} s")
    path = record.save("deletions", rows, arguments.out or Path("/tmp"), arguments.commit)
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
