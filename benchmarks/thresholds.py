"""Both sides of each limit of `kernels.dispatch`: what is chosen there, and what would be beyond it.

    python -m benchmarks.thresholds --limits MAX_SHORT_TOKENS,MIN_TILES

Each row: a number of tokens on one side of a limit, the time as the limit has it, and with the
limit moved so that the other choice is taken; from CUDA graphs, over several draws of x and routes.
Shapes are of models that configs were tuned for, and of some that nobody tuned for (70B, 3B), with
an adapter of 8 experts of rank 16 unless a row says more. A side wins where it is faster in every
draw, and by more than 1 % in the median.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from vllm_adafuse.kernels import dispatch
from vllm_adafuse.kernels.launch import compile_only
from vllm_adafuse.kernels.page_routes import (
    COLUMNS,
    EXPERT,
    OWNER,
    SCALE,
    TOP_K,
    PageGates,
    new_tile_blocks,
    page_routes,
)
from vllm_adafuse.kernels.plans import Device
from vllm_adafuse.kernels.projection import projection_triton
from vllm_adafuse.kernels.projection_norm import projection_norm_triton
from vllm_adafuse.kernels.sgmm import sgmm
from vllm_adafuse.kernels.spread_routes import new_active, spread_routes
from vllm_adafuse.kernels.workspace import Workspace
from vllm_adafuse.tuning import Trial, time_us

from benchmarks import record
from benchmarks.kernels import LARGE
from benchmarks.layerwise import Layers
from benchmarks.threshold_cells import CELLS, Cell, cells_of, limits, product_of

# By less a side does not win.
CLEAR = 0.01
# Launches of routes in one graph.
ROUTES = 32


class Runs:
    """What cells run, with weights that cells of one shape share.

    Args:
        device: where.
    """

    def __init__(self, device: str = "cuda"):
        self.device = device
        # For more tokens than launches are made for.
        self.workspace = Workspace.make(1 << 26, 1 << 24, 1 << 16, torch.device(device))
        self._trial = functools.lru_cache(8)(self._new_trial)

    def _new_trial(self, product: Any, top_k: int, copies: int | None, tokens: int) -> Trial:
        trial = Trial(product, top_k, copies=copies, device=self.device, tokens=tokens)
        trial.workspace = self.workspace
        return trial

    def draw(self, cell: Cell) -> tuple[Callable[[], None], int]:
        """A step with new random x and routes, and how many calls it is; under `limits`."""
        if cell.kind == "routes":
            return self._routes(cell), ROUTES
        product = product_of(cell)
        if cell.kind == "layer-wise":
            layers = Layers(product, cell.tokens, cell.mixture, self.device)
            return layers.joined, len(layers.layers)
        copies = 1 if cell.tokens >= LARGE else None
        trial = self._trial(product, cell.mixture.top_k, copies, cell.tokens)
        x, step = trial.step(cell.tokens)
        run = self._quantised if cell.kind == "quantised" else self._projection
        return functools.partial(run, trial, x, step), len(trial.layers)

    def _projection(self, trial: Trial, x: torch.Tensor, step: Any) -> None:
        way = dispatch.plan(trial.shape, len(x), Device.of(x.device))
        trial.semaphores.zero_()
        residual = x.new_ones(len(x), trial.shape.size_out)
        for p in trial.layers:
            if trial.shape.epilogue == "norm":
                projection_norm_triton(x, residual, p, step, way)
            else:
                projection_triton(x, p, step, way)

    def _quantised(self, trial: Trial, x: torch.Tensor, step: Any) -> None:
        shape = replace(trial.shape, fused=False)
        y = x.new_zeros(len(x), shape.size_out)
        for p in trial.layers:
            sgmm(y, x, replace(p, shape=shape), step)

    def _routes(self, cell: Cell) -> Callable[[], None]:
        tokens, experts, vocabulary, columns = cell.tokens, cell.mixture.experts, 1 << 15, 8
        new = functools.partial(torch.zeros, device=self.device)
        gates, active = new(tokens, experts), new_active(experts, self.device)
        semaphores = new(128, 4, dtype=torch.int32)
        into = PageGates(gates, active, new_tile_blocks(tokens, experts, self.device), semaphores)
        ids = torch.rand(tokens, experts, device=self.device).argsort(1)[:, :2].int().contiguous()
        weights = torch.rand(tokens, 2, device=self.device)
        directory = new(COLUMNS + columns, experts, dtype=torch.int32)
        directory[OWNER] = torch.arange(experts, device=self.device) // 4
        directory[EXPERT] = torch.arange(experts, device=self.device) % 4
        directory[TOP_K], directory[SCALE] = 2, 0
        directory[COLUMNS], directory[COLUMNS + 1] = 0, 1
        random = functools.partial(torch.randint, device=self.device, dtype=torch.int32)
        named = random(vocabulary, (tokens,)), random(max(1, experts // 4), (tokens,))
        tables = random(4, (columns, vocabulary)), torch.rand(columns, vocabulary).to(gates.device)

        def spread() -> None:
            for _ in range(ROUTES):
                spread_routes(ids, weights, gates, active, semaphores, tokens)

        def of_pages() -> None:
            for _ in range(ROUTES):
                page_routes(*named, directory, *tables, into)

        return spread if cell.projection == "spread_routes" else of_pages


def verdict(chosen: list[float], other: list[float]) -> str:
    """Which is the better one of times that belong together, in pairs."""
    gain = statistics.median(chosen) / statistics.median(other) - 1
    if all(a < b for a, b in zip(chosen, other)) and gain < -CLEAR:
        return "chosen"
    if all(a > b for a, b in zip(chosen, other)) and gain > CLEAR:
        return "OTHER"
    return "even"


def measure(
    cell: Cell, runs: Runs, draws: int, timer: Callable[[Callable, int], list[float]]
) -> dict[str, Any]:
    """A row; what cannot run says so."""
    row = {**vars(cell), "mixture": vars(cell.mixture), "unit": "us"}
    row["value"] = getattr(dispatch, cell.limit)
    times: tuple[list, list] = [], []
    try:
        for number in range(draws):
            run, calls = runs.draw(cell)
            order = (0, 1) if number % 2 else (1, 0)  # neither is always the first
            for side in order:
                with limits(cell.moved if side else {}, cell.kind != "default"):
                    times[side].append(statistics.median(timer(run, calls)))
    except (triton.runtime.errors.OutOfResources, torch.OutOfMemoryError) as e:
        return row | {"verdict": "does not run", "error": str(e)}
    chosen, other = times
    return row | {
        "chosen": record.summary(chosen), "other": record.summary(other),
        "verdict": verdict(chosen, other),
    }  # fmt: skip


def compile_both(cells: list[Cell], runs: Runs) -> None:
    """Kernels of all cells, several at a time. One that fits no processor ends that: what is not
    compiled then is when it first runs, and the one is told of in its row."""
    try:
        with compile_only():
            for cell in cells:
                run, _ = runs.draw(cell)
                for moved in ({}, cell.moved):
                    with limits(moved, cell.kind != "default"):
                        run()
    except triton.runtime.errors.OutOfResources as e:
        print(f"{cells[0].limit}: one by one, since {e}", flush=True)


def line(row: dict[str, Any], cell: Cell) -> str:
    head = f"{row['limit']:24} {row['tokens']:6} {cell.shown:38}"
    if "error" in row:
        return f"{head} {row['verdict']}: {row['error'].splitlines()[0]}"
    a, b = (row[side] for side in ("chosen", "other"))
    times = "  ".join(f"{s['median']:8.2f} ({s['min']:.2f}-{s['max']:.2f})" for s in (a, b))
    return f"{head} {times}  {row['verdict']} {a['median'] / b['median'] - 1:+.1%}"


def summary(rows: list[dict[str, Any]]) -> str:
    """Of a limit, how many cells say that it stands where it should."""
    told = [row["verdict"] for row in rows]
    kinds = ("chosen", "OTHER", "even", "does not run")
    return ", ".join(f"{kind} {told.count(kind)}" for kind in kinds if kind in told)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limits", default=list(CELLS), type=lambda t: t.split(","))
    parser.add_argument("--draws", default=3, type=int, help="of x and routes")
    parser.add_argument("--repeats", default=5, type=int, help="of a draw")
    parser.add_argument("--out", type=Path, help="folder of the result file")
    parser.add_argument("--commit", default="", help="of the measured code")
    options = parser.parse_args()
    timer = functools.partial(time_us, repeats=options.repeats)
    shown = {"limits": options.limits, "draws": options.draws, "repeats": options.repeats}
    rows, path, begin = [{"options": shown}], None, time.monotonic()
    print("limit, tokens, shape, us as chosen, us with the other choice, who wins", flush=True)
    for limit in options.limits:
        runs, cells = Runs(), cells_of(limit)
        compile_both(cells, runs)
        for cell in cells:
            rows.append(measure(cell, runs, options.draws, timer))
            print(line(rows[-1], cell), flush=True)
        own = summary(rows[-len(cells) :])
        print(f"{limit}: {own}; {time.monotonic() - begin:.0f} s so far", flush=True)
        path = record.save("thresholds", rows, options.out, options.commit, path)
    print(json.dumps({"saved": str(path)}))


if __name__ == "__main__":
    main()
