"""The fused switch at the shapes of a whole model: one launch, all adapted weights.

    python -m benchmarks.switch --model llama-2-7b
    python -m benchmarks.switch --model tiny --cuts 16/32/64/4/1        # without a GPU

Each row is one cut of the work, rows/cols/strip/warps/stages of `SwitchConfig`. Its bytes are those
that a switch must move: every pristine weight read, every live one written, the chosen experts
read. They are held against the bandwidth of a kernel that copies, measured in the same run. Every
cut's result is checked against float64 on sampled rows. `torch` is the same by one product per
linear; `drift` compares many switches with adding and subtracting in place.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernel is made

from vllm_adafuse.kernels.switch import SwitchConfig, SwitchPlan, switch_torch, switch_triton

from benchmarks import record
from benchmarks.profile import count_launches

CUTS = (
    "64/64/2048/4/3,64/64/2048/4/1,64/64/2048/4/2,64/64/2048/4/4,64/64/1024/4/3,64/64/4096/4/3,"
    "64/32/2048/4/3,32/128/2048/4/2,32/128/2048/4/3,32/64/2048/4/3,16/128/2048/4/3,"
    "64/128/2048/4/2,64/128/2048/4/3,64/128/2048/8/2,64/128/2048/8/3,128/64/2048/4/2,"
    "128/64/2048/8/2,128/128/2048/8/2"
)
ROUTES = 32


def parse_config(text: str) -> SwitchConfig:
    """`rows/cols/strip/warps/stages`.

    Raises:
        ValueError: not five numbers, or no cut.
    """
    parts = text.split("/")
    if len(parts) != 5 or not all(part.isdigit() for part in parts):
        raise ValueError(f"cut {text}: expected five numbers, rows/cols/strip/warps/stages")
    return SwitchConfig(*map(int, parts))


@dataclass
class Options:
    """What to measure; checked at construction."""

    model: str = "llama-2-7b"
    layers: int | None = None
    cuts: list[str] = field(default_factory=lambda: CUTS.split(","))
    experts: int = 8
    top_k: int = 2
    r: int = 16
    repeats: int = 9
    # Triton's interpreter cannot multiply bfloat16.
    dtype: str = "bfloat16" if torch.cuda.is_available() else "float16"
    switches: int = 10000

    def __post_init__(self):
        from benchmarks.engine import SHAPES

        if self.model not in SHAPES:
            raise ValueError(f"model is {self.model}, expected one of {', '.join(SHAPES)}")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k is {self.top_k}, expected 1 to {self.experts} experts")
        for cut in self.cuts:
            parse_config(cut)

    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of all linears of the decoder layers."""
        from benchmarks.engine import SHAPES

        _, hidden, inter, layers, heads, kv_heads, _ = SHAPES[self.model]
        kv = hidden // heads * kv_heads
        layer = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        layer += [(inter, hidden), (inter, hidden), (hidden, inter)]
        return layer * (self.layers or layers)


def make_plan(options: Options, device: str) -> SwitchPlan:
    """Random weights and experts."""
    dtype = getattr(torch, options.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=shape[-1] ** -0.5)

    shapes = options.shapes()
    pristine = [normal(*shape) for shape in shapes]
    return SwitchPlan.make(
        [torch.empty_like(w) for w in pristine],
        pristine,
        [normal(options.experts, options.r, size_in) for _, size_in in shapes],
        [normal(options.experts, size_out, options.r) for size_out, _ in shapes],
    )


