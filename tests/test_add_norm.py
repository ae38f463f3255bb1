"""Expand, residual and RMSNorm in one launch, against float64."""

import pytest
import torch
from ops import DEVICE, delta_truth, error, make_problem
from vllm_adafuse.kernels.add_norm import (
    NormConfig,
    add_norm_torch,
    add_norm_triton,
)
from vllm_adafuse.kernels.operands import Norm

SHAPES = {
    # tokens, in, width, experts, k, rank
    "one-token": (1, 48, 72, 4, 2, 8),
    "odd-width": (37, 40, 131, 5, 2, 5),
    "a-tile": (64, 32, 128, 8, 2, 16),
    "every-expert": (33, 32, 64, 3, 3, 4),
    "rank-200": (35, 32, 66, 2, 1, 200),
    "many-experts": (70, 32, 96, 64, 3, 2),
    "one-expert": (40, 24, 80, 1, 1, 16),
}
CONFIGS = {
    "default": None,
    "small": NormConfig(16, 32, 64, 4, 2),
    "at-once": NormConfig(16, 256, 256, 4),
}


def make(shape, dtype=torch.float32, seed=0):
    """A projection's problem, and the product, residual and weight of what follows it."""
    tokens, size_in, width, *mixture = shape
    p = make_problem(tokens, size_in, [width], *mixture, dtype=dtype, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    residual = (2 * torch.randn(tokens, width, generator=g)).to(dtype).to(DEVICE)
    weight = (1 + 0.3 * torch.randn(width, generator=g)).to(dtype).to(DEVICE)
    y = (p.x.double() @ p.weight.double().T).to(dtype)
    s = (p.x.double() @ p.lora_a.flatten(0, 2).double().T).to(dtype)
    return p, torch.cat([y, s], 1), residual, weight


def truth(p, gemm_out, residual, weight, eps, expand=True):
    width = residual.shape[1]
    z = residual.double() + gemm_out[:, :width].double()
    if expand:
        s = gemm_out[:, width:].double().view(len(z), *p.lora_b.shape[1:])
        gated = s * p.gates[: len(z), :, None].double()
        z = z + gated.flatten(1) @ p.lora_b.double().flatten(1).T
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * weight.double(), z


def run(p, gemm_out, residual, weight, expand=True, **options):
    y, s = gemm_out[:, : residual.shape[1]], gemm_out[:, residual.shape[1] :] if expand else None
    return add_norm_triton(y, s, residual, Norm(weight, 1e-5), p.lora_b, p.gates, **options)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name, config):
    p, gemm_out, residual, weight = make(SHAPES[name])
    for found, want in zip(
        run(p, gemm_out, residual, weight, config=CONFIGS[config]),
        truth(p, gemm_out, residual, weight, 1e-5),
    ):
        assert error(found, want) <= 1e-5


@pytest.mark.parametrize("name", SHAPES)
def test_the_reference_equals_float64(name):
    p, _, residual, weight = make(SHAPES[name])
    y = (p.x.double() @ p.weight.double().T + delta_truth(p)).float()
    z = residual.double() + y.double()
    want = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + 1e-5) * weight.double(), z
    for out, exact in zip(add_norm_torch(y, residual, Norm(weight, 1e-5)), want):
        assert error(out, exact) <= 1e-5


@pytest.mark.parametrize("tokens", [1, 5, 32])
def test_deltas_that_are_there_already_are_not_added(tokens):
    p, gemm_out, residual, weight = make((tokens, 48, 100, 4, 2, 8))
    gemm_out[:, 100:] = float("nan")
    found = run(p, gemm_out, residual, weight, expand=False)
    for out, want in zip(found, truth(p, gemm_out, residual, weight, 1e-5, expand=False)):
        assert error(out, want) <= 1e-5


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("name", ["odd-width", "a-tile", "rank-200"])
def test_half_precision_is_no_worse_than_plain_torch(name, dtype):
    p, gemm_out, residual, weight = make(SHAPES[name], dtype)
    exact = truth(p, gemm_out, residual, weight, 1e-5)
    width = residual.shape[1]
    s = gemm_out[:, width:].view(-1, *p.lora_b.shape[1:])
    s = s * p.gates[: len(gemm_out), :, None].to(dtype)
    z = residual + (gemm_out[:, :width] + s.flatten(1) @ p.lora_b.flatten(1).T)
    wide = z.float()
    wide = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    for found, plain, want in zip(run(p, gemm_out, residual, weight), (wide * weight, z), exact):
        assert error(found, want) <= 1.2 * error(plain, want)


def test_a_token_does_not_see_its_company(sums_of_sixteen):
    shape = (48, 64, 96, 4, 2, 4)
    p, gemm_out, residual, weight = make(shape)
    other, both2, residual2, _ = make(shape, seed=1)
    other.lora_b = p.lora_b
    for mine, theirs in ((gemm_out, both2), (residual, residual2), (p.gates, other.gates)):
        theirs[5] = mine[5]
    other.active.fill_(-1)
    one = run(p, gemm_out, residual, weight)
    two = run(other, both2, residual2, weight)
    for a, b in zip(one, two):
        assert torch.equal(a[5], b[5]) and not torch.equal(a[4], b[4])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("split", [1, 2, 4])
def test_slices_are_added(split, config):
    p, gemm_out, residual, weight = make((5, 48, 100, 4, 2, 8))
    slices = torch.randn(split, 5, 100, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    want = truth(p, slices.double().sum(0), residual, weight, 1e-5, expand=False)
    behind = residual, Norm(weight, 1e-5), p.lora_b, p.gates
    found = add_norm_triton(slices, None, *behind, config=CONFIGS[config])
    for out, exact in zip(found, want):
        assert error(out, exact) <= 1e-5
