"""From a product [W; A; routers] x to the projection's output in one launch, against float64."""

import pytest
import torch
from ops import DEVICE, error
from test_layer_linear import problem
from test_layer_sgmm import CASES
from vllm_adafuse.kernels.dispatch import layer_expands
from vllm_adafuse.kernels.layer_expand import layer_expand_triton
from vllm_adafuse.kernels.pairs import activate_torch
from vllm_adafuse.kernels.route_layer import LayerGate


def run(x, joint, *rest):
    assert layer_expands(1, *rest[7].shape[1:])
    return layer_expand_triton(x @ joint.t(), *rest)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name, bias):
    arguments, gate, expected = problem(name, bias)
    out = run(*arguments, "", gate)
    assert error(out.cpu(), expected) <= 1e-5


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("name", ["packed", "gate-up", "gate-alone"])
def test_with_the_activation_of_gate_up(name, activation):
    arguments, gate, expected = problem(name, True)
    out = run(*arguments, activation, gate)
    assert error(out.cpu(), activate_torch(expected, activation)) <= 1e-5


@pytest.mark.parametrize("name", ["block", "packed", "always-of-a-block"])
def test_a_block_decides_once(name):
    """Gates are left for later projections, which read them and give the same."""
    arguments, gate, expected = problem(name, False)
    run(*arguments, "", gate)
    gates, present, tokens = arguments[7], arguments[8], len(arguments[0])
    assert present.item() == -1
    assert ((gates[:tokens] != 0).sum(-1) == gate.top_k).all()
    assert (gates[tokens:] == -1).all()
    follower = LayerGate(0, always=gate.always)
    x, joint, columns, _, bias, *rest = arguments
    joint = joint[: sum(rest[-1]) + columns]  # no routers of its own
    out = run(x, joint, columns, 0, bias, *rest, "", follower)
    assert error(out.cpu(), expected) <= 1e-5


def test_shared_a():
    gate = LayerGate(1, (3,), 1, shared=True)
    # The shared A, then one that is always on.
    x, bank_a = torch.randn(5, 64).to(DEVICE), torch.randn(2, 4, 64).to(DEVICE) / 8
    router, weight = torch.randn(3, 64).to(DEVICE) / 8, torch.randn(40, 64).to(DEVICE) / 8
    bank_b, scales = torch.randn(40, 4, 4).to(DEVICE), torch.rand(4).to(DEVICE) + 0.5
    joint = torch.cat([weight, bank_a.flatten(0, 1), router])
    gates = torch.zeros(5, 1, 3, device=DEVICE)
    present = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    out = run(x, joint, 8, 3, None, None, scales, gates, present, bank_b, [0], [40], "", gate)
    chosen = (x.double() @ router.double().T).argmax(1)
    expected = x.double() @ weight.double().T
    for t, e in enumerate(chosen.tolist()):
        for expert, a in ((e, bank_a[0]), (3, bank_a[1])):
            low = a.double() @ x[t].double()
            expected[t] += scales[expert].double() * (bank_b[:, expert].double() @ low)
    assert error(out, expected) <= 1e-5


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_half_precision_rounds_s_and_the_result(dtype):
    arguments, gate, _ = problem("qkv", True)
    x, joint, columns, logits, bias, router_bias, scales, gates, present, bank_b, *_ = arguments
    both, bank_b = x @ joint.t(), bank_b.to(dtype)
    rest = (columns, logits, bias, router_bias, scales, gates, present)
    exact = layer_expand_triton(both, *rest, bank_b.float(), *arguments[-2:], "", gate)
    out = layer_expand_triton(both, *rest, bank_b, *arguments[-2:], "", gate)
    assert out.dtype == dtype
    assert error(out, exact.double()) <= 1.2 * error(exact.to(dtype), exact.double())


def test_large_banks_go_another_way():
    bank = torch.empty(1, 8, 16)
    assert layer_expands(64, *bank.shape[1:]) and not layer_expands(65, *bank.shape[1:])
    assert not layer_expands(1, 16, 16)
