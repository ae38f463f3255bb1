"""W x and A x side by side, or sums of slices that hold the deltas, and the norm behind them."""

import pytest
import torch
from ops import DEVICE, delta_truth, error, make_problem
from vllm_adafuse.kernels.joint_linear import joint_linear, leave_slices, sliced_cut
from vllm_adafuse.kernels.residual_norm import residual_norm
from vllm_adafuse.kernels.tiles import Tiles


def joint_of(p):
    return torch.cat([p.weight, p.bank_a.flatten(0, 2)])


def run(p):
    counters = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    return joint_linear(p.x, joint_of(p), p.bank_b, p.gates, p.present, counters, 1, p.scratch)


def run_with_norm(p, residual, weight):
    return residual_norm(
        run(p), residual, weight, 1e-5, p.bank_b, p.gates, p.present, p.scratch, p.x.shape[1]
    )


def both_truth(p, residual, weight, dtype=torch.float64):
    """Normed and residual in float64; or as plain torch would in `dtype`, op by op."""
    y = p.x.to(dtype) @ p.weight.to(dtype).T + delta_truth(p).to(dtype)
    z = residual.to(dtype) + y
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
    for found, want in zip(run_with_norm(p, residual, weight), both_truth(p, residual, weight)):
        assert error(found, want) <= 1e-5


@pytest.mark.parametrize("tokens", [130, 300])
def test_longer_steps_leave_both_products(tokens):
    p, *_ = make(tokens, 96, 72)
    assert sliced_cut(p.x, 96, 72) is None
    assert error(run(p), p.x.double() @ joint_of(p).double().T) <= 1e-5


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 17, 32])
def test_slices_are_left_unadded(tokens, split):
    p, *_ = make(tokens, 200, 72)
    counter = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    cut = Tiles(16, 32, split, 4, 2, 32, 2)
    slices = leave_slices(p.x, joint_of(p), p.bank_b, p.gates, p.present, counter, p.scratch, cut)
    assert slices.shape == (split, tokens, 72) and slices.dtype == torch.float32
    assert error(slices.sum(0), p.x.double() @ p.weight.double().T + delta_truth(p)) <= 1e-5
    assert split == 1 or error(slices[0], slices.sum(0).double()) > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 17, 32, 33, 64, 100, 128, 129, 300, 9000])
def test_half_precision_is_no_worse_than_plain_torch(tokens):
    p, residual, weight = make(tokens, 1024, 512, torch.bfloat16, (8, 2, 16))
    exact = both_truth(p, residual, weight)
    plain = both_truth(p, residual, weight, torch.bfloat16)
    for found, rough, want in zip(run_with_norm(p, residual, weight), plain, exact):
        assert error(found, want) <= 1.2 * error(rough, want)


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the schema and fakes once")
@pytest.mark.parametrize("tokens", [4, 40])
def test_schema_and_fake(tokens):
    p, *_ = make(tokens, 64, 64)
    counters = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    flat = (p.x, joint_of(p), p.bank_b, p.gates, p.present, counters, 1, *p.scratch)
    torch.library.opcheck(torch.ops.vllm_adafuse.joint_linear.default, flat)
