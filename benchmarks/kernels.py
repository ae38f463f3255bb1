"""Adapted projections beside the bare ones, at the shapes of real models.

    python -m benchmarks.kernels --models llama-2-7b,mistral-7b --tokens 1,8,32,128,1024

Each row: the projection with its experts, the vendor's product of the bare one, and the time to
move the bytes at this device's measured copy bandwidth; what follows belongs to all of them, for
the bare one by torch.compile: qkv's rotary embedding, gate_up's activation, residual and RMSNorm
behind o and down. Everything runs from CUDA graphs over weights that are larger than the cache
together.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from vllm_adafuse.cli.cmd_random import integers
from vllm_adafuse.kernels.linear import linear, linear_torch
from vllm_adafuse.kernels.linear_norm import linear_norm
from vllm_adafuse.kernels.pairs import rotate_torch
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
    r: int = 16
    repeats: int = 9
    dtype: str = "bfloat16"


def products(model: str) -> list[Product]:
    _, hidden, inter, _, heads, kv_heads, _ = SHAPES[model]
    kv = hidden // heads * kv_heads
    return [
        Product("qkv", hidden, (hidden, kv, kv), "rotary", hidden // heads),
        Product("o", hidden, (hidden,)),
        Product("gate_up", hidden, (inter, inter), "silu"),
        Product("down", inter, (hidden,)),
    ]


def copy_bandwidth() -> float:
    """Bytes per second read and written by a kernel that copies (the copy engine is slower)."""
    a = torch.empty(1 << 30, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    us = statistics.median(time_us(lambda: torch.mul(a, 1.0, out=b), 1, 5))
    return 2 * a.nbytes / us * 1e6


def measure_one(p: Product, tokens: int, options: Options, bandwidth: float) -> dict:
    dtype = getattr(torch, options.dtype)
    copies = 1 if tokens >= LARGE else None
    trial = Trial(p, options.experts, options.top_k, options.r, dtype, copies, tokens=tokens)
    x, gates, present = trial.step(tokens)
    parts, out = list(range(len(p.widths))), sum(p.widths)
    normed, order = p.name in ("o", "down"), trial.order(gates)
    residual, factors = (torch.randn(n, out, device="cuda").to(dtype) for n in (tokens, 1))
    factors = factors[0]

    def ours():
        trial.counters.zero_()
        for i, (joint, b) in enumerate(trial.layers):
            if normed:
                linear_norm(
                    x, joint, residual, factors, EPS, b, gates, present, trial.counters, i,
                    trial.scratch,
                )  # fmt: skip
            else:
                linear(
                    x, joint, None, b, gates, present, trial.counters, i, trial.scratch, order,
                    parts, p.widths, p.activation, trial.cos_sin,
                )  # fmt: skip

    @torch.compile(dynamic=False)
    def act(y):
        if p.activation == "rotary":
            return rotate_torch(y, trial.cos_sin, p.widths[0] + p.widths[1])
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up

    @torch.compile(dynamic=False)
    def norm(y):
        z = y.float() + residual.float()
        wide = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS)
        return wide.to(y.dtype) * factors, z.to(y.dtype)

    def bare():
        for joint, _ in trial.layers:
            y = F.linear(x, joint[:out])
            if p.activation:
                act(y)
            elif normed:
                norm(y)

    def by_torch():
        for joint, b in trial.layers:
            y = linear_torch(
                x, joint, None, b, gates, parts, p.widths, p.activation, trial.cos_sin
            )
            if normed:
                norm(y)

    used = int(gates.any(0).sum())
    expert_bytes = used * options.r * (len(parts) * p.size_in + out) * dtype.itemsize
    wide = p.widths[0] if p.name == "gate_up" else out
    moved = (
        out * p.size_in * dtype.itemsize
        + expert_bytes
        + tokens * (p.size_in + wide) * dtype.itemsize
    )
    row = {"projection": p.name, "tokens": tokens, "unit": "us"}
    for name, function in (("bare", bare), ("ours", ours), ("torch", by_torch)):
        row[name] = record.summary(time_us(function, len(trial.layers), options.repeats))
    median = row["ours"]["median"]
    row["floor"] = moved / bandwidth * 1e6
    row["tb_s"] = moved / median / 1e6
    row["overhead"] = median / row["bare"]["median"] - 1
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
    parser.add_argument("--repeats", default=defaults.repeats, type=int)
    parser.add_argument("--dtype", default=defaults.dtype)
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default="", help="of the measured code")
    arguments = vars(parser.parse_args())
    out, commit = arguments.pop("out"), arguments.pop("commit")
    options = Options(**arguments)
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows = [{"options": vars(options), "copy_bytes_per_s": bandwidth}]
    for model in options.models:
        for tokens in options.tokens:
            total = {"bare": 0.0, "ours": 0.0}
            for p in products(model):
                row = {"model": model} | measure_one(p, tokens, options, bandwidth)
                rows.append(row)
                for name in total:
                    total[name] += row[name]["median"]
                print(
                    f"{model:14} {tokens:5} {p.name:8} bare {row['bare']['median']:8.1f}  "
                    f"ours {row['ours']['median']:8.1f} {row['overhead']:+6.1%}  torch "
                    f"{row['torch']['median']:8.1f}  floor {row['floor']:7.1f} us  "
                    f"{row['tb_s']:.2f} TB/s",
                    flush=True,
                )
            print(
                f"{model:14} {tokens:5} layer    bare {total['bare']:8.1f}  "
                f"ours {total['ours']:8.1f} {total['ours'] / total['bare'] - 1:+6.1%}",
                flush=True,
            )
    print(json.dumps({"saved": str(record.save("kernels", rows, out, commit))}))


if __name__ == "__main__":
    main()
