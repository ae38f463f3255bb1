"""Finding how products of few tokens should be cut on this machine's GPU."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from vllm_adafuse.explain import Model, shapes_of_layer
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.kernels.add_norm import add_norm_triton
from vllm_adafuse.kernels.configs import (
    MAX_SHARED,
    MAX_TILE_SHARED,
    MIN_TILE_TOKENS,
    GemmConfig,
    save_configs,
    shape_key,
)
from vllm_adafuse.kernels.dispatch import (
    MAX_LOW_TILE_TOKENS,
    MAX_STREAM_ONLY_TOKENS,
    MAX_STREAM_TOKENS,
    MAX_TILE_TOKENS,
    MAX_UNTILED_TOKENS,
    MIN_TILES,
    config_plan,
    cublas_plan,
    default_config,
)
from vllm_adafuse.kernels.operands import Norm, Projection, Step, stays_in_place
from vllm_adafuse.kernels.plans import Device, Shape
from vllm_adafuse.kernels.projection import projection_triton
from vllm_adafuse.kernels.projection_norm import projection_norm_triton, workspace_sizes
from vllm_adafuse.kernels.spread_routes import new_active, spread_routes
from vllm_adafuse.kernels.workspace import Workspace

# The most tokens for which there is something to tune.
MAX_TOKENS = MAX_TILE_TOKENS
# Bytes of weights to go round, so that no cache holds them.
BEYOND_CACHE = 256 << 20


@dataclass(frozen=True)
class Product:
    """One kind of adapted projection.

    Attributes:
        name: qkv, o, gate_up, down.
        shape: with experts on all its slices.
        behind_norm: its input is what a norm of an op of ours leaves, which lets this launch begin
            early.
    """

    name: str
    shape: Shape
    behind_norm: bool = False


def products_of(
    backbone: Backbone, model: Model, experts: int, rank: int, ranks: int = 1
) -> list[Product]:
    """The projections of a backbone as vLLM packs and shards them, unquantised, in bfloat16.

    Args:
        backbone: of which the first layer is taken.
        model: what else its config says.
        experts, rank: of the adapter.
        ranks: of tensor parallelism.

    Raises:
        AdapterError: a width is not divisible by the ranks.
    """
    plain = replace(model, quantised=False, itemsize=2)
    found = {
        name.split(".")[1].removesuffix("_proj"): replace(shape, has_bias=False)
        for name, shape in shapes_of_layer(
            backbone, plain, 0, set(backbone.linears), (experts, rank), ranks
        )
    }
    norms = any(shape.epilogue == "norm" for shape in found.values())
    return [
        Product(name, shape, norms and shape.epilogue != "norm") for name, shape in found.items()
    ]


def has_accelerator() -> bool:
    """Whether this GPU has a tensor memory accelerator."""
    return Device.of(torch.device("cuda")).hopper


def candidates(
    product: Product, tokens: int, tma: bool = False
) -> Iterator[GemmConfig | None]:
    """The configs worth a measurement, None for cuBLAS; the default comes first.

    tma: this GPU has a tensor memory accelerator.
    """
    s = product.shape
    shape = tokens, s.size_in, s.tiled_rows, s.epilogue, s.itemsize
    default = default_config(*shape, tma)
    yield default
    if tokens > MAX_STREAM_TOKENS and default:
        yield None
    found = itertools.chain(
        _streamed(*shape) if tokens <= MAX_STREAM_TOKENS else (),
        _tiled(*shape) if tma and tokens > MAX_UNTILED_TOKENS else (),
    )
    yield from (config for config in found if config != default)


def _streamed(
    tokens: int, size_in: int, rows_of_w: int, epilogue: str, itemsize: int
) -> Iterator[GemmConfig]:
    pairs, block_t = epilogue not in ("", "norm"), max(16, triton.next_power_of_2(tokens))
    two = 2 if pairs else 1
    for rows, cols, stages, split_k in itertools.product(
        (16, 32, 64) if tokens <= MAX_STREAM_ONLY_TOKENS else (32, 64), (64, 128), (3, 4, 6),
        (1,) if pairs else (1, 2, 3, 4),
    ):  # fmt: skip
        shared = (stages - 1) * (rows * two + block_t) * cols * itemsize
        programs = triton.cdiv(rows_of_w, rows) * split_k
        per_step = rows * two * cols
        if shared > MAX_SHARED or not MIN_TILES <= programs <= 600:
            continue
        if not 4096 <= per_step <= 16384 or size_in < cols * split_k * stages:
            continue
        warps, few = 8 if per_step * block_t >= 1 << 19 else 4, tokens <= MAX_STREAM_ONLY_TOKENS
        shrink_split_k = 1 if split_k == 1 else 2 if few else 3
        shrink_cols = 512 if few and split_k > 1 else 256
        yield GemmConfig(rows, cols, split_k, warps, stages, shrink_cols, shrink_split_k)


def _tiled(
    tokens: int, size_in: int, rows_of_w: int, epilogue: str, itemsize: int
) -> Iterator[GemmConfig]:
    pairs, block_t = epilogue not in ("", "norm"), max(MIN_TILE_TOKENS, triton.next_power_of_2(tokens))
    two, many = 2 if pairs else 1, tokens > MAX_LOW_TILE_TOKENS
    norm = epilogue == "norm"
    # The shrink should end long before the product: in short slices where that is cut, too.
    slices_of = (4, 8) if norm and many else (2, 4) if many else (4 if size_in > 8192 else 2,)
    for rows, cols, stages, split_k, warps, shrink_split_k in itertools.product(
        (32, 64) if epilogue == "rotary" else (64, 96, 128), (64, 128),
        (4, 5, 6) if norm else (3, 4, 5, 6), (1, 2, 3) if norm else (1,),
        (4, 8) if pairs else (4,), slices_of,
    ):  # fmt: skip
        shared = stages * (rows * two + block_t) * cols * itemsize
        programs = triton.cdiv(rows_of_w, rows) * split_k
        sums = rows * two * block_t // (32 * warps)  # registers of a thread
        if shared <= MAX_TILE_SHARED and 60 <= programs <= 400 and sums <= 128:
            yield GemmConfig(rows, cols, split_k, warps, stages, 256, shrink_split_k, True)


class Trial:
    """A product with random weights and experts on the GPU, more than a cache can hold.

    Args:
        product: what to run.
        top_k: experts of a token.
        dtype: of the model, with the shape's bytes.
        copies: of the weights; default as many as are beyond any cache.
        tokens: of the longest step; default those that the streaming kernel takes.
    """

    def __init__(
        self,
        product: Product,
        top_k: int,
        dtype: torch.dtype = torch.bfloat16,
        copies: int | None = None,
        device: str = "cuda",
        tokens: int = 0,
    ):
        self.product, self.shape, self.top_k = product, product.shape, top_k
        self.dtype, self.device = dtype, device
        shape, out = self.shape, self.shape.size_out
        linears, experts, rank = max(shape.adapted) + 1, shape.num_experts, shape.rank
        if copies is None:
            copies = max(2, -(-BEYOND_CACHE // (out * shape.size_in * dtype.itemsize)))
        self.semaphores = torch.zeros(copies, 4, dtype=torch.int32, device=device)
        factors = torch.ones(out, dtype=dtype, device=device)
        self.layers = []
        for i in range(copies):
            fused_weight = self._normal(shape.fused_rows, shape.size_in)
            self.layers.append(Projection(
                shape, fused_weight[out:].view(linears, experts, rank, shape.size_in),
                self._normal(out, experts, rank), fused_weight, norm=Norm(factors, 1e-5),
                semaphore=self.semaphores[i], strided_out=stays_in_place(shape),
            ))  # fmt: skip
        sizes = workspace_sizes(self.layers[0].lora_a, out)
        self.workspace = Workspace.make(*sizes, torch.device(device))
        self.cos_sin = None
        if shape.epilogue == "rotary":
            self.cos_sin = self._normal(max(MAX_STREAM_TOKENS, tokens), shape.head_dim)

    def _normal(self, *shape: int) -> torch.Tensor:
        values = torch.randn(*shape, device=self.device, dtype=torch.float32)
        return (values * shape[-1] ** -0.5).to(self.dtype)

    def step(self, tokens: int, active: int | None = None) -> tuple[torch.Tensor, Step]:
        """Random inputs of a step: x, and what all projections read; active: the tokens choose
        among so many of the experts."""
        x = torch.randn(tokens, self.shape.size_in, device=self.device).to(self.dtype)
        order = torch.rand(tokens, active or self.shape.num_experts, device=self.device).argsort(1)
        ids, weights = order[:, : self.top_k].int(), torch.rand(tokens, self.top_k).to(x.device)
        gates = torch.zeros(tokens, self.shape.num_experts, device=self.device)
        active = new_active(self.shape.num_experts, self.device)
        spread_routes(ids, weights, gates, active, self.semaphores, tokens)
        return x, Step(gates, active, self.workspace, self.cos_sin)

    def run(self, given: tuple[torch.Tensor, Step], config: GemmConfig | None) -> None:
        """Runs the product, cut like this, on every copy of the weights, with what follows it and
        with the norm that lets it begin early, if there is one."""
        (x, step), product, shape = given, self.product, self.shape
        norm = shape.epilogue == "norm"
        if config:
            way = config_plan(shape, config)
        else:
            way = cublas_plan(shape, len(x), Device.of(x.device))
        self.semaphores.zero_()
        if norm:
            residual = x.new_ones(x.shape[0], shape.size_out)
        if product.behind_norm:
            hidden, weight = x, x.new_ones(shape.size_in)
        for p in self.layers:
            if product.behind_norm:
                before = hidden, Norm(weight, 1e-5), p.lora_b, step.gates
                x, _ = add_norm_triton(hidden, None, *before)
            if norm:
                projection_norm_triton(x, residual, p, step, way)
            else:
                projection_triton(x, p, step, way)


def time_us(function: Callable[[], object], calls: int, repeats: int = 7) -> list[float]:
    """Microseconds per call of a function that makes `calls` calls, replayed from a CUDA graph."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for repeat in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(3):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 2:
            times.append(begin.elapsed_time(end) * 1e3 / 3 / calls)
    return times


