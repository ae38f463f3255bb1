"""Projections that are routed inside their layer beside the bare ones, at shapes of real models.

    python -m benchmarks.layerwise --models llama-2-7b --tokens 1,8,32,64,128,256,1024

Each row: the cuBLAS GEMM of the bare projection with what follows gate_up; the joined form
(`layer_linear`); the form over a quantised projection, with the bare one in its place
(`low_product` and `layer_sgmm`); and of the joined form the product alone. Every linear has a
router of its own.
Everything runs from CUDA graphs over weights that are larger than the cache together.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from vllm_adafuse.cli.cmd_random import integers
from vllm_adafuse.kernels.layerwise.linear import layer_linear
from vllm_adafuse.kernels.layerwise.low_product import low_product
from vllm_adafuse.kernels.layerwise.operands import LayerGate, LayerGates, LayerProjection
from vllm_adafuse.kernels.layerwise.sgmm import layer_sgmm
from vllm_adafuse.kernels.registry import matmul_f32
from vllm_adafuse.tuning import Product, time_us

from benchmarks import record
from benchmarks.kernels import products

# Bytes of weights that one run of a graph reads, more than any cache holds.
READ = 400 << 20
# docs/benchmarks.md has no section for these yet, so they lie apart.
FOLDER = record.RESULTS / "layerwise"


@dataclass
class Options:
    """What to measure."""

    models: list[str] = field(default_factory=lambda: ["llama-2-7b"])
    tokens: list[int] = field(default_factory=lambda: [1, 8, 32, 64, 128, 256, 1024])
    experts: int = 8
    top_k: int = 2
    r: int = 16
    splits: int = 1
    repeats: int = 9
    dtype: str = "bfloat16"


class Layers:
    """Copies of one projection with random weights, and a step's input and gates; every linear has
    a router of its own.

    Args:
        p: the projection.
        tokens: of the step.
        options: `experts`, `top_k`, `r`, `splits` and `dtype` of these.
        device: where.
    """

    def __init__(self, p: Product, tokens: int, options: Any, device: str = "cuda"):
        s, e, count = p.shape, options.experts, len(p.shape.widths)
        self.dtype, self.device, self.out = getattr(torch, options.dtype), device, s.size_out
        self.columns, self.logits = count * e * options.r, options.splits * count * e
        self.activation = s.epilogue if s.epilogue == "silu" else ""
        rows = -(-(self.out + self.columns + self.logits) // 16) * 16
        copies = max(1, -(-READ // (rows * s.size_in * self.dtype.itemsize)))
        rule = LayerGate(options.top_k, (e,) * count)
        scales, bias = torch.ones(e, device=device), torch.zeros(count, e, device=device)
        self.layers = [
            LayerProjection(
                rule, s.widths, tuple(range(count)), scales, self.normal(self.out, e, options.r),
                bias, self.logits, self.normal(rows, s.size_in, scale=s.size_in**-0.5),
                epilogue=self.activation,
            )
            for _ in range(copies)
        ]  # fmt: skip
        self.x = self.normal(tokens, s.size_in)
        gates = torch.zeros(tokens, count, e, device=device)
        self.decided = LayerGates(gates, torch.zeros(1, dtype=torch.int64, device=device))

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device) * scale

    def joined(self) -> None:
        for layer in self.layers:
            layer_linear(self.x, layer, self.decided)


def measure_one(p: Product, tokens: int, options: Options) -> dict:
    """Microseconds of each form of one projection."""
    of = Layers(p, tokens, options)
    x, layers, out, columns = of.x, of.layers, of.out, of.columns

    @torch.compile(dynamic=False)
    def act(y: torch.Tensor) -> torch.Tensor:
        first, second = y.chunk(2, -1)
        return F.silu(first) * second

    def bare() -> None:
        for layer in layers:
            y = F.linear(x, layer.fused_weight[:out])
            if of.activation:
                act(y)

    def apart() -> None:
        for layer in layers:
            y = F.linear(x, layer.fused_weight[:out])
            lora_a_out = low_product(x, layer.fused_weight[out : out + columns + of.logits])
            layer_sgmm(y, lora_a_out[:, :columns], lora_a_out[:, columns:], layer, of.decided)
            if of.activation:
                act(y)

    def product() -> None:
        for layer in layers:
            matmul_f32(x, layer.fused_weight.t())

    row = {"projection": p.name, "tokens": tokens, "unit": "us"}
    for function in (bare, of.joined, apart, product):
        times = time_us(function, len(layers), options.repeats)
        row[function.__name__] = record.summary(times)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Options()
    parser.add_argument("--models", default=defaults.models, type=lambda t: t.split(","))
    parser.add_argument("--tokens", default=defaults.tokens, type=integers)
    parser.add_argument("--experts", default=defaults.experts, type=int)
    parser.add_argument("--top-k", default=defaults.top_k, type=int)
    parser.add_argument("--r", default=defaults.r, type=int)
    parser.add_argument("--splits", default=defaults.splits, type=int,
                        help="pieces of a router: 3 for float32 routers, else 1")  # fmt: skip
    parser.add_argument("--repeats", default=defaults.repeats, type=int)
    parser.add_argument("--dtype", default=defaults.dtype)
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default="", help="of the measured code")
    arguments = vars(parser.parse_args())
    out, commit = arguments.pop("out"), arguments.pop("commit")
    options = Options(**arguments)
    rows = [{"options": vars(options)}]
    for model in options.models:
        for tokens in options.tokens:
            for p in products(model, options):
                row = {"model": model} | measure_one(p, tokens, options)
                rows.append(row)
                medians = {k: v["median"] for k, v in row.items() if isinstance(v, dict)}
                shown = "  ".join(f"{name} {value:8.1f}" for name, value in medians.items())
                over = medians["joined"] / medians["bare"] - 1
                print(f"{model:14} {tokens:5} {p.name:8} {shown}  {over:+6.1%}", flush=True)
    print(json.dumps({"saved": str(record.save("layerwise", rows, out or FOLDER, commit))}))


if __name__ == "__main__":
    main()
