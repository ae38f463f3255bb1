"""SGMM's kernels against float64, over odd shapes; the interpreter runs them without a GPU."""

import pytest
import torch
from ops import DEVICE, delta_truth, error, make_problem
from vllm_adafuse.kernels.sgmm import MAX_DECODE_TOKENS, sgmm, sgmm_torch, sgmm_triton

SHAPES = {
    # tokens, in, widths, experts, k, rank
    "one-token": (1, 200, [72], 4, 2, 8),
    "packed-qkv-gqa": (5, 160, [96, 32, 32], 4, 2, 4),
    "not-a-multiple": (3, 131, [77, 130], 3, 2, 5),
    "rank-one": (2, 64, [64], 2, 1, 1),
    "rank-wide": (2, 70, [66], 2, 1, 100),
    "every-expert": (4, 64, [64], 5, 5, 3),
    "one-expert": (4, 96, [80], 1, 1, 16),
    "many-experts": (3, 64, [64], 64, 3, 2),
    "two-blocks": (70, 64, [64], 4, 2, 4),
}


@pytest.mark.parametrize("run", [sgmm_torch, sgmm_triton])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name, run):
    p = make_problem(*SHAPES[name], gap=3)
    before = p.y.double()
    truth = delta_truth(p)
    run(*p.arguments())
    assert error(p.y.double() - before, truth) <= 1e-5
    # Columns of no part keep every bit.
    untouched = truth.abs().sum(0) == 0
    assert untouched.sum() == 3 * (len(p.widths) + 1)
    assert torch.equal(p.y[:, untouched].double(), before[:, untouched])


# Triton's interpreter multiplies bfloat16 wrongly, so that one waits for a GPU.
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("name", ["packed-qkv-gqa", "two-blocks", "rank-wide"])
def test_half_precision_is_no_worse_than_plain_torch(name, dtype):
    p = make_problem(*SHAPES[name], dtype=dtype)
    truth = p.y.double() + delta_truth(p)
    plain = p.y.clone()
    for t in range(p.x.shape[0]):  # the obvious code, in the same dtype
        for j, e in enumerate(p.expert_ids[t].tolist()):
            column = 0
            for part, (offset, width) in enumerate(zip(p.offsets, p.widths)):
                low = p.bank_a[part, e] @ p.x[t]
                up = low @ p.bank_b[e, :, column : column + width]
                plain[t, offset : offset + width] += p.weights[t, j].to(dtype) * up
                column += width
    sgmm_triton(*p.arguments())
    assert error(p.y, truth) <= 1.2 * error(plain, truth)


@pytest.mark.parametrize("one", [0, 3])
def test_all_tokens_on_one_expert(one):
    p = make_problem(6, 64, [64], 4, 1, 4, one=one)
    before, truth = p.y.double(), delta_truth(p)
    sgmm_triton(*p.arguments())
    assert error(p.y.double() - before, truth) <= 1e-5


def test_a_token_does_not_see_its_company():
    p = make_problem(16, 96, [64, 32], 4, 2, 4)
    other = make_problem(16, 96, [64, 32], 4, 2, 4, seed=1)
    other.bank_a, other.bank_b = p.bank_a, p.bank_b
    for name in ("x", "y", "expert_ids", "weights"):
        getattr(other, name)[5] = getattr(p, name)[5]
    sgmm_triton(*p.arguments())
    sgmm_triton(*other.arguments())
    assert torch.equal(p.y[5], other.y[5])
    assert not torch.equal(p.y[4], other.y[4])


def test_rows_with_zero_weights_stay_bit_for_bit():
    p = make_problem(4, 64, [64], 4, 2, 4)
    p.weights[2] = 0
    before = p.y.clone()
    sgmm_triton(*p.arguments())
    assert torch.equal(p.y[2], before[2]) and not torch.equal(p.y[1], before[1])


@pytest.mark.parametrize("tokens", [4, MAX_DECODE_TOKENS + 1])
def test_the_op_inside_torch_compile(tokens):
    p = make_problem(tokens, 64, [64], 4, 2, 4)
    before, truth = p.y.double(), delta_truth(p)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(y, *rest):
        y = y * 1.0
        sgmm(y, *rest)
        return y

    assert error(f(*p.arguments()).double() - before, truth) <= 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the schema and fakes once")
def test_schema_and_fake():
    p = make_problem(4, 64, [64], 4, 2, 4)
    torch.library.opcheck(torch.ops.vllm_adafuse.sgmm.default, p.arguments())