@dataclass(frozen=True)
class Outcome:
    """What the configs of one product and number of tokens took, in microseconds, best first."""

    product: Product
    tokens: int
    times: tuple[tuple[float, GemmConfig | None], ...]
    default: float

    @property
    def best(self) -> tuple[float, GemmConfig | None]:
        return self.times[0]


@dataclass(frozen=True)
class TuningJob:
    """What to tune.

    Attributes:
        products: of the model.
        tokens: for which numbers of tokens.
        top_k: experts of a token.
        workers: processes that compile.
        tma: the GPU has a tensor memory accelerator.
    """

    products: tuple[Product, ...]
    tokens: tuple[int, ...] = (1, 8, 16, 32, 64, 128)
    top_k: int = 2
    workers: int = 4
    tma: bool = False

    def trials(self) -> list[tuple[Product, int, GemmConfig | None]]:
        return [
            (product, tokens, config)
            for product in self.products
            for tokens in self.tokens
            for config in candidates(product, tokens, tma=self.tma)
        ]


def _compile(job: TuningJob, trials: list[tuple[Product, int, GemmConfig | None]]) -> int:
    """Runs each config once in a process of its own, which leaves it in Triton's cache."""
    product, trial = None, None
    for wanted, tokens, config in trials:
        if wanted != product:
            product = wanted
            trial = Trial(product, job.top_k, copies=1, tokens=max(job.tokens))
        _try(trial, tokens, config)
    return len(trials)


