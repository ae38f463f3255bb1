"""A projection on pages: ours in steps with adapters, what vLLM runs in the others."""

import pytest
import torch
import torch.nn.functional as F
from ops import DEVICE, error, linear_truth, make_problem
from test_kv_slots import make_pages, wanted
from vllm_adafuse.kernels.add_norm import add_norm_torch
from vllm_adafuse.kernels.device.epilogues import activate_torch, rotate_torch
from vllm_adafuse.kernels.operands import Norm
from vllm_adafuse.kernels.page_projection import (
    epilogue_triton,
    page_projection,
    page_projection_norm,
)
from vllm_adafuse.kernels.projection import epilogue_torch


@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("epilogue", ["", "silu", "gelu_tanh"])
def test_adds_deltas_in_steps_with_adapters_alone(tokens, epilogue):
    p = make_problem(tokens, 64, [48, 48], 6, 2, 16, bias=True)
    of = p.projection(epilogue)
    out = page_projection(p.x, of, p.step(), True)
    assert error(out, linear_truth(p, epilogue)) <= 1e-5
    p.gates.fill_(torch.nan)  # nothing of ours is looked at
    out = page_projection(p.x, of, p.step(), False)
    plain = F.linear(p.x, p.weight, p.bias)
    assert error(out, (activate_torch(plain, epilogue) if epilogue else plain).double()) <= 1e-6


@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_the_norm_has_the_deltas_of_steps_with_adapters(tokens):
    p = make_problem(tokens, 64, [96], 6, 2, 16)
    norm = Norm(torch.rand(96, device=DEVICE) + 0.5, 1e-5)
    of, residual = p.projection("norm", norm=norm), torch.randn(tokens, 96, device=DEVICE)
    double = Norm(norm.weight.double(), norm.eps)
    truth = add_norm_torch(linear_truth(p), residual.double(), double)
    for found, want in zip(page_projection_norm(p.x, residual, of, p.step(), True), truth):
        assert error(found, want) <= 1e-5
    p.gates.fill_(torch.nan)
    truth = add_norm_torch((p.x.double() @ p.weight.double().T), residual.double(), double)
    for found, want in zip(page_projection_norm(p.x, residual, of, p.step(), False), truth):
        assert error(found, want) <= 1e-5


@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("widths", [[64, 64], [140, 140]])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_an_activation_alone(tokens, widths, activation):
    p = make_problem(tokens, 32, widths, 40, 2, 16)
    p.lora_b.fill_(torch.nan)
    y = torch.randn(tokens, sum(widths), device=DEVICE)
    of = p.projection(activation)
    found = epilogue_triton(y, of, p.step())
    assert error(found, epilogue_torch(y.double(), of, p.step())) <= 1e-6
    assert found.is_contiguous()


@pytest.mark.parametrize("tokens", [1, 40, 300])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_turned_heads_alone(tokens, layout):
    """In place of what vLLM would launch: queries turned, keys and values in the cache."""
    widths, dim = [128, 64, 64], 32
    p = make_problem(tokens, 32, widths, 40, 2, 16)
    p.lora_b.fill_(torch.nan)
    cos_sin = torch.randn(tokens, dim, device=DEVICE)
    y, of = torch.randn(tokens, 256, device=DEVICE), p.projection("rotary", cos_sin)
    truth = rotate_torch(y.double(), cos_sin, 192)
    assert error(epilogue_triton(y.clone(), of, p.step(cos_sin)), truth) <= 1e-6
    pages = make_pages(tokens, 2, dim, layout=layout)
    found = epilogue_triton(y, of, p.step(cos_sin), pages)
    want = wanted(truth, pages, widths)
    assert error(found[:, :128], truth[:, :128]) <= 1e-6
    assert error(pages.keys, want.keys) <= 1e-6
    assert error(pages.values, want.values) <= 1e-6
