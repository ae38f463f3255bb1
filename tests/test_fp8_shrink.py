"""Experts in fp8: what rounding leaves of them, and every kernel on them against float64 of that."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from fake_gpu import computing
from ops import (
    DEVICE,
    delta_truth,
    error,
    leave_pages_to_tiles,
    linear_truth,
    make_problem,
    plain_delta,
    shrink_truth,
)
from test_kv_slots import make_pages, wanted
from triton.runtime import interpreter
from vllm_adafuse.format.fp8 import round_pair, widened
from vllm_adafuse.kernels import projection as projections
from vllm_adafuse.kernels.add_norm import add_norm_torch
from vllm_adafuse.kernels.device.epilogues import activate_torch, rotate_torch
from vllm_adafuse.kernels.dispatch import TOKEN_LIMITS, plan
from vllm_adafuse.kernels.fp8_shrink import fp8_shrink_triton
from vllm_adafuse.kernels.operands import Norm
from vllm_adafuse.kernels.page_projection import page_projection, page_projection_norm
from vllm_adafuse.kernels.plans import (
    DECODE_GEMM,
    EXPAND,
    FP8_SHRINK,
    SHRINK,
    Device,
    Plan,
    Shape,
    on_pages,
)
from vllm_adafuse.kernels.sgmm import sgmm

DEVICES = Device("cpu"), Device("a GPU", 8), Device("a GPU", 9), Device("NVIDIA H200", 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_costs_a_sixteenth_at_most_and_widens_to_the_same(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(3, 5, 40).to(dtype), (torch.randn(3, 30, 5) / 100).to(dtype)
    a[0, 1] *= 1e-3
    kept, scale = round_pair(a, b)[:2], round_pair(a, b)[2]
    for x, left, dim in zip((a, b), widened(a, b), (-1, -2)):
        x, left = x.double(), left.double()
        most = x.abs().amax(dim, keepdim=True)
        off = (x - left).abs() / torch.maximum(x.abs(), most * 2**-14)
        assert 1 / 40 < off.max() <= 1 / 16
    assert all(x.dtype == torch.float8_e4m3fn for x in kept)
    product = (kept[1].double() * scale.double()[:, None]) @ kept[0].double()
    left = widened(a.float(), b.float())
    assert torch.equal(product, left[1].double() @ left[0].double())
    # Of what was rounded once nothing is lost any more.
    assert all(torch.equal(x, y) for x, y in zip(widened(*left), left))


def test_rows_of_zeros_and_of_the_largest_numbers():
    a = torch.tensor([[0.0, 0.0], [448.0, -449.0], [3e38, 1.0], [1e-40, 0.0], [0.875, -0.875]])
    b = torch.zeros(3, 5)
    qa, qb, scale = round_pair(a, b)
    assert torch.isfinite(qa.float()).all() and (qb.float() == 0).all()
    assert torch.isfinite(scale).all() and (scale > 0).all()
    left = widened(a, b)[0]
    assert torch.equal(left[0], a[0]) and torch.equal(left[4], a[4])
    assert torch.equal(left[1], torch.tensor([448.0, -448.0]))
    assert left[2, 0] == pytest.approx(3e38, rel=1 / 16)


def test_experts_that_share_an_a():
    a, b = torch.randn(1, 4, 20), torch.randn(3, 30, 4)
    qa, qb, scale = round_pair(a, b)
    assert qa.shape == a.shape and qb.shape == b.shape and scale.shape == (3, 4)
    for i in range(3):
        assert torch.equal(scale[i], round_pair(a[0], b[i])[2])


# Tokens, pages: by the list and by bits, shrinks alone and long, blocks listed by tiles.
STEPS = {
    (1, 3): (DECODE_GEMM, SHRINK), (5, 20): (DECODE_GEMM, SHRINK), (3, 70): (DECODE_GEMM, FP8_SHRINK),
    (40, 12): (SHRINK, SHRINK), (33, 66): (FP8_SHRINK, FP8_SHRINK), (70, 5): (FP8_SHRINK, FP8_SHRINK),
    (290, 6): (FP8_SHRINK, FP8_SHRINK), (290, 20): (FP8_SHRINK, FP8_SHRINK),
}  # fmt: skip
SLICES = {"": ([40, 50, 30], [0, -1, 1]), "one": ([40, 50, 30], [0, 0, 0]), "silu": ([64, 64], None),
          "gelu_tanh": ([70, 70], None)}  # fmt: skip


# Of a real GPU names are not told.
ON_CUDA = [] if DEVICE == "cuda" else None


def launched():
    """The names of the kernels that are launched within it, where there is a GPU or one is played."""
    return nullcontext([]) if DEVICE == "cuda" else computing()


def of_step(tokens, pages, widths, adapted=None, dtype=torch.float32, **more):
    """A problem of some pages, and the lists of its tiles where a step has them. The last tile's names
    none, though tokens have gates; nor are the bits of a step told that goes by its list of pages."""
    p = make_problem(tokens, 72, widths, pages, 2, 16, dtype, adapted=adapted, **more)
    listed = leave_pages_to_tiles(p, [(2, 1)]) if tokens > 256 and pages > 8 else None
    if listed is not None:
        listed[-1, 0] = 0
    return p, listed


def as_told(truth, listed):
    """The problem as a step that goes by its lists is to compute it."""
    gates = truth.gates.clone()
    if listed is not None:
        gates[128 * (len(listed) - 1) : len(truth.x)] = 0
    return replace(truth, gates=gates)


@pytest.mark.parametrize("step, slices", [*zip(STEPS, [*SLICES] * 2), ((290, 20), ""), ((5, 20), "silu")])
def test_a_projection_of_any_length(step, slices, monkeypatch):
    handed = []

    def shrink(*operands):
        handed.append(operands[-1])
        return fp8_shrink_triton(*operands)

    monkeypatch.setattr(projections, "fp8_shrink_triton", shrink)
    epilogue = slices if slices in ("silu", "gelu_tanh") else ""
    p, listed = of_step(*step, *SLICES[slices], bias=True)
    truth, of = p.in_fp8(epilogue)
    if step[0] <= 32:
        p.active[0] = 0
    with launched() as names:
        of = replace(of)  # with its plans
        way = plan(of.shape, step[0], Device("a GPU", 9))
        found = page_projection(p.x, of, p.step(tile_blocks=listed), True)
    assert way.kernel == STEPS[step][0]
    assert DEVICE == "cuda" or f"_{way.kernel}_kernel" in names
    assert error(found, linear_truth(as_told(truth, listed), epilogue)) <= 1e-5
    assert all(of is listed for of in handed) and len(handed) == (way.kernel == FP8_SHRINK)


@pytest.mark.parametrize("step", STEPS)
def test_beside_a_quantised_projection(step):
    p, listed = of_step(*step, *SLICES[""])
    truth, of = p.in_fp8(fused=False)
    y = torch.randn(step[0], 120).to(p.x)
    before = y.double()
    with launched() as names:
        of = replace(of)
        sgmm(y, p.x, of, p.step(tile_blocks=listed))
    assert names in ([f"_{STEPS[step][1]}_kernel", "_expand_kernel"], ON_CUDA)
    assert error(y.double() - before, delta_truth(as_told(truth, listed))) <= 1e-5


@pytest.mark.parametrize("step", [(5, 20), (40, 12), (290, 20)])
def test_before_a_norm(step):
    p, listed = of_step(*step, [96])
    truth, of = p.in_fp8("norm", norm=Norm(torch.rand(96, device=DEVICE) + 0.5, 1e-5))
    residual = torch.randn(step[0], 96, device=DEVICE)
    double = Norm(of.norm.weight.double(), 1e-5)
    want = add_norm_torch(linear_truth(as_told(truth, listed)), residual.double(), double)
    with launched() as names:
        of = replace(of)
        found = page_projection_norm(p.x, residual, of, p.step(tile_blocks=listed), True)
    assert names[-1:] in (["_add_norm_kernel"], ON_CUDA)
    assert max(map(error, found, want)) <= 1e-5


@pytest.mark.parametrize("step", [(5, 20), (70, 5)])
def test_turned_heads_go_into_the_cache(step):
    widths, dim = [128, 64, 64], 32
    p, listed = of_step(*step, widths)
    cos_sin = torch.randn(step[0], dim, device=DEVICE)
    truth, of = p.in_fp8("rotary", cos_sin)
    slots = make_pages(step[0], 2, dim)
    with launched():
        of = replace(of)
        found = page_projection(p.x, of, p.step(cos_sin, listed), True, slots)
    turned = rotate_torch(linear_truth(truth), cos_sin.double(), 192)
    want = wanted(turned, slots, widths)
    assert error(found[:, :128], turned[:, :128]) <= 1e-5
    assert error(slots.keys, want.keys) <= 1e-5 and error(slots.values, want.values) <= 1e-5


def test_plain_torch_is_the_reference():
    for epilogue in ("", "silu"):
        p, _ = of_step(40, 12, [64, 64], bias=True)
        truth, of = p.in_fp8(epilogue)
        assert error(page_projection(p.x, of, p.step(), True), linear_truth(truth, epilogue)) <= 1e-5
    p, _ = of_step(40, 12, [64, 64])
    truth, of = p.in_fp8(fused=False)
    y = torch.zeros(40, 128, device=DEVICE)
    sgmm(y, p.x, of, p.step())
    assert error(y, delta_truth(truth)) <= 1e-5


def test_steps_without_adapters_look_at_no_page():
    p, _ = of_step(40, 12, [64, 64], bias=True)
    _, of = p.in_fp8("silu")
    p.gates.fill_(torch.nan)
    of.lora_b.view(torch.uint8).fill_(0x7F)  # NaN
    with launched() as names:
        of = replace(of)
        found = page_projection(p.x, of, p.step(), False)
    plain = p.x.double() @ p.weight.double().T + p.bias.double()
    assert names in (["_expand_kernel"], ON_CUDA)
    assert error(found, activate_torch(plain, "silu")) <= 1e-6


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("step", [(5, 20), (40, 12), (290, 20)])
def test_half_precision_is_no_worse_than_plain_torch(step, dtype):
    p, listed = of_step(*step, [64, 64], dtype=dtype)
    truth, of = p.in_fp8()
    truth = as_told(truth, listed)
    exact = linear_truth(truth)
    plain = (p.x @ p.weight.T + plain_delta(truth)).to(dtype)
    with launched():
        of = replace(of)
        found = page_projection(p.x, of, p.step(tile_blocks=listed), True)
    assert error(found, exact) <= 1.2 * error(plain, exact)


@pytest.mark.parametrize("tokens, pages", [(40, 5), (1100, 9)])
def test_the_long_shrink_reads_what_tokens_have(tokens, pages, monkeypatch):
    """Not x of others, and no page that no token of a tile has."""
    p, listed = of_step(tokens, pages, [64, 64])
    _, of = p.in_fp8()
    numbers = of.lora_a.double() * of.lora_scale[..., None].double()
    want = shrink_truth(replace(p, lora_a=numbers))  # B's factors are in s
    unused = (p.gates[:tokens] == 0).all(0)
    of.lora_a.view(torch.uint8)[:, unused] = 0x7F  # NaN
    empty = torch.Tensor.new_empty

    def of_nan(x, *shape, **options):
        made = empty(x, *shape, **options)
        return made.fill_(torch.nan) if made.dtype == torch.float32 else made

    monkeypatch.setattr(torch.Tensor, "new_empty", of_nan)
    found = fp8_shrink_triton(p.x, of.lora_a, p.gates, listed).unflatten(1, (2, -1))
    assert found[-1].isnan().all() == (listed is not None)  # no block is listed there
    products = []
    dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda *of: products.append(1) or dot(*of)
    )
    fp8_shrink_triton(p.x, of.lora_a, p.gates * 0, listed)
    assert not products
    if listed is None:
        assert error(found, want) <= 1e-5
    for tile, blocks in enumerate([] if listed is None else listed.tolist()):
        for block in blocks[1 : 1 + blocks[0]]:
            at = slice(128 * tile, 128 * tile + 128), slice(None), slice(128 * block, 128 * block + 128)
            assert error(found[at], want[at]) <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pages", [4, 32, 64, 65, 500])
@pytest.mark.parametrize("fused", [True, False])
def test_no_step_takes_what_does_not_know_fp8(device, pages, fused):
    shapes = (
        Shape(4096, (4096, 1024, 1024), (0, 1, 2), pages, 16, 2, "rotary" * fused, 128 * fused),
        Shape(4096, (14336, 14336), (0, 1), pages, 16, 2, "silu" * fused, has_bias=True),
        Shape(14336, (4096,), (0,), pages, 16, 2, "norm" * fused),
    )
    for shape in shapes:
        shape = on_pages(replace(shape, fp8=True, fused=fused))
        assert shape.fused_rows == shape.size_out
        for tokens in sorted({n + more for n in TOKEN_LIMITS for more in (-1, 0, 1)} - {0}):
            way = plan(shape, tokens, device)
            if fused and tokens <= 32:
                assert way.kernel == DECODE_GEMM and not way.config.tma
                continue
            few = tokens <= 64 and pages <= 64
            assert way == Plan(SHRINK if few else FP8_SHRINK, expand=EXPAND)


def test_a_scale_that_stands_elsewhere_is_refused():
    p, _ = of_step(3, 4, [64])
    _, of = p.in_fp8()
    for wrong in (
        {"lora_scale": of.lora_scale.clone()}, {"lora_scale": None},
        {"shape": replace(of.shape, fp8=False)}, {"lora_a": p.lora_a},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected float8_e4m3fn right behind a lora_scale"):
            replace(of, **wrong)
