"""A projection on pages: ours in steps with adapters, what vLLM runs in the others."""

import pytest
import torch
import torch.nn.functional as F
from ops import error, linear_truth, make_problem
from vllm_adafuse.kernels.page_linear import page_linear
from vllm_adafuse.kernels.pairs import activate_torch


@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("epilogue", ["", "silu", "gelu_tanh"])
def test_adds_deltas_in_steps_with_adapters_alone(tokens, epilogue):
    p = make_problem(tokens, 64, [48, 48], 6, 2, 16, bias=True)
    of = p.projection(epilogue)
    out = page_linear(p.x, of, p.step(), True)
    assert error(out, linear_truth(p, epilogue)) <= 1e-5
    p.gates.fill_(torch.nan)  # nothing of ours is looked at
    out = page_linear(p.x, of, p.step(), False)
    plain = F.linear(p.x, p.weight, p.bias)
    assert error(out, (activate_torch(plain, epilogue) if epilogue else plain).double()) <= 1e-6
