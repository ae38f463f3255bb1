"""The adapted projection as one op, on every path that the number of tokens selects."""

import pytest
import torch
from ops import DEVICE, error, linear_truth, make_problem
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm_adafuse.kernels.configs import Tiles
from vllm_adafuse.kernels.dispatch import config_plan, cublas_plan, plan, serves
from vllm_adafuse.kernels.linear import linear, linear_triton, stays_in_place
from vllm_adafuse.kernels.pairs import rotate_torch
from vllm_adafuse.kernels.plans import DECODE_GEMM, TMA_GEMM, Device, Shape

# On a GPU: the streaming kernel, the tiled one, and the joint product with two kinds of expand.
TOKENS = [1, 32, 33, 100]
LONG = [300, 2500]


def arguments(p, activation="", cos_sin=None, in_place=False):
    joint = torch.cat([p.weight, p.bank_a.view(-1, p.x.shape[1])])
    counters = torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
    return (
        p.x, joint, p.bias, p.bank_b, p.gates, p.present, counters, 1, p.scratch,
        p.parts, p.widths, activation, cos_sin, "", in_place,
    )  # fmt: skip


def shape(p, activation):
    out = tuple(p.widths), tuple(p.parts), *p.bank_b.shape[1:]
    return Shape(p.x.shape[1], *out, 4, activation, has_bias=p.bias is not None)


def flat(p, activation, in_place=False):
    """The arguments of the op below `linear`."""
    x, *rest = arguments(p, activation)
    scratch = rest.pop(7)
    *rest, cos_sin, cache, _ = rest
    return (x, *rest[:7], *scratch, cos_sin, *rest[7:], cache, in_place)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    "activation,parts", [("", [0, 1]), ("", [-1, 0]), ("silu", [0, 1]), ("silu", [-1, 0])]
)
def test_equals_float64(tokens, activation, parts):
    p = make_problem(tokens, 96, [80, 80], 4, 2, 4, parts=parts, bias=True)
    out = linear(*arguments(p, activation))
    assert error(out, linear_truth(p, activation)) <= 1e-5


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("parts", [[0, 1, 2], [-1, 0, 1]])
def test_queries_and_keys_are_turned(tokens, parts):
    p = make_problem(tokens, 96, [128, 64, 64], 4, 2, 4, parts=parts, bias=True)
    cos_sin = torch.randn(tokens + 2, 64, device=DEVICE)
    out = linear(*arguments(p, "rotary", cos_sin))
    assert error(out, rotate_torch(linear_truth(p), cos_sin, 192)) <= 1e-5


@pytest.mark.parametrize("ranks", [4, 3])  # 3: rows of [W; A] that are no multiple of 16 bytes
@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_products_of_the_vendor_and_an_expand(bias, activation, ranks):
    p = make_problem(300, 48, [64, 64], 1, 1, ranks, bias=bias)
    x, joint, _, *rest = arguments(p, activation)
    counters, scratch, parts, widths = rest[3], *rest[5:8]
    way = cublas_plan(shape(p, activation), 300, Device("cpu"))
    assert way.one_gemm == (ranks == 4 and not bias)
    out = linear_triton(
        x, joint, p.bias, p.bank_b, p.gates, p.present, counters[1], scratch, parts, widths,
        activation, None, way,
    )  # fmt: skip
    assert out.is_contiguous() and error(out, linear_truth(p, activation)) <= 1e-5


@pytest.mark.parametrize(
    "tokens,experts,tiled",
    [
        (16, 8, False), (17, 8, True), (32, 32, True),
        (17, 33, False), (32, 33, False), (33, 33, True),
    ],
)  # fmt: skip
def test_tiles_or_a_stream_by_tokens_and_ranks(tokens, experts, tiled):
    of = Shape(4096, (4096, 4096, 4096), (0, 1, 2), experts, 16, 2, "rotary", 128)
    way = plan(of, tokens, Device("a GPU", 9))
    assert way.kernel == (TMA_GEMM if tiled else DECODE_GEMM)
    assert way.config.tma == tiled and serves(way.config, tokens, True)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS + LONG)
