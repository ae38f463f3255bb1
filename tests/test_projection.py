"""The adapted projection as one op, on every path that the number of tokens selects."""

import pytest
import torch
from ops import DEVICE, error, linear_truth, make_problem
from vllm_adafuse.kernels.configs import GemmConfig
from vllm_adafuse.kernels.device.epilogues import rotate_torch
from vllm_adafuse.kernels.dispatch import config_plan, cublas_plan, plan, serves
from vllm_adafuse.kernels.plans import DECODE_GEMM, TMA_GEMM, Device, Shape
from vllm_adafuse.kernels.projection import new_result, projection, projection_triton

# On a GPU: the streaming kernel, the tiled one, and the fused product with two kinds of expand.
TOKENS = [1, 32, 33, 100]
LONG = [300, 2500]


def run(p, epilogue="", cos_sin=None, in_place=False):
    return projection(p.x, p.projection(epilogue, cos_sin, in_place), p.step(cos_sin))


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    "epilogue,adapted", [("", [0, 1]), ("", [-1, 0]), ("silu", [0, 1]), ("silu", [-1, 0])]
)
def test_equals_float64(tokens, epilogue, adapted):
    p = make_problem(tokens, 96, [80, 80], 4, 2, 4, adapted=adapted, bias=True)
    out = run(p, epilogue)
    assert error(out, linear_truth(p, epilogue)) <= 1e-5


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("adapted", [[0, 1, 2], [-1, 0, 1]])
def test_queries_and_keys_are_turned(tokens, adapted):
    p = make_problem(tokens, 96, [128, 64, 64], 4, 2, 4, adapted=adapted, bias=True)
    cos_sin = torch.randn(tokens + 2, 64, device=DEVICE)
    out = run(p, "rotary", cos_sin)
    assert error(out, rotate_torch(linear_truth(p), cos_sin, 192)) <= 1e-5


@pytest.mark.parametrize("ranks", [4, 3])  # 3: rows of [W; A] that are no multiple of 16 bytes
@pytest.mark.parametrize("epilogue", ["", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_cublas_and_an_expand(bias, epilogue, ranks):
    p = make_problem(300, 48, [64, 64], 1, 1, ranks, bias=bias)
    of = p.projection(epilogue)
    way = cublas_plan(of.shape, 300, Device("cpu"))
    assert way.one_gemm == (ranks == 4 and not bias)
    out = projection_triton(p.x, of, p.step(), way)
    assert out.is_contiguous() and error(out, linear_truth(p, epilogue)) <= 1e-5


@pytest.mark.parametrize(
    "tokens,experts,epilogue,tiled",
    [
        (8, 8, "rotary", False), (9, 8, "rotary", True), (16, 32, "rotary", True),
        (16, 33, "rotary", False), (17, 33, "rotary", True), (33, 33, "rotary", True),
        (16, 8, "", False), (17, 8, "", True), (32, 32, "", True),
        (17, 33, "", False), (32, 33, "", False), (33, 33, "", True),
    ],
)  # fmt: skip
def test_tiles_or_a_stream_by_tokens_and_ranks(tokens, experts, epilogue, tiled):
    head = 128 if epilogue else 0
    of = Shape(4096, (4096, 4096, 4096), (0, 1, 2), experts, 16, 2, epilogue, head)
    way = plan(of, tokens, Device("a GPU", 9))
    assert way.kernel == (TMA_GEMM if tiled else DECODE_GEMM)
    assert way.config.tma == tiled and serves(way.config, tokens, True)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS + LONG)
@pytest.mark.parametrize("epilogue", ["", "silu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_plain_torch(tokens, epilogue, dtype):
    p = make_problem(tokens, 1024, [512, 512], 8, 2, 16, dtype=dtype)
    truth, plain = linear_truth(p, epilogue), linear_truth(p, epilogue, dtype)
    assert error(run(p, epilogue), truth) <= 1.2 * error(plain, truth)


@pytest.mark.gpu
def test_a_captured_graph_replays_with_other_routes():
    p = make_problem(8, 512, [256, 256], 4, 2, 8)
    other = make_problem(8, 512, [256, 256], 4, 2, 8, seed=1)
    of, step = p.projection(), p.step()
    projection(p.x, of, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        of.semaphore.zero_()
        out = projection(p.x, of, step)
    for gates, active in ((other.gates, other.active), (p.gates.clone(), p.active.clone())):
        p.gates.copy_(gates), p.active.copy_(active)
        graph.replay()
        assert error(out, linear_truth(p)) <= 1e-5


# Rows of [W; A] here: 160. Not in place: no pairs, a bias, ranks that make it 152, odd columns.
@pytest.mark.parametrize(
    "epilogue,bias,ranks,width,stride",
    [
        ("silu", False, 4, 64, 160), ("gelu_tanh", False, 4, 64, 160), ("", False, 4, 64, 128),
        ("silu", True, 4, 64, 64), ("silu", False, 3, 64, 64), ("silu", False, 4, 72, 72),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [*TOKENS, 300])
def test_every_path_leaves_the_layout_that_the_fake_tells(
    tokens, epilogue, bias, ranks, width, stride
):
    p = make_problem(tokens, 48, [width, width], 4, 2, ranks, bias=bias)
    out = run(p, epilogue, in_place=True)
    of = p.projection(epilogue, in_place=True)
    fake = new_result(p.x, of.shape, of.strided_out)
    assert out.shape == fake.shape and out.stride() == fake.stride() == (stride, 1)
    truth = linear_truth(p, epilogue)
    assert error(out, truth) <= 1e-5
    # Paths of a GPU; streamed and tiled, and the fused product.
    configs = [None]
    if tokens <= 32:
        configs += [GemmConfig(16, 32), GemmConfig(16, 32, 1, 4, 2, shrink_split_k=2, tma=True)]
    for config in configs:
        way = config_plan(of.shape, config) if config else cublas_plan(of.shape, tokens, Device("cpu"))
        of.semaphore.zero_()
        found = projection_triton(p.x, of, p.step(), way)
        assert found.stride() == (stride, 1) and error(found, truth) <= 1e-5
