"""Every kernel, launched on small shapes.

    python tests/every_kernel.py    twice, and whether it leaves the same; sanitize.py watches that

A case is made once and run as often as wanted: what a launch changes is put back before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import test_layerwise_ffn_down as downs
import test_layerwise_ffn_mix as mixes
import test_layerwise_linear as linears
import test_layerwise_route as routes
import test_layerwise_sgmm as layers
import torch
from ops import DEVICE, leave_pages_to_tiles, make_problem
from test_context_routes import Problem as Requests
from test_kv_slots import make_pages
from test_page_routes import outputs, problem
from test_spread_routes import routes as spread
from test_switch import make_plan, make_routes
from vllm_adafuse.kernels.add_norm import add_norm_triton
from vllm_adafuse.kernels.context_routes import context_routes_triton
from vllm_adafuse.kernels.decode_gemm import decode_gemm_triton
from vllm_adafuse.kernels.dense_expand import dense_expand_triton
from vllm_adafuse.kernels.expand import expand_raw_triton
from vllm_adafuse.kernels.fp8_shrink import fp8_shrink_triton
from vllm_adafuse.kernels.gather_routes import gather_routes_triton
from vllm_adafuse.kernels.layerwise.ffn_down import ffn_down
from vllm_adafuse.kernels.layerwise.ffn_mix import ffn_mix
from vllm_adafuse.kernels.layerwise.linear import layer_linear
from vllm_adafuse.kernels.layerwise.route import route_layer_triton
from vllm_adafuse.kernels.operands import Norm
from vllm_adafuse.kernels.page_projection import (
    epilogue_triton,
    page_projection,
    page_projection_norm,
)
from vllm_adafuse.kernels.page_routes import new_tile_blocks, page_routes_triton
from vllm_adafuse.kernels.page_shrink import page_shrink_triton
from vllm_adafuse.kernels.projection_norm import projection_norm
from vllm_adafuse.kernels.shrink import shrink_triton
from vllm_adafuse.kernels.spread_routes import spread_routes_triton
from vllm_adafuse.kernels.switch import switch_triton
from vllm_adafuse.kernels.tma_expand import tma_expand_triton
from vllm_adafuse.kernels.tma_gemm import tma_gemm_triton

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
HEAD = 32
Run = Callable[[], "list[torch.Tensor]"]


def _half(tokens, size_in, widths, experts=8, rank=16, **options):
    return make_problem(tokens, size_in, widths, experts, 2, rank, dtype=HALF, **options)


def _products(p):
    """W x and A x, in memory of their own, and how to put both back."""
    y, s = p.x @ p.weight.T, p.x @ p.lora_a.flatten(0, 2).T
    now = y.clone(), s.clone()

    def put_back():
        now[0].copy_(y)
        now[1].copy_(s)
        return now

    return put_back


def _turns(tokens):
    g = torch.Generator().manual_seed(3)
    return torch.randn(tokens, HEAD, generator=g).to(HALF).to(DEVICE)


def gemm(launch, tokens, widths, epilogue, fp8=False, **options) -> Run:
    """A whole projection; s is NaN before it."""
    p = _half(tokens, 128, widths, **options)
    cos_sin = _turns(tokens) if epilogue == "rotary" else None
    of, step = p.projection(epilogue, cos_sin), p.step(cos_sin)
    of = p.in_fp8(epilogue, cos_sin)[1] if fp8 else of

    def run():
        p.workspace.lora_a_out.fill_(255)
        of.semaphore.zero_()
        return [launch(p.x, of, step)]

    return run


def shrink() -> Run:
    p = _half(24, 520, [64, 64])
    return lambda: [shrink_triton(p.x, p.lora_a, p.gates, p.active, p.workspace).clone()]


def page_shrink() -> Run:
    """Every tile lists every block, or what it leaves would not be whole."""
    p = _half(150, 64, [64, 64], 24)
    tile_blocks = new_tile_blocks(150, 24, p.x.device)
    tile_blocks[:] = torch.tensor([3, 0, 1, 2], device=DEVICE)
    return lambda: [page_shrink_triton(p.x, p.lora_a, tile_blocks)]


def fp8_shrink() -> Run:
    p = _half(150, 64, [64, 64], 24)
    _, of = p.in_fp8()
    return lambda: [fp8_shrink_triton(p.x, of.lora_a, p.gates)]


def expand(launch, tokens=40, epilogue="", tiles=False) -> Run:
    experts = 40 if tiles else 8
    p = _half(tokens, 64, [64, 64, 64] if epilogue == "rotary" else [64, 64], experts)
    cos_sin = _turns(tokens) if epilogue == "rotary" else None
    step = p.step(cos_sin, leave_pages_to_tiles(p) if tiles else None)
    of, products = p.projection(epilogue, cos_sin), _products(p)
    return lambda: [launch(*products(), of, step)]


def expand_short(y, s, of, step):
    return expand_raw_triton(y, s, None, of, step)


def dense_expand() -> Run:
    p = _half(70, 64, [64, 48], 24)
    products = _products(p)

    def run():
        y, s = products()
        dense_expand_triton(y, s, p.lora_b, p.gates, p.adapted, p.widths, 8)
        return [y]

    return run


def add_norm(with_deltas=True) -> Run:
    p = _half(20, 64, [96])
    residual = torch.randn(20, 96, generator=torch.Generator().manual_seed(1)).to(HALF).to(DEVICE)
    norm = Norm(torch.ones(96, dtype=HALF, device=DEVICE), 1e-5)
    products = _products(p)

    def run():
        y, s = products()
        s = s if with_deltas else None
        return list(add_norm_triton(y, s, residual.clone(), norm, p.lora_b, p.gates))

    return run


def normed(launch, tokens) -> Run:
    p = _half(tokens, 256, [96])
    residual = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(1)).to(HALF).to(DEVICE)
    of, step = p.projection("norm", norm=Norm(torch.ones(96, dtype=HALF, device=DEVICE), 1e-5)), p.step()

    def run():
        of.semaphore.zero_()
        return list(launch(p.x, residual.clone(), of, step))

    return run


def pages(tokens, epilogue, has_adapters, fp8=False) -> Run:
    """A projection of tokens whose requests name adapters; keys and values go to the cache."""
    widths = [2 * HEAD, HEAD, HEAD] if epilogue == "rotary" else [64, 64]
    p = _half(tokens, 64, widths, 12)
    cos_sin = _turns(tokens) if epilogue == "rotary" else None
    of, step = p.projection(epilogue, cos_sin), p.step(cos_sin)
    of = p.in_fp8(epilogue, cos_sin)[1] if fp8 else of
    kv_slots = make_pages(tokens, 1, HEAD, HALF) if epilogue == "rotary" else None

    def run():
        of.semaphore.zero_()
        out = page_projection(p.x, of, step, has_adapters, kv_slots)
        if kv_slots is None:
            return [out]
        return [out[:, : widths[0]], kv_slots.keys, kv_slots.values]

    return run


def epilogue_alone() -> Run:
    p = _half(40, 64, [140, 140], 12)
    of, step, products = p.projection("silu"), p.step(), _products(p)
    return lambda: [epilogue_triton(products()[0], of, step)]


def gather() -> Run:
    ids = torch.randint(0, 9, (50, 2), dtype=torch.int32, device=DEVICE)
    weights = torch.rand(50, 2, device=DEVICE)
    tokens = torch.randint(0, 50, (70,), dtype=torch.int32, device=DEVICE)
    out = torch.empty(70, 2, dtype=torch.int32, device=DEVICE), torch.empty(70, 2, device=DEVICE)

    def run():
        gather_routes_triton(tokens, ids, weights, *out)
        return list(out)

    return run


def spread_out(tokens) -> Run:
    ids, weights = spread(tokens, 8, 2)
    gates = torch.zeros(tokens + 2, 8, device=DEVICE)
    active = torch.zeros(10, dtype=torch.int64, device=DEVICE)
    semaphores = torch.zeros(300, 4, dtype=torch.int32, device=DEVICE)

    def run():
        semaphores.fill_(7)
        gates.fill_(7)
        spread_routes_triton(ids, weights, gates, active, semaphores, tokens)
        return [gates, active[:1], semaphores]

    return run


def page_routes(tokens, count) -> Run:
    given = [t.to(DEVICE) for t in problem(tokens, count)]
    into = outputs(tokens + 3, count)

    def run():
        into.gates.fill_(7)
        page_routes_triton(*given, into)
        return [into.gates, into.active[:1], into.semaphores]

    return run


def context_routes() -> Run:
    """The second step of requests that see their past."""
    kept: list = []

    def keep(*arguments):
        kept[:] = [arguments, arguments[4].clone()]
        context_routes_triton(*arguments)

    requests = Requests()
    requests.step({0: 5, 1: 33}, keep)
    requests.step({1: 40, 0: 1, 2: 3, 3: 2}, keep)
    arguments, before = kept

    def run():
        arguments[4].copy_(before)
        context_routes_triton(*arguments)
        return [*arguments[-1], arguments[4].nan_to_num()]

    return run


def switch() -> Run:
    plan = make_plan([(77, 131), (16, 200)], 3, 16, HALF)
    ids, weights = make_routes(4, 3, 2)
    at = torch.tensor([1], device=DEVICE)

    def run():
        for live in plan.live:
            live.fill_(torch.nan)
        switch_triton(plan, ids, weights, at)
        return list(plan.live)

    return run


def layer_route() -> Run:
    arguments = routes.make("odd")
    return lambda: [routes.run_by(route_layer_triton, *arguments, torch.float32)]


def layer_product() -> Run:
    x, p, layer, _ = linears.problem(next(iter(layers.CASES)), True)
    return lambda: [layer_linear(x, p, layer)]


def layer_sgmm() -> Run:
    x, *rest = layers.make(next(iter(layers.CASES)))

    def run():
        y = torch.zeros(len(x), sum(rest[-1]), device=DEVICE)
        layers.run(y, x, *rest, triton=True)
        return [y]

    return run


def down() -> Run:
    y, *rest = downs.make("odd")
    before = y.clone()

    def run():
        y.copy_(before)
        ffn_down(y, *rest)
        return [y]

    return run


def mix() -> Run:
    arguments = mixes.make("odd")
    return lambda: [ffn_mix(*arguments)]


CASES: dict[str, Callable[[], Run]] = {
    "decode_gemm": lambda: gemm(decode_gemm_triton, 8, [128, 128], "silu"),
    "decode_gemm, many pages": lambda: gemm(decode_gemm_triton, 16, [128], "", experts=40),
    "decode_gemm, heads": lambda: gemm(decode_gemm_triton, 3, [64, 32, 32], "rotary"),
    "decode_gemm, fp8": lambda: gemm(decode_gemm_triton, 8, [128, 128], "silu", True),
    "tma_gemm": lambda: gemm(tma_gemm_triton, 40, [128, 128], "silu"),
    "tma_gemm, r 64": lambda: gemm(tma_gemm_triton, 40, [128], "", rank=64),
    "tma_gemm, heads": lambda: gemm(tma_gemm_triton, 70, [64, 64, 64], "rotary"),
    "shrink": shrink,
    "page_shrink": page_shrink,
    "fp8_shrink": fp8_shrink,
    "expand": lambda: expand(expand_short),
    "expand, heads": lambda: expand(expand_short, epilogue="rotary"),
    "tma_expand": lambda: expand(tma_expand_triton, 150, "silu"),
    "tma_expand, heads": lambda: expand(tma_expand_triton, 150, "rotary"),
    "tma_expand, pages by tiles": lambda: expand(tma_expand_triton, 150, "silu", tiles=True),
    "dense_expand": dense_expand,
    "add_norm": add_norm,
    "add_norm, without deltas": lambda: add_norm(False),
    "projection and norm": lambda: normed(projection_norm, 8),
    "projection and norm, tiles": lambda: normed(projection_norm, 40),
    "pages": lambda: pages(20, "silu", True),
    "pages, long": lambda: pages(300, "silu", True),
    "pages, heads into the cache": lambda: pages(40, "rotary", True),
    "pages, no adapters": lambda: pages(40, "rotary", False),
    "pages, fp8": lambda: pages(40, "silu", True, fp8=True),
    "pages and norm": lambda: normed(lambda *given: page_projection_norm(*given, True), 20),
    "pages and norm, no adapters": lambda: normed(lambda *given: page_projection_norm(*given, False), 20),
    "epilogue alone": epilogue_alone,
    "gather_routes": gather,
    "spread_routes": lambda: spread_out(37),
    "spread_routes, long": lambda: spread_out(300),
    "page_routes": lambda: page_routes(40, 16),
    "page_routes, long": lambda: page_routes(300, 40),
    "context_routes": context_routes,
    "switch": switch,
    "layer-wise: route": layer_route,
    "layer-wise: linear": layer_product,
    "layer-wise: sgmm": layer_sgmm,
    "layer-wise: ffn_down": down,
    "layer-wise: ffn_mix": mix,
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor, as whole numbers of as many bytes."""
    if not tensor.is_floating_point():
        return tensor
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(kind)


def differ(found: list[torch.Tensor], first: list[torch.Tensor]) -> torch.Tensor:
    """bool: whether any bit does."""
    return torch.stack([(whole(a) != whole(b)).any() for a, b in zip(found, first)]).any()


def run_twice(name: str) -> str:
    """Launches a case; what is wrong with what it left, or nothing."""
    run = CASES[name]()
    first = [tensor.clone() for tensor in run()]
    if any(t.is_floating_point() and not t.isfinite().all() for t in first):
        return "leaves what is not finite"
    return "leaves other bits each time" if differ(run(), first) else ""


def main() -> None:
    bad = 0
    for name in CASES:
        print(f"case: {name}", flush=True)
        begin = time.perf_counter()
        wrong = run_twice(name)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        bad += bool(wrong)
        print(f"  {wrong or 'equal'}, {time.perf_counter() - begin:.1f} s", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
