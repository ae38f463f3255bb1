"""Finding how products of few tokens should be cut on this machine's GPU."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import torch
import triton
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.kernels.add_norm import add_norm_triton
from vllm_adafuse.kernels.configs import GemmConfig
from vllm_adafuse.kernels.dispatch import (
    MAX_LOW_TILE_TOKENS,
    MAX_STREAM_ONLY_TOKENS,
    MAX_STREAM_TOKENS,
    MAX_UNTILED_TOKENS,
    config_plan,
    cublas_plan,
    default_config,
)
from vllm_adafuse.kernels.linear import linear_triton
from vllm_adafuse.kernels.linear_norm import linear_norm_triton, workspace_sizes
from vllm_adafuse.kernels.operands import Norm, Projection, Step, stays_in_place
from vllm_adafuse.kernels.pairs import can_rotate
from vllm_adafuse.kernels.plans import Device, Shape
from vllm_adafuse.kernels.shrink import MAX_SHARED
from vllm_adafuse.kernels.spread_routes import new_active, spread_routes
from vllm_adafuse.kernels.tma_gemm import MIN_TOKENS
from vllm_adafuse.kernels.workspace import Workspace

PACKED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "qkv_proj": "qkv"}
PACKED |= {"gate_proj": "gate_up", "up_proj": "gate_up", "gate_up_proj": "gate_up"}
ROW_PARALLEL = ("o_proj", "down_proj")
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Bytes of a processor's shared memory that a program of the tiled kernel may take.
MAX_TILE_SHARED = 220 << 10
# Bytes of weights to go round, so that no cache holds them.
BEYOND_CACHE = 256 << 20


@dataclass(frozen=True)
class Product:
    """One kind of adapted projection.

    Attributes:
        name: qkv, o, gate_up, down.
        size_in: elements of its input.
        widths: columns of its parts.
        epilogue: what follows in the same op, see `Shape`.
        head_dim: size of a head, with "rotary".
        behind_norm: its input is what such an op leaves, whose norm lets this launch begin early.
    """

    name: str
    size_in: int
    widths: tuple[int, ...]
    epilogue: str = ""
    head_dim: int = 0
    behind_norm: bool = False

    @property
    def norm(self) -> bool:
        """A residual and an RMSNorm follow."""
        return self.epilogue == "norm"

    def shape(self, experts: int, rank: int, itemsize: int) -> Shape:
        """With so many experts on every linear."""
        adapted = tuple(range(len(self.widths)))
        return Shape(
            self.size_in, self.widths, adapted, experts, rank, itemsize, self.epilogue,
            self.head_dim,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        """Rows of W that are cut into tiles: of one member where rows come in pairs."""
        if self.epilogue == "rotary":
            return sum(self.widths) // 2
        return self.widths[0] if self.epilogue and not self.norm else sum(self.widths)


def products_of(
    backbone: Backbone, activation: str, head_dim: int, ranks: int = 1
) -> list[Product]:
    """The projections of a backbone as vLLM packs and shards them.

    Args:
        backbone: of which the first layer is taken.
        activation: its config's hidden_act.
        head_dim: size of its heads.
        ranks: of tensor parallelism.

    Raises:
        AdapterError: a width is not divisible by the ranks.
    """
    found: dict[str, tuple[int, list[int]]] = {}
    for name, (size_in, size_out) in backbone.linears.items():
        if not name.startswith("model.layers.0."):
            continue
        leaf = name.rsplit(".", 1)[1]
        sharded = size_in if leaf in ROW_PARALLEL else size_out
        if sharded % ranks:
            raise AdapterError(
                f"backbone {backbone.path}",
                [f"{name} has {sharded} to share out, expected a multiple of {ranks} ranks"],
            )
        if leaf in ROW_PARALLEL:
            size_in //= ranks
        else:
            size_out //= ranks
        whole = PACKED.get(leaf, leaf.removesuffix("_proj"))
        widths = [size_out // 2] * 2 if leaf == "gate_up_proj" else [size_out]
        found.setdefault(whole, (size_in, []))[1].extend(widths)
    norms = backbone.architecture.residual_norms and ranks == 1
    rotates = backbone.architecture.rotary_follows and can_rotate(head_dim)
    products = []
    for name, (size_in, widths) in found.items():
        before = norms and name in ("o", "down")
        epilogue = "norm" if before else ""
        product = Product(name, size_in, tuple(widths), epilogue, behind_norm=norms != before)
        if name == "gate_up":
            product = replace(product, epilogue=ACTIVATIONS.get(activation, ""))
        elif name == "qkv" and len(widths) == 3 and rotates:
            product = replace(product, epilogue="rotary", head_dim=head_dim)
        products.append(product)
    return products


def candidates(
    product: Product, tokens: int, itemsize: int = 2, tma: bool = False
) -> Iterator[GemmConfig | None]:
    """The cuts worth a measurement, None for cuBLAS; the default comes first.

    tma: this GPU has a tensor memory accelerator.
    """
    shape = tokens, product.size_in, product.rows, product.epilogue, itemsize
    default = default_config(*shape, tma)
    yield default
    if tokens > MAX_STREAM_TOKENS and default:
        yield None
    found = itertools.chain(
        _streamed(*shape) if tokens <= MAX_STREAM_TOKENS else (),
        _tiled(*shape) if tma and tokens > MAX_UNTILED_TOKENS else (),
    )
    yield from (cut for cut in found if cut != default)


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
        if shared > MAX_SHARED or not 90 <= programs <= 600:
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
    pairs, block_t = epilogue not in ("", "norm"), max(MIN_TOKENS, triton.next_power_of_2(tokens))
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
        experts, top_k, rank: of the adapter.
        dtype: of the model.
        copies: of the weights; default as many as are beyond any cache.
        tokens: of the longest step; default those that the streaming kernel takes.
    """

    def __init__(
        self,
        product: Product,
        experts: int,
        top_k: int,
        rank: int,
        dtype: torch.dtype = torch.bfloat16,
        copies: int | None = None,
        device: str = "cuda",
        tokens: int = 0,
    ):
        self.product, self.experts, self.top_k, self.rank = product, experts, top_k, rank
        self.dtype, self.device = dtype, device
        out, parts = sum(product.widths), len(product.widths)
        if copies is None:
            copies = max(2, -(-BEYOND_CACHE // (out * product.size_in * dtype.itemsize)))
        self.semaphores = torch.zeros(copies, 4, dtype=torch.int32, device=device)
        shape = product.shape(experts, rank, dtype.itemsize)
        factors = torch.ones(out, dtype=dtype, device=device)
        self.layers = []
        for i in range(copies):
            fused_weight = self._normal(shape.fused_rows, product.size_in)
            self.layers.append(Projection(
                shape, fused_weight[out:].view(parts, experts, rank, product.size_in),
                self._normal(out, experts, rank), fused_weight, norm=Norm(factors, 1e-5),
                semaphore=self.semaphores[i], strided_out=stays_in_place(shape),
            ))  # fmt: skip
        sizes = workspace_sizes(self.layers[0].lora_a, out)
        self.workspace = Workspace.make(*sizes, torch.device(device))
        self.cos_sin = None
        if product.epilogue == "rotary":
            self.cos_sin = self._normal(max(MAX_STREAM_TOKENS, tokens), product.head_dim)

    def _normal(self, *shape: int) -> torch.Tensor:
        values = torch.randn(*shape, device=self.device, dtype=torch.float32)
        return (values * shape[-1] ** -0.5).to(self.dtype)

    def step(self, tokens: int, active: int | None = None) -> tuple[torch.Tensor, Step]:
        """Random inputs of a step: x, and what all projections read; active: the tokens choose
        among so many of the experts."""
        x = torch.randn(tokens, self.product.size_in, device=self.device).to(self.dtype)
        order = torch.rand(tokens, active or self.experts, device=self.device).argsort(1)
        ids, weights = order[:, : self.top_k].int(), torch.rand(tokens, self.top_k).to(x.device)
        gates = torch.zeros(tokens, self.experts, device=self.device)
        active = new_active(self.experts, self.device)
        spread_routes(ids, weights, gates, active, self.semaphores, tokens)
        return x, Step(gates, active, self.workspace, self.cos_sin)

    def run(self, given: tuple[torch.Tensor, Step], cut: GemmConfig | None) -> None:
        """Runs the product, cut like this, on every copy of the weights, with what follows it and
        with the norm that lets it begin early, if there is one."""
        (x, step), product, shape = given, self.product, self.layers[0].shape
        if cut:
            way = config_plan(shape, cut)
        else:
            way = cublas_plan(shape, len(x), Device.of(x.device))
        self.semaphores.zero_()
        if product.norm:
            residual = x.new_ones(x.shape[0], shape.size_out)
        if product.behind_norm:
            hidden, weight = x, x.new_ones(product.size_in)
        for p in self.layers:
            if product.behind_norm:
                before = hidden, Norm(weight, 1e-5), p.lora_b, step.gates
                x, _ = add_norm_triton(hidden, None, *before)
            if product.norm:
                linear_norm_triton(x, residual, p, step, way)
            else:
                linear_triton(x, p, step, way)


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
    """What the cuts of one product and number of tokens took, in microseconds, best first."""

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
        experts, top_k, rank: of the adapter.
        workers: processes that compile.
        tma: the GPU has a tensor memory accelerator.
    """

    products: tuple[Product, ...]
    tokens: tuple[int, ...] = (1, 8, 16, 32, 64, 128)
    experts: int = 8
    top_k: int = 2
    rank: int = 16
    workers: int = 4
    tma: bool = False

    def jobs(self) -> list[tuple[Product, int, GemmConfig | None]]:
        return [
            (product, tokens, cut)
            for product in self.products
            for tokens in self.tokens
            for cut in candidates(product, tokens, tma=self.tma)
        ]


def _compile(plan: TuningJob, jobs: list[tuple[Product, int, GemmConfig | None]]) -> int:
    """Runs each cut once in a process of its own, which leaves it in Triton's cache."""
    product, trial = None, None
    for wanted, tokens, cut in jobs:
        if wanted != product:
            product = wanted
            most = max(plan.tokens)
            trial = Trial(product, plan.experts, plan.top_k, plan.rank, copies=1, tokens=most)
        _try(trial, tokens, cut)
    return len(jobs)


def _try(trial: Trial, tokens: int, cut: GemmConfig | None) -> bool:
    """Whether a cut runs on this device at all."""
    try:
        trial.run(trial.step(tokens), cut)
    except triton.runtime.errors.OutOfResources:
        return False
    return True


def compile_all(plan: TuningJob, advance: Callable[[int], object]) -> None:
    """Compiles every candidate, several at a time; `advance` hears how many are done."""
    jobs, size = plan.jobs(), 6
    # One product after the other, so that a process holds weights of one.
    batches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(plan.workers, mp_context=context) as pool:
        for done in pool.map(_compile, itertools.repeat(plan), batches):
            advance(done)


def tune(plan: TuningJob, advance: Callable[[int], object]) -> Iterator[Outcome]:
    """Measures every candidate; `advance` hears of each.

    Yields:
        An outcome for each product and number of tokens.
    """
    for product in plan.products:
        trial = Trial(product, plan.experts, plan.top_k, plan.rank, tokens=max(plan.tokens))
        for tokens in plan.tokens:
            step, times, default = trial.step(tokens), [], float("nan")
            for number, cut in enumerate(candidates(product, tokens, tma=plan.tma)):
                if _try(trial, tokens, cut):
                    run = functools.partial(trial.run, step, cut)
                    taken = time_us(run, len(trial.layers))
                    times.append((statistics.median(taken), cut))
                    default = times[0][0] if number == 0 else default
                advance(1)
            if times:
                ranked = tuple(sorted(times, key=lambda pair: pair[0]))
                yield Outcome(product, tokens, ranked, default)
