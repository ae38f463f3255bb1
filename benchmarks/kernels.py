"""Adapted projections beside the bare ones, at the shapes of real models.

    python -m benchmarks.kernels --models llama-2-7b,mistral-7b --tokens 1,8,32,128,1024

Each row: the projection with its experts, with pages for them in a step without adapters
(`without`), the cuBLAS GEMM of the bare one, and the time to move the bytes at this device's
measured copy bandwidth; what follows belongs to all of them, for the bare one by torch.compile:
qkv's rotary embedding, gate_up's activation, residual and RMSNorm behind o and down. The row
`layer` is all four in a chain. Everything runs from CUDA graphs over weights that are larger than
the cache together.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from vllm_adafuse.cli.cmd_random import integers
from vllm_adafuse.kernels.page_projection import page_projection, page_projection_norm
from vllm_adafuse.kernels.plans import Shape
from vllm_adafuse.kernels.projection import projection, projection_torch
from vllm_adafuse.kernels.projection_norm import projection_norm
from vllm_adafuse.tuning import Product, Trial, time_us

from benchmarks import record
from benchmarks.engine import SHAPES

EPS = 1e-5
LARGE = 4096  # tokens from which one copy of the weights is enough


@dataclass
class Options:
    """What to measure."""

    models: list[str] = field(default_factory=lambda: ["llama-2-7b"])
    tokens: list[int] = field(default_factory=lambda: [1, 8, 32, 64, 128, 256, 1024, 8192])
    experts: int = 8
    top_k: int = 2
    active: int | None = None
    r: int = 16
    repeats: int = 9
    dtype: str = "bfloat16"


def products(model: str, options: Any) -> list[Product]:
    """Of a model's layer, with an adapter; options: `experts`, `r` and `dtype` of these."""
    _, hidden, inter, _, heads, kv_heads, _ = SHAPES[model]
    kv, itemsize = hidden // heads * kv_heads, getattr(torch, options.dtype).itemsize

    def product(name: str, size_in: int, widths: tuple, epilogue: str, head: int = 0) -> Product:
        linears, mixture = tuple(range(len(widths))), (options.experts, options.r)
        return Product(name, Shape(size_in, widths, linears, *mixture, itemsize, epilogue, head))

    return [
        product("qkv", hidden, (hidden, kv, kv), "rotary", hidden // heads),
        product("o", hidden, (hidden,), "norm"),
        product("gate_up", hidden, (inter, inter), "silu"),
        product("down", inter, (hidden,), "norm"),
    ]


def copy_bandwidth() -> float:
    """Bytes per second read and written by a kernel that copies (the copy engine is slower)."""
    a = torch.empty(1 << 30, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    us = statistics.median(time_us(lambda: torch.mul(a, 1.0, out=b), 1, 5))
    return 2 * a.nbytes / us * 1e6


def compiled(function: Callable) -> Callable:
    """By torch.compile: one graph for all numbers of tokens, since compiling anew for each would
    take longer than all measurements; of one width, as a width not known costs divisions."""
    torch._dynamo.config.recompile_limit = 64  # models times sizes
    compiles = torch.compile(function, dynamic=False)

    @functools.wraps(function)
    def call(y, *others):
        for tensor in (y, *others):
            if 1 < len(y) == len(tensor):
                torch._dynamo.mark_dynamic(tensor, 0)
        return compiles(y, *others)

    return call


@compiled
def turn(q_and_k, cos_sin):  # into a new tensor, as vLLM's compiled models do it
    cos, sin = cos_sin[:, None].chunk(2, -1)
    a, b = q_and_k.unflatten(1, (-1, cos_sin.shape[1])).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@compiled
def activate(y):
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


@compiled
def norm(y, residual, factors):
    z = y.float() + residual.float()
    wide = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS)
    return wide.to(y.dtype) * factors, z.to(y.dtype)


class Case:
    """A projection at one number of tokens, with random weights: ours, ours in a step without
    adapters, the bare one, plain torch.

    Each of them runs one copy of the weights, with what follows the projection.
    """

    def __init__(self, p: Product, tokens: int, options: Options, copies: int | None):
        dtype = getattr(torch, options.dtype)
        self.p, self.out = p, p.shape.size_out
        self.trial = Trial(p, options.top_k, dtype, copies, tokens=tokens)
        self.x, self.step = self.trial.step(tokens, options.active)
        self.gates = self.step.gates
        self.parts = list(range(len(p.shape.widths)))
        self.normed = p.shape.epilogue == "norm"
        residual, factors = (torch.randn(n, self.out, device="cuda") for n in (tokens, 1))
        self.residual, self.factors = residual.to(dtype), factors[0].to(dtype)

    def ours(self, i: int) -> None:
        p = self.trial.layers[i]
        if self.normed:
            projection_norm(self.x, self.residual, p, self.step)
        else:
            projection(self.x, p, self.step)

    def without(self, i: int) -> None:
        p = self.trial.layers[i]
        if self.normed:
            page_projection_norm(self.x, self.residual, p, self.step, False)
        else:
            page_projection(self.x, p, self.step, False)

    def bare(self, i: int) -> None:
        y = F.linear(self.x, self.trial.layers[i].weight)
        self._follow(y, "" if self.normed else self.p.shape.epilogue)

    def torch(self, i: int) -> None:
        y = projection_torch(self.x, self.trial.layers[i], self.step)
        self._follow(y, "")

    def _follow(self, y: torch.Tensor, epilogue: str) -> None:
        if epilogue == "rotary":
            q, k, _ = self.p.shape.widths
            turn(y[:, : q + k], self.trial.cos_sin[: len(y)])
        elif epilogue:
            activate(y)
        elif self.normed:
            norm(y, self.residual, self.factors)

    def moved(self, options: Options) -> int:
        """Bytes: W, the active experts, x and the result."""
        used, p = int(self.gates.any(0).sum()), self.p.shape
        wide = p.widths[0] if self.p.name == "gate_up" else self.out
        experts = used * options.r * (len(self.parts) * p.size_in + self.out)
        elements = self.out * p.size_in + experts + len(self.x) * (p.size_in + wide)
        return elements * self.x.element_size()


def measure_one(name: str, cases: list[Case], options: Options, bandwidth: float) -> dict:
    """A row: the cases one after the other, on every copy of their weights."""
    copies = len(cases[0].trial.layers)

    def run(kind: str) -> None:
        for case in cases:
            case.trial.semaphores.zero_()
        for i in range(copies):
            for case in cases:
                getattr(case, kind)(i)

    row = {"projection": name, "tokens": len(cases[0].x), "unit": "us"}
    for kind in ("bare", "ours", "without", "torch"):
        times = time_us(functools.partial(run, kind), copies, options.repeats)
        row[kind] = record.summary(times)
    moved, median = sum(case.moved(options) for case in cases), row["ours"]["median"]
    row |= {"floor": moved / bandwidth * 1e6, "tb_s": moved / median / 1e6}
    row["overhead"] = median / row["bare"]["median"] - 1
    return row


def measure(model: str, tokens: int, options: Options, bandwidth: float) -> Iterator[dict]:
    """The four projections of a layer, then all in a chain, where launches can overlap."""
    copies = 1 if tokens >= LARGE else None
    for p in products(model, options):
        yield measure_one(p.name, [Case(p, tokens, options, copies)], options, bandwidth)
    copies = 1 if tokens >= LARGE else 2
    cases = [Case(p, tokens, options, copies) for p in products(model, options)]
    yield measure_one("layer", cases, options, bandwidth)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Options()

    parser.add_argument("--models", default=defaults.models, type=lambda t: t.split(","))
    parser.add_argument("--tokens", default=defaults.tokens, type=integers)
    parser.add_argument("--experts", default=defaults.experts, type=int)
    parser.add_argument("--top-k", default=defaults.top_k, type=int)
    parser.add_argument("--active", type=int, help="tokens choose among so many experts")
    parser.add_argument("--r", default=defaults.r, type=int)
    parser.add_argument("--repeats", default=defaults.repeats, type=int)
    parser.add_argument("--dtype", default=defaults.dtype)
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default="", help="of the measured code")
    arguments = vars(parser.parse_args())
    out, commit = arguments.pop("out"), arguments.pop("commit")
    options = Options(**arguments)
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows, path = [{"options": vars(options), "copy_bytes_per_s": bandwidth}], None
    for model in options.models:
        for tokens in options.tokens:
            for row in measure(model, tokens, options, bandwidth):
                rows.append({"model": model} | row)
                print(
                    f"{model:14} {tokens:5} {row['projection']:8} "
                    f"bare {row['bare']['median']:8.1f}  "
                    f"ours {row['ours']['median']:8.1f} {row['overhead']:+6.1%}  without "
                    f"{row['without']['median']:8.1f}  torch "
                    f"{row['torch']['median']:8.1f}  floor {row['floor']:7.1f} us  "
                    f"{row['tb_s']:.2f} TB/s",
                    flush=True,
                )
            path = record.save("kernels", rows, out, commit, path)
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
