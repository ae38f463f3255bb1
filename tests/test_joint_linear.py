"""W x and A x side by side; with few tokens the deltas are in W x already."""

import pytest
import torch
from ops import DEVICE, delta_truth, error, make_problem
from vllm_adafuse.kernels.joint_linear import joint_linear


def run(p):
    joint = torch.cat([p.weight, p.bank_a.flatten(0, 2)])
    counters = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    return joint_linear(p.x, joint, p.bank_b, p.gates, p.present, counters, 1, p.scratch)


@pytest.mark.parametrize("tokens", [1, 32, 33, 100, 300])
def test_equals_float64(tokens):
    p = make_problem(tokens, 96, [72], 4, 2, 8)
    both, x = run(p), p.x.double()
    y = x @ p.weight.double().T
    if tokens <= 32:
        y = y + delta_truth(p)
    else:
        assert error(both[:, 72:], x @ p.bank_a.flatten(0, 2).double().T) <= 1e-5
    assert error(both[:, :72], y) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 32, 33, 300])
def test_half_precision_is_no_worse_than_plain_torch(tokens):
    p = make_problem(tokens, 1024, [512], 8, 2, 16, dtype=torch.bfloat16)
    y = p.x.double() @ p.weight.double().T + (delta_truth(p) if tokens <= 32 else 0)
    assert error(run(p)[:, :512], y) <= 1.2 * error(y.bfloat16(), y) + 1e-3


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the schema and fakes once")
@pytest.mark.parametrize("tokens", [4, 40])
def test_schema_and_fake(tokens):
    p = make_problem(tokens, 64, [64], 4, 2, 4)
    joint = torch.cat([p.weight, p.bank_a.flatten(0, 2)])
    counters = torch.zeros(2, 4, dtype=torch.int32, device=DEVICE)
    flat = (p.x, joint, p.bank_b, p.gates, p.present, counters, 1, *p.scratch)
    torch.library.opcheck(torch.ops.vllm_adafuse.joint_linear.default, flat)
