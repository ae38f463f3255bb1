"""A projection on pages: ours in steps with adapters, what vLLM runs in the others."""

import pytest
import torch
import torch.nn.functional as F
from ops import DEVICE, error, joint_of, linear_truth, make_problem
from vllm_adafuse.kernels.page_linear import page_linear
from vllm_adafuse.kernels.pairs import activate_torch


def arguments(p, active, activation):
    counters = torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
    return (
        p.x, torch.tensor([active]), joint_of(p), p.bias, p.bank_b, p.gates, p.present, counters, 1,
        p.scratch, p.parts, p.widths, activation,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("activation", ["", "silu", "gelu_tanh"])
def test_adds_deltas_in_steps_with_adapters_alone(tokens, activation):
    p = make_problem(tokens, 64, [48, 48], 6, 2, 16, bias=True)
    out = page_linear(*arguments(p, True, activation))
    assert error(out, linear_truth(p, activation)) <= 1e-5
    p.gates.fill_(torch.nan)  # nothing of ours is looked at
    out = page_linear(*arguments(p, False, activation))
    plain = F.linear(p.x, p.weight, p.bias)
    assert error(out, (activate_torch(plain, activation) if activation else plain).double()) <= 1e-6


@pytest.mark.parametrize("active", [True, False])
def test_the_op_is_what_torch_compile_expects(active):
    p = make_problem(5, 64, [32, 32], 6, 2, 16)
    x, on, *rest, scratch, parts, widths, activation = arguments(p, active, "silu")
    torch.library.opcheck(
        torch.ops.vllm_adafuse.page_linear.default,
        (x, on, *rest, *scratch, parts, widths, activation),
    )
