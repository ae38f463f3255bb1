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
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from vllm_adafuse.kernels.projection import linear_triton
from vllm_adafuse.kernels.projection_norm import linear_norm_triton
from vllm_adafuse.kernels.sgmm import sgmm
from vllm_adafuse.kernels.spread_routes import new_active, spread_routes
from vllm_adafuse.kernels.workspace import Workspace
from vllm_adafuse.tuning import Trial, time_us

from benchmarks import record
from benchmarks.kernels import LARGE, products
from benchmarks.layerwise import Layers

# By less a side does not win.
CLEAR = 0.01
# Launches of routes in one graph.
ROUTES = 32


@dataclass(frozen=True)
class Mixture:
    """Of an adapter, as `products` and `Layers` ask for it."""

    experts: int = 8
    r: int = 16
    top_k: int = 2
    splits: int = 1
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Cell:
    """One number of tokens of one projection on one side of a limit.

    Attributes:
        limit: its name in `dispatch`.
        moved: what else is the limit, to take the other choice: name -> value.
        tokens: of the step.
        model, projection: the shape; of `routes` the projection says which kernel.
        kind: what runs: a projection, with the configs that were tuned for it or the default ones;
            the deltas over a quantised W; a projection that is routed inside its layer; routes.
        mixture: of the adapter.
    """

    limit: str
    moved: dict[str, Any]
    tokens: int
    model: str
    projection: str
    kind: str = "tuned"
    mixture: Mixture = field(default=Mixture())

    @property
    def shown(self) -> str:
        mixture = "" if self.mixture == Mixture() else f" {self.mixture.experts}/{self.mixture.r}"
        kind = "" if self.kind == "tuned" else f", {self.kind}"
        return f"{self.model} {self.projection}{mixture}{kind}"


def beyond(limit: str, tokens: int) -> dict[str, int]:
    """A limit on tokens, moved as far as these."""
    now = getattr(dispatch, limit)
    if limit.startswith("MIN"):
        return {limit: tokens + (tokens >= now)}
    return {limit: tokens - (tokens <= now)}


@contextmanager
def limits(moved: dict[str, Any], tuned: bool = True) -> Iterator[None]:
    """`dispatch` and all who ask it, with some limits elsewhere; without configs that were tuned."""
    moved = moved if tuned else {**moved, "configs_of": lambda device: {}}
    of_kernels = [m for name, m in sys.modules.items() if name.startswith("vllm_adafuse.kernels")]
    places = [(m, name) for m in of_kernels for name in moved if hasattr(m, name)]
    before = [(module, name, getattr(module, name)) for module, name in places]

    def put(all_of: list[tuple[Any, str, Any]]) -> None:
        for module, name, value in all_of:
            setattr(module, name, value)
        for module in of_kernels:
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()

    put([(module, name, moved[name]) for module, name in places])
    try:
        yield
    finally:
        put(before)


def product_of(cell: Cell) -> Any:
    return next(p for p in products(cell.model, cell.mixture) if p.name == cell.projection)


def flips(limit: str, tokens: int, model: str, projection: str, kind: str = "default") -> Cell:
    """A cell of a limit on tiles: moved to the nearest number that gives another plan.

    Raises:
        ValueError: there is none.
    """
    cell, device = Cell(limit, {}, tokens, model, projection, kind), Device("NVIDIA H200", 9)
    shape, now = product_of(cell).shape, getattr(dispatch, limit)
    with limits({}, tuned=False):
        plan = dispatch.plan(shape, tokens, device)
    for value in sorted(range(1, 600), key=lambda value: abs(value - now)):
        with limits({limit: value}, tuned=False):
            if dispatch.plan(shape, tokens, device) != plan:
                return replace(cell, moved={limit: value})
    raise ValueError(f"{limit}: no number changes the plan of {cell.shown} at {tokens} tokens")


def cells_of(limit: str) -> list[Cell]:
    """What tells on which side of a limit each choice is the better one."""
    return list(CELLS[limit](limit))


def _sides(tokens: tuple[int, ...], shapes: str, kind: str = "tuned", mixture=Mixture()):
    """limit -> its cells on both sides; shapes: "model projection, model projection"."""

    def make(limit: str) -> Iterator[Cell]:
        for t, shape in itertools.product(tokens, shapes.split(", ")):
            yield Cell(limit, beyond(limit, t), t, *shape.split(), kind, mixture)

    return make


def _all(*several):
    """Several of these together."""
    return lambda limit: itertools.chain.from_iterable(make(limit) for make in several)


def _tiles(*some: tuple[tuple[int, ...], str]):
    """The same of a limit on tiles: tokens and shapes."""

    def make(limit: str) -> Iterator[Cell]:
        for tokens, shapes in some:
            for t, shape in itertools.product(tokens, shapes.split(", ")):
                yield flips(limit, t, *shape.split())

    return make