@pytest.mark.parametrize("activation", ["", "silu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse_than_plain_torch(tokens, activation, dtype):
    p = make_problem(tokens, 1024, [512, 512], 8, 2, 16, dtype=dtype)
    truth, plain = linear_truth(p, activation), linear_truth(p, activation, dtype)
    assert error(linear(*arguments(p, activation)), truth) <= 1.2 * error(plain, truth)


@pytest.mark.gpu
def test_a_captured_graph_replays_with_other_routes():
    p = make_problem(8, 512, [256, 256], 4, 2, 8)
    other = make_problem(8, 512, [256, 256], 4, 2, 8, seed=1)
    call = arguments(p)
    linear(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call[6].zero_()
        out = linear(*call)
    for gates, present in ((other.gates, other.present), (p.gates.clone(), p.present.clone())):
        p.gates.copy_(gates), p.present.copy_(present)
        graph.replay()
        assert error(out, linear_truth(p)) <= 1e-5


def test_inside_torch_compile():
    p = make_problem(4, 64, [64], 4, 2, 4)
    call = arguments(p)
    compiled = torch.compile(
        lambda x: linear(x * 2.0, *call[1:]) + 1.0, fullgraph=True, backend="aot_eager"
    )
    p.x *= 0.5
    out = compiled(p.x) - 1.0
    p.x *= 2.0
    assert error(out, linear_truth(p)) <= 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the schema and fakes once")
@pytest.mark.parametrize("activation", ["", "silu"])
def test_schema_and_fake(activation):
    p = make_problem(4, 64, [64, 64], 4, 2, 4)
    torch.library.opcheck(torch.ops.vllm_adafuse.linear.default, flat(p, activation))


# Rows of [W; A] here: 160. Not in place: no pairs, a bias, ranks that make it 152, odd columns.
@pytest.mark.parametrize(
    "activation,bias,ranks,width,stride",
    [
        ("silu", False, 4, 64, 160), ("gelu_tanh", False, 4, 64, 160), ("", False, 4, 64, 128),
        ("silu", True, 4, 64, 64), ("silu", False, 3, 64, 64), ("silu", False, 4, 72, 72),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [*TOKENS, 300])
def test_every_path_leaves_the_layout_that_the_fake_tells(
    tokens, activation, bias, ranks, width, stride
):
    p = make_problem(tokens, 48, [width, width], 4, 2, ranks, bias=bias)
    out = linear(*arguments(p, activation, in_place=True))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a
                 for a in flat(p, activation, True)]  # fmt: skip
        fake = torch.ops.vllm_adafuse.linear.default(*given)
    assert out.shape == fake.shape and out.stride() == fake.stride() == (stride, 1)
    truth = linear_truth(p, activation)
    assert error(out, truth) <= 1e-5
    # Paths of a GPU; streamed and tiled, and the joint product.
    x, joint, _, _, gates, present, counters, _, scratch, parts, widths, *_ = arguments(p)
    cuts = [None]
    if tokens <= 32:
        cuts += [Tiles(16, 32), Tiles(16, 32, 1, 4, 2, slices=2, tma=True)]
    whole = stays_in_place(joint, p.bias, widths, activation, True)
    of = shape(p, activation)
    for i, cut in enumerate(cuts):
        way = config_plan(of, cut) if cut else cublas_plan(of, tokens, Device("cpu"))
        found = linear_triton(
            x, joint, p.bias, p.bank_b, gates, present, counters[i], scratch, parts, widths,
            activation, None, way, in_place=whole,
        )  # fmt: skip
        assert found.stride() == (stride, 1) and error(found, truth) <= 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="Inductor's checks of layouts, once")
def test_compiled_down_reads_rows_with_gaps():
    up, down = make_problem(7, 64, [32, 32], 2, 1, 8), make_problem(7, 32, [64], 2, 1, 8)
    first, second = arguments(up, "silu", in_place=True), arguments(down)
    compiled = torch.compile(
        lambda x: linear(linear(x * 2.0, *first[1:]), *second[1:]) + 1.0,
        fullgraph=True, dynamic=True,
    )  # fmt: skip
    down.x = linear(up.x, *first[1:])
    assert down.x.stride() == (96, 1)
    assert error(compiled(up.x * 0.5) - 1.0, linear_truth(down)) <= 1e-5