def _try(trial: Trial, tokens: int, config: GemmConfig | None) -> bool:
    """Whether a config runs on this device at all."""
    try:
        trial.run(trial.step(tokens), config)
    except triton.runtime.errors.OutOfResources:
        return False
    return True


def compile_all(job: TuningJob, advance: Callable[[int], object]) -> None:
    """Compiles every candidate, several at a time; `advance` hears how many are done."""
    trials, size = job.trials(), 6
    # One product after the other, so that a process holds weights of one.
    batches = [trials[start : start + size] for start in range(0, len(trials), size)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(job.workers, mp_context=context) as pool:
        for done in pool.map(_compile, itertools.repeat(job), batches):
            advance(done)


def tune(job: TuningJob, advance: Callable[[int], object]) -> Iterator[Outcome]:
    """Measures every candidate; `advance` hears of each.

    Yields:
        An outcome for each product and number of tokens.
    """
    for product in job.products:
        trial = Trial(product, job.top_k, tokens=max(job.tokens))
        for tokens in job.tokens:
            step, times, default = trial.step(tokens), [], float("nan")
            for number, config in enumerate(candidates(product, tokens, tma=job.tma)):
                if _try(trial, tokens, config):
                    run = functools.partial(trial.run, step, config)
                    taken = time_us(run, len(trial.layers))
                    times.append((statistics.median(taken), config))
                    default = times[0][0] if number == 0 else default
                advance(1)
            if times:
                ranked = tuple(sorted(times, key=lambda pair: pair[0]))
                yield Outcome(product, tokens, ranked, default)


def save(outcomes: Sequence[Outcome], device: str, command: str) -> Path:
    """Keeps the best configs where servers look for them when they start; returns the file.

    Args:
        outcomes: what was measured.
        device: the GPU's name.
        command: by which.
    """
    configs: dict[str, dict] = {}
    for outcome in outcomes:
        s = outcome.product.shape
        key = shape_key(s.size_in, s.tiled_rows, s.epilogue, s.itemsize)
        configs.setdefault(key, {})[outcome.tokens] = outcome.best[1]
    took = {
        f"{o.product.name} {o.tokens}": [round(o.default, 2), round(o.best[0], 2)]
        for o in outcomes
    }
    how = {"command": command, "torch": torch.__version__, "us": took}
    return save_configs(device, configs, how)
