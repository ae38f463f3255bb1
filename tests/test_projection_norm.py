"""Projection, residual and RMSNorm in one op, against float64."""

import pytest
import torch
from ops import DEVICE, delta_truth, error, make_problem, plain_delta
from vllm_adafuse.kernels import dispatch, projection
from vllm_adafuse.kernels import projection_norm as module
from vllm_adafuse.kernels.configs import GemmConfig
from vllm_adafuse.kernels.dispatch import cublas_plan
from vllm_adafuse.kernels.operands import Norm
from vllm_adafuse.kernels.plans import Device, Shape
from vllm_adafuse.kernels.projection import split_k_product
from vllm_adafuse.kernels.projection_norm import (
    projection_norm,
    projection_norm_triton,
    split_k_triton,
)


def run(p, residual, weight):
    return projection_norm(p.x, residual, p.projection("norm", norm=Norm(weight, 1e-5)), p.step())


def truth(p, residual, weight, dtype=torch.float64):
    """Normed and residual in float64; or as plain torch would in `dtype`, op by op."""
    delta = delta_truth(p) if dtype == torch.float64 else plain_delta(p)
    z = residual.to(dtype) + (p.x.to(dtype) @ p.weight.to(dtype).T + delta)
    wide = z.double() if dtype == torch.float64 else z.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return normed.to(dtype) * weight.to(dtype), z


def make(tokens, size_in, width, dtype=torch.float32, mixture=(4, 2, 8)):
    p = make_problem(tokens, size_in, [width], *mixture, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    residual = torch.randn(tokens, width, generator=g).to(dtype).to(DEVICE)
    weight = (1 + 0.3 * torch.randn(width, generator=g)).to(dtype).to(DEVICE)
    return p, residual, weight


@pytest.mark.parametrize("tokens", [1, 16, 17, 32, 33, 100, 130, 300])
def test_equals_float64(tokens):
    p, residual, weight = make(tokens, 96, 72)
    found = run(p, residual, weight)
    for out, want in zip(found, truth(p, residual, weight)):
        assert error(out, want) <= 1e-5


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 32])
def test_slices_are_left_unadded(tokens, tma, split):
    p, *_ = make(tokens, 200, 72)
    config = GemmConfig(16, 32, split, 4, 2, 32, 2, tma)
    slices = split_k_triton(p.x, p.projection("norm"), p.step(), config)
    assert slices.shape == (split, tokens, 72) and slices.dtype == torch.float32
    assert error(slices.sum(0), p.x.double() @ p.weight.double().T + delta_truth(p)) <= 1e-5
    assert split == 1 or error(slices[0], slices.sum(0).double()) > 0.1


def test_cublas_takes_slices_where_programs_are_few():
    """Two slices of `in`, where tiles of 64 rows are half of a large GPU's processors, or `in` is
    long; never of float32, nor in long steps."""


    def slices(tokens, size_in, out, ranks=128, itemsize=2):
        of = Shape(size_in, (out,), (0,), ranks // 8 or 1, 8, itemsize, "norm")
        return cublas_plan(of, tokens, Device("cpu")).split_k

    assert slices(128, 4096, 4096) == 2
    assert slices(256, 11008, 4096) == 2
    assert slices(100, 13824, 5120) == 2
    assert slices(128, 5120, 5120) == 1
    assert slices(128, 4096, 4096, itemsize=4) == 1
    assert slices(257, 4096, 4096) == 1 and slices(7, 4096, 4096) == 1
    assert slices(128, 4096, 4093) == 1 and slices(128, 4096, 4096, 136) == 1


@pytest.mark.parametrize("split", [1, 2, 4])
def test_a_split_k_product(split):
    p, *_ = make(40, 96, 72)
    padded = torch.cat([p.x, p.x], 1)[:, :96]  # rows with gaps
    y, s = split_k_product(padded, p.projection("norm"), split)
    assert y.shape == (split, 40, 72) and s.shape == (split, 40, 32)
    assert error(y.sum(0), p.x.double() @ p.weight.double().T) <= 1e-5
    assert error(s.sum(0), p.x.double() @ p.lora_a.flatten(0, 2).double().T) <= 1e-5


MIXTURES = [(8, 2, 16), (16, 2, 16), (5, 2, 32), (65, 2, 16), (65, 2, 32)]


@pytest.mark.parametrize(
    "mixture, widens",
    [((20, 3, 9), False), *((m, False) for m in MIXTURES), *((m, True) for m in MIXTURES)],
)
def test_long_steps_of_many_ranks(mixture, widens, monkeypatch):
    """By cuBLAS up to so many ranks: all of it from `MIN_FUSED_NORM_TOKENS` on, where the norm
    follows at once; before that as much as `expand_long` is told."""
    if widens and DEVICE == "cuda":
        pytest.skip("float32 does not fit a GPU's shared memory there, and is never taken")
    calls, dense = [], projection.dense_expand_triton

    def count(*arguments):
        calls.append(arguments[6:])
        dense(*arguments)

    for place in module, projection:
        monkeypatch.setattr(place, "dense_expand_triton", count)
    experts, _, rank = mixture
    limit = "MAX_SHORT_TOKENS" if widens else "MIN_FUSED_NORM_TOKENS"
    monkeypatch.setattr(dispatch, limit, 40)
    of = Shape(32, (128,), (0,), experts, rank, 2, "norm")  # as if of two bytes
    way = cublas_plan.__wrapped__(of, 70, Device("a GPU", 9))
    p, residual, weight = make(70, 32, 128, mixture=mixture)
    p.x = torch.cat([p.x, p.x], 1)[:, :32]  # rows with gaps
    norm = Norm(weight, 1e-5)
    found = projection_norm_triton(p.x, residual, p.projection("norm", norm=norm), p.step(), way)
    dense = 128 < experts * rank <= dispatch.MAX_DENSE_RANKS
    assert calls == ([(128 // rank if widens else 0,)] if dense else [])
    for out, want in zip(found, truth(p, residual, weight)):
        assert out.is_contiguous() and error(out, want) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("size_in", [1024, 4096])
@pytest.mark.parametrize(
    "tokens, experts",
    [
        *((n, 8) for n in (1, 8, 17, 32, 33, 64, 100, 128, 129, 256, 300, 1000, 9000)),
        *((n, e) for n in (5000, 9000) for e in (16, 20)),
    ],
)
def test_half_precision_is_no_worse_than_plain_torch(tokens, size_in, experts):
    p, residual, weight = make(tokens, size_in, 512, torch.bfloat16, (experts, 2, 16))
    exact = truth(p, residual, weight)
    plain = truth(p, residual, weight, torch.bfloat16)
    found = run(p, residual, weight)
    for out, rough, want in zip(found, plain, exact):
        assert error(out, want) <= 1.2 * error(rough, want)
