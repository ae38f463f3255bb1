"""The way that each op takes on a GPU, for steps of all lengths and mixtures of many kinds, against
float64: computed by the interpreter, on tensors that say they are on a GPU."""

import pytest
import test_layerwise_ffn_down as downs
import test_layerwise_ffn_mix as mixes
import test_layerwise_sgmm
import torch
from fake_gpu import computing
from ops import DEVICE, delta_truth, error, linear_truth, make_problem
from test_layerwise_linear import problem
from vllm_adafuse.kernels import dispatch
from vllm_adafuse.kernels.device.epilogues import rotate_torch
from vllm_adafuse.kernels.layerwise.ffn_down import ffn_down
from vllm_adafuse.kernels.layerwise.ffn_mix import ffn_mix
from vllm_adafuse.kernels.layerwise.linear import layer_linear
from vllm_adafuse.kernels.operands import Norm
from vllm_adafuse.kernels.projection import projection as whole
from vllm_adafuse.kernels.projection_norm import projection_norm
from vllm_adafuse.kernels.sgmm import sgmm

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU goes its own way")

TOKENS = 1, 20, 40, 130
MIXTURES = (8, 16), (5, 24), (40, 16), (36, 32), (1, 8)  # E, r
# Tokens, E and r of steps that stand for thousands, see `long_steps`.
LONG = (270, 8, 16), (270, 40, 16), (300, 8, 16), (300, 36, 32)
EPS = 1e-5


@pytest.fixture(autouse=True)
def long_steps(monkeypatch):
    """Steps of some hundred tokens go the ways of thousands."""
    monkeypatch.setattr(dispatch, "MIN_WIDE_TOKENS", 260)
    monkeypatch.setattr(dispatch, "MIN_FUSED_NORM_TOKENS", 290)


def projection(tokens, size_in, widths, epilogue, experts, rank, **options):
    """Kernels that ran, and errors of what they left and of plain torch."""
    top_k = min(2, experts)
    p = make_problem(
        tokens, size_in, widths, experts, top_k, rank, dtype=torch.float16, **options
    )
    gated, cos_sin = "" if epilogue == "rotary" else epilogue, None
    truth, plain = linear_truth(p, gated), linear_truth(p, gated, torch.float16)
    if epilogue == "rotary":
        cos_sin = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)).half()
        truth, plain = (rotate_torch(y, cos_sin, widths[0] + widths[1]) for y in (truth, plain))
    with computing() as names:
        found = whole(p.x, p.projection(epilogue, cos_sin), p.step(cos_sin))
    return names, error(found, truth), error(plain, truth)


def normed(tokens, size_in, width, experts, rank):
    p = make_problem(tokens, size_in, [width], experts, min(2, experts), rank, dtype=torch.float16)
    g = torch.Generator().manual_seed(1)
    residual, weight = (torch.randn(*s, generator=g).half() for s in ((tokens, width), (width,)))
    truth, plain = residual.double() + linear_truth(p), residual + linear_truth(p, "", torch.float16)
    with computing() as names:
        of = p.projection("norm", norm=Norm(weight, EPS))
        out, z = projection_norm(p.x, residual, of, p.step())
    scales = torch.rsqrt(truth.square().mean(-1, keepdim=True) + EPS)
    assert error(out, z.double() * scales * weight.double()) <= 2e-3
    return names, error(z, truth), error(plain, truth)


def run_all(run, *layer, steps, **options) -> set[str]:
    """The kernels that ran for a layer in steps of (tokens, E, r)."""
    ran = set()
    for tokens, experts, rank in steps:
        names, found, plain = run(tokens, *layer, experts, rank, **options)
        assert found <= 1.2 * plain, (tokens, experts, rank, names)
        ran |= set(names)
    return ran


def steps(*tokens):
    return [(count, *mixture) for mixture in MIXTURES for count in tokens]


def test_qkv():
    ran = run_all(projection, 64, [64, 64, 64], "rotary", steps=[*steps(*TOKENS), *LONG])
    assert ran == {
        "_decode_gemm_kernel", "_expand_kernel", "_tma_expand_kernel", "_weigh_kernel",
    }  # fmt: skip


def test_gate_up():
    ran = run_all(projection, 64, [128, 128], "silu", steps=[*steps(12, 70), *LONG])
    assert "_decode_gemm_kernel" in ran and "_expand_kernel" in ran


@pytest.mark.parametrize(
    "widths, epilogue", [([4096, 1024, 1024], "rotary"), ([3072, 3072], "silu")]
)
def test_products_that_are_tiled(widths, epilogue):
    ran = run_all(projection, 32, widths, epilogue, steps=[(40, 8, 16)])
    assert ran == {"_tma_gemm_kernel"}


def test_parts_without_experts_and_a_bias():
    some = [(tokens, 4, 8) for tokens in (*TOKENS, 270)]
    run_all(projection, 64, [64, 72, 64], "", steps=some, adapted=[0, -1, 1], bias=True)


@pytest.mark.parametrize(
    "size_in, some, kernel",
    [(64, [*steps(1, 20, 40), *LONG], "_tma_gemm_kernel"),
     (2048, steps(12, 130), "_expand_kernel")],
    ids=["short", "long"],
)  # fmt: skip
def test_projection_and_norm(size_in, some, kernel):
    """Of a short `in`, and of one that is cut into slices."""
    ran = run_all(normed, size_in, 64, steps=some)
    assert ran >= {"_decode_gemm_kernel", "_add_norm_kernel", kernel}


def test_deltas_beside_a_product_of_another():
    for tokens in (1, 64, 65):
        for experts, rank in MIXTURES:
            p = make_problem(tokens, 64, [64, 32], experts, 1, rank)
            y = torch.zeros(tokens, 96)
            with computing() as names:
                sgmm(y, p.x, p.projection(fused=False), p.step())
            assert error(y, delta_truth(p)) <= 1e-5, (tokens, experts, rank)
            assert names[-1] == "_expand_kernel"


@pytest.mark.parametrize("name", test_layerwise_sgmm.CASES)
def test_layer_wise(name):
    *arguments, expected = problem(name, True)
    with computing() as names:
        found = layer_linear(*arguments)
    assert names and error(found, expected) <= 1e-5
    with computing() as names:
        x, *rest = test_layerwise_sgmm.make(name)
        y = torch.zeros(len(x), sum(rest[-1]))
        test_layerwise_sgmm.run(y, x, *rest)
    assert names and error(y, test_layerwise_sgmm.truth(x, *rest)) <= 1e-5


@pytest.mark.parametrize("name", ["odd", "shared"])
def test_ffn_down(name):
    y, *rest = downs.make(name)
    expected, before = downs.truth(y, *rest), y.double()
    with computing() as names:
        ffn_down(y, *rest)
    assert names and error(y.double() - before, expected) <= 1e-5


@pytest.mark.parametrize("name", ["odd", "always"])
def test_ffn_mix(name):
    arguments = mixes.make(name)
    with computing() as names:
        found = ffn_mix(*arguments)
    assert names and error(found, mixes.truth(*arguments)) <= 1e-5
