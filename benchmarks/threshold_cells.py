"""What `benchmarks.thresholds` measures: limits of `kernels.dispatch`, and cells on both sides of each."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_adafuse.kernels import dispatch
from vllm_adafuse.kernels.plans import Device

from benchmarks.kernels import products


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
    """Tiles, where streaming alone is tried, and streaming where a rotary embedding has tiles."""
    for tokens in (8, 16):
        yield Cell(limit, beyond(limit, tokens), tokens, "llama-3-8b", "qkv", "default")
        for shape in ("llama-3-8b gate_up", "llama-3-70b gate_up"):
            yield Cell(limit, {"MAX_STREAM_ONLY_TOKENS": tokens - 1}, tokens, *shape.split(), "default")


def _dense_norm(limit: str) -> Iterator[Cell]:
    for experts, moved in ((64, 1023), (128, 2047)):
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
    "MAX_LOW_TILE_TOKENS": _sides(
        (64, 128), "llama-3-8b o, llama-3-8b down, llama-2-7b qkv, llama-3-70b down", "default"
    ),
    "MAX_UNTILED_TOKENS": _untiled,
    "MIN_DENSE_TOKENS": _all(
        _sides((1, 2, 4), "llama-3-8b qkv, llama-2-7b gate_up, llama-3-70b o", "quantised", Mixture(64)),
    ),
    "MAX_SHORT_TOKENS": _sides(
        (256, 512, 1024), "llama-3-8b qkv, llama-3-8b o, llama-2-7b qkv, llama-3-70b down"
    ),
    "MAX_SHORT_EXPAND_TOKENS": _sides(
        (1024, 2048), "llama-3-8b qkv, llama-3-8b gate_up, llama-3-70b o", "default", Mixture(8, 24)
    ),
    "MAX_DENSE_RANKS": _dense_norm,
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
}  # fmt: skip