def _untiled(limit: str) -> Iterator[Cell]:
    """Tiles, where streaming alone is tried."""
    for tokens in (8, 16):
        for shape in ("llama-3-8b qkv", "llama-3-8b gate_up", "llama-3-70b gate_up"):
            yield Cell(limit, {"MAX_STREAM_ONLY_TOKENS": tokens - 1}, tokens, *shape.split(), "default")


def _wide(limit: str) -> Iterator[Cell]:
    some, many = dispatch.WIDE_EXPAND_TOKENS
    for shape in ("llama-3-8b", "llama-2-7b", "llama-3-70b"):
        for tokens in (many, 2 * many):
            yield Cell(limit, {limit: (some, tokens - (tokens == many))}, tokens, shape, "qkv")
        for tokens in (some, 3 * some // 2):
            yield Cell(limit, {limit: (tokens - (tokens == some), many)}, tokens, shape, "o")


def _dense_norm(limit: str) -> Iterator[Cell]:
    for experts, moved in ((64, 1023), (128, 2048)):
        for shape in ("llama-3-8b o", "llama-3-8b down", "llama-3-70b o"):
            yield Cell(limit, {limit: moved}, 8192, *shape.split(), "tuned", Mixture(experts))


CELLS: dict[str, Callable[[str], Iterable[Cell]]] = {
    "MIN_TILES": _tiles(
        ((64, 128), "llama-3-8b qkv, llama-2-7b qkv, llama-3-70b qkv"),
        ((1, 16), "llama-3-8b qkv, qwen2.5-7b qkv, llama-3.2-3b qkv"),
    ),
    "MAX_ROUND_TILES": _tiles(
        ((64, 128), "llama-2-7b gate_up, llama-3-8b gate_up, llama-3.2-3b gate_up")
    ),
    "MAX_NORM_TILES": _tiles(((32, 64), "llama-3-8b down, llama-2-13b down, llama-3-70b down")),
    "MAX_STREAM_PROGRAMS": _tiles(((8, 16), "llama-3-8b o, llama-2-13b o, llama-3-70b o")),
    "MAX_FEWEST_TOKENS": _sides(
        (1, 2, 4, 8), "llama-3-8b o, llama-3-8b down, qwen2.5-7b o, llama-3.2-3b o", "default"
    ),
    "MAX_LOW_TILE_TOKENS": _sides(
        (64, 128), "llama-3-8b o, llama-3-8b down, llama-2-7b qkv, llama-3-70b down", "default"
    ),
    "MAX_UNTILED_TOKENS": _untiled,
    "MIN_DENSE_TOKENS": _all(
        _sides((1, 4, 8), "llama-3-8b qkv, llama-2-7b gate_up, llama-3-70b o", "quantised"),
        _sides((1, 4, 8), "llama-3-8b qkv, llama-3-70b o", "quantised", Mixture(64)),
    ),
    "MAX_SHORT_TOKENS": _sides(
        (256, 512, 1024),
        "llama-3-8b qkv, llama-3-8b gate_up, llama-2-7b qkv, llama-3-70b gate_up, llama-3-70b down",
    ),
    "MAX_DENSE_NORM_RANKS": _dense_norm,
    "MIN_FUSED_NORM_TOKENS": _sides((4096, 8192), "llama-3-8b o, llama-3-8b down, llama-3-70b o"),
    "MAX_SHRINK_TOKENS": _sides(
        (64, 128), "llama-3-8b qkv, llama-3-8b down, llama-3-70b o", "quantised"
    ),
    "MAX_ACTIVE_TOKENS": lambda limit: [
        Cell(limit, beyond(limit, tokens), tokens, "-", name, "routes", Mixture(experts))
        for tokens in (256, 512)
        for name in ("spread_routes", "page_routes")
        for experts in (8, 64)
    ],
    "MAX_LAYER_ACTIVE_TOKENS": _sides(
        (8, 16), "llama-3-8b qkv, llama-3-8b gate_up, llama-3-70b o", "layer-wise", Mixture(16)
    ),
    "MAX_SMALL_ROUTE_TOKENS": _sides(
        (512, 1024), "llama-3-8b qkv, llama-3-8b gate_up, llama-3-70b o", "layer-wise"
    ),
    "MAX_LAYER_FUSED_TOKENS": _sides(
        (256, 512), "llama-3-8b qkv, llama-3-8b gate_up, llama-3-70b o", "layer-wise"
    ),
    "WIDE_EXPAND_TOKENS": _wide,
}  # fmt: skip


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
                linear_norm_triton(x, residual, p, step, way)
            else:
                linear_triton(x, p, step, way)

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