def make_routes(options: Options, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random routes [ROUTES, k]: expert ids and weights."""
    order = torch.rand(ROUTES, options.experts, device=device).argsort(1)
    weights = torch.rand(ROUTES, options.top_k, device=device) + 0.1
    return order[:, : options.top_k].int().contiguous(), weights


def times_us(function: Callable[[], object], repeats: int) -> list[float]:
    """Microseconds of single calls, by the device's clock where there is one."""
    cuda, taken = torch.cuda.is_available(), []
    for repeat in range(repeats + 2):
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            torch.cuda.synchronize()
            value = begin.elapsed_time(end) * 1e3
        else:
            start = time.perf_counter()
            function()
            value = (time.perf_counter() - start) * 1e6
        if repeat >= 2:  # the first ones warm up
            taken.append(value)
    return taken


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a kernel that copies."""
    if device == "cuda":
        from benchmarks.kernels import copy_bandwidth as measured

        return measured()
    a = torch.empty(1 << 22)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(times_us(lambda: torch.mul(a, 1.0, out=b), 5)) * 1e6


def worst_error(plan: SwitchPlan, ids, weights, row: torch.Tensor, samples: int = 16) -> float:
    """The largest error of sampled rows, in roundings: 1 is the float64 truth rounded once.

    In float32, where the sums themselves are rounded, relative errors over its epsilon.
    """
    which, worst = dict.fromkeys(tuple(w.shape) for w in plan.live), 0.0
    for shape in which:
        places = [i for i, w in enumerate(plan.live) if tuple(w.shape) == shape]
        for i in {places[0], places[len(places) // 2], places[-1]}:
            pick = torch.randint(shape[0], (samples,), device=row.device)
            truth = plan.pristine[i][pick].double()
            for e, g in zip(ids[row[0]].tolist(), weights[row[0]].tolist()):
                truth += g * (plan.banks_b[i][e, pick].double() @ plan.banks_a[i][e].double())
            once = truth.to(plan.live[i].dtype).double()
            found = (plan.live[i][pick].double() - truth).norm()
            if plan.live[i].dtype == torch.float32:
                worst = max(worst, (found / truth.norm() / torch.finfo(torch.float32).eps).item())
            else:
                worst = max(worst, (found / (once - truth).norm()).item())
    return worst


def drift(options: Options, device: str) -> list[dict]:
    """Errors of one linear after many switches: the switch's, and adding and subtracting's."""
    shape = min(options.shapes(), key=lambda s: s[0] * s[1])
    dtype = getattr(torch, options.dtype)

    def normal(*dims: int) -> torch.Tensor:
        return torch.empty(dims, dtype=dtype, device=device).normal_(std=dims[-1] ** -0.5)

    w, a = normal(*shape), normal(options.experts, options.r, shape[1])
    b = normal(options.experts, shape[0], options.r)
    plan = SwitchPlan.make([w.clone()], [w], [a], [b])
    ids, weights = make_routes(options, device)
    deltas = []
    for n in range(ROUTES):
        tall = (b[ids[n].long()].float() * weights[n][:, None, None]).transpose(0, 1).flatten(1)
        deltas.append(tall @ a[ids[n].long()].float().flatten(0, 1))
    order = torch.randint(ROUTES, (options.switches,)).tolist()
    rows_on_device = [torch.tensor([n], device=device) for n in range(ROUTES)]
    run = switch_triton if device == "cuda" else switch_torch
    naive, last, found = w.clone(), None, []
    for count, n in enumerate(order, 1):
        run(plan, ids, weights, rows_on_device[n])
        if last is not None:  # as an in-place kernel does: each step rounds to the weight's dtype
            naive.copy_(naive.float() - deltas[last])
        naive.copy_(naive.float() + deltas[n])
        last = n
        if count in (1, 10, 100, 1000, options.switches):
            truth = w.double() + deltas[n].double()
            once = (truth.to(dtype).double() - truth).norm() / truth.norm()
            row = {"what": "drift", "switches": count, "rounding_of_one": once.item()}
            for name, value in (("switch", plan.live[0]), ("add_subtract", naive)):
                row[name] = ((value.double() - truth).norm() / truth.norm()).item()
            found.append(row)
    return found


def measure(options: Options) -> list[dict]:
    """One row per cut, torch's, and the drift."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    print(f"copy: {bandwidth / 1e12:.3f} TB/s", flush=True)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    plan = make_plan(options, device)
    ids, weights = make_routes(options, device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    moved = plan.moved_bytes(options.top_k)
    facts = {
        "linears": len(plan.live),
        "weights": sum(w.numel() for w in plan.live),
        "moved_bytes": moved,
        "pristine_bytes": sum(w.nbytes for w in plan.pristine),
        "bank_bytes": sum(t.nbytes for t in (*plan.banks_a, *plan.banks_b)),
        "table_bytes": plan.table.nbytes + plan.places.nbytes,
    }
    print(json.dumps(facts), flush=True)
    rows = [{"options": vars(options), "copy_bytes_per_s": bandwidth, **facts}]
    runs = [(cut, plan.with_config(parse_config(cut)), switch_triton) for cut in options.cuts]
    for cut, one, run in [*runs, ("torch", plan, switch_torch)]:
        for w in plan.live:
            w.zero_()
        row.add_(1).remainder_(ROUTES)
        result = {"what": "switch", "cut": cut, "unit": "us"}
        try:
            run(one, ids, weights, row)
        except Exception as e:  # a cut that does not fit this device is a result too
            rows.append(result | {"failed": repr(e)[:300]})
            print(f"{cut:20} does not run: {e!r:.120}", flush=True)
            continue
        result["error_in_roundings"] = wrong = worst_error(one, ids, weights, row)
        result["correct"] = wrong <= (16 if options.dtype == "float32" else 1.05)
        taken = times_us(lambda one=one, run=run: run(one, ids, weights, row), options.repeats)
        result |= record.summary(taken)
        result["bytes_per_s"] = moved / result["median"] * 1e6
        result["share_of_copy"] = result["bytes_per_s"] / bandwidth
        if device == "cuda":
            result |= count_launches(lambda one=one, run=run: run(one, ids, weights, row))
            result["peak_bytes"] = torch.cuda.max_memory_allocated()
        rows.append(result)
        print(
            f"{cut:20} {result['median']:10.1f} us ({result['min']:.1f} to {result['max']:.1f})  "
            f"{result['bytes_per_s'] / 1e12:.3f} TB/s  {result['share_of_copy']:6.1%} of the copy  "
            f"error {wrong:.4f} roundings{'' if result['correct'] else ' WRONG'}  "
            f"{result.get('kernels', '?')} launches",
            flush=True,
        )
    if options.switches:
        rows += drift(options, device)
        for found in rows:
            if found.get("what") == "drift":
                print(json.dumps(found), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Options()
    parser.add_argument("--model", default=defaults.model, help="as in benchmarks.engine")
    parser.add_argument("--layers", type=int, help="fewer layers, while working")
    parser.add_argument("--cuts", default=defaults.cuts, type=lambda t: t.split(","))
    parser.add_argument("--experts", default=defaults.experts, type=int)
    parser.add_argument("--top-k", default=defaults.top_k, type=int)
    parser.add_argument("--r", default=defaults.r, type=int)
    parser.add_argument("--repeats", default=defaults.repeats, type=int)
    parser.add_argument("--dtype", default=defaults.dtype)
    parser.add_argument(
        "--switches", default=defaults.switches, type=int, help="of the drift, 0 for none"
    )
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default="", help="of the measured code")
    arguments = vars(parser.parse_args())
    out, commit = arguments.pop("out"), arguments.pop("commit")
    rows = measure(Options(**arguments))
    print(json.dumps({"saved": str(record.save("switch", rows, out, commit))}))


if __name__ == "__main__":
    main()
