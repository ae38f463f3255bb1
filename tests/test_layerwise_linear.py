"""A projection routed inside its layer, in one op, against float64; and the GPU's way by hand."""

from dataclasses import replace

import pytest
import torch
from ops import DEVICE, error
from test_layerwise_sgmm import CASES, make, truth
from vllm_adafuse.kernels.device.epilogues import activate_torch
from vllm_adafuse.kernels.layerwise.linear import expand_weighted_triton, layer_linear
from vllm_adafuse.kernels.layerwise.operands import LayerGate, LayerGates, LayerProjection
from vllm_adafuse.kernels.layerwise.route import route_layer_triton


def problem(name, bias, epilogue=""):
    x, lora_a, routers, lora_b, scales, gate, adapted, widths = make(name)
    g = torch.Generator().manual_seed(1)
    size_in = x.shape[1]
    weight = (torch.randn(sum(widths), size_in, generator=g) * size_in**-0.5).to(DEVICE)
    bias = torch.randn(sum(widths), generator=g).to(DEVICE) if bias else None
    unread = torch.full((3, size_in), 1e9, device=DEVICE)
    rows = torch.cat([weight, lora_a.view(-1, size_in), routers.view(-1, size_in), unread])
    gates = torch.full((len(x) + 1, max(1, len(gate.experts)), lora_a.shape[1] - gate.always), -1.0)
    active = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    y = x.double().cpu() @ weight.double().cpu().T + truth(
        x, lora_a, routers, lora_b, scales, gate, adapted, widths
    )
    y = y + bias.double().cpu() if bias is not None else y
    p = LayerProjection(
        gate, tuple(widths), tuple(adapted), scales, lora_b, None, routers[..., 0].numel(), rows,
        bias, epilogue,
    )  # fmt: skip
    return x, p, LayerGates(gates.to(DEVICE), active), y


def by_triton(x, p, layer):
    """What the op does on a GPU for a few tokens."""
    ends = p.size_out, p.size_out + p.columns
    y, lora_a_out, z = (x @ p.fused_weight.t())[:, : ends[1] + p.logits].tensor_split(ends, 1)
    s = x.new_empty(len(x), p.linears, p.lora_b[0].numel())
    route_layer_triton(lora_a_out, z if p.logits else None, p, layer, s)
    return expand_weighted_triton(
        y, s, p.bias, p.lora_b, layer.active, p.adapted, p.widths, p.epilogue
    )


@pytest.mark.parametrize("run", [layer_linear, by_triton])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name, bias, run):
    *arguments, expected = problem(name, bias)
    out = run(*arguments)
    assert out.dtype == torch.float32 and error(out.cpu(), expected) <= 1e-5


@pytest.mark.parametrize("run", [layer_linear, by_triton])
@pytest.mark.parametrize("epilogue", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("name", ["packed", "gate-up", "gate-alone"])
def test_with_the_activation_of_gate_up(name, epilogue, run):
    *arguments, expected = problem(name, True, epilogue)
    out = run(*arguments)
    assert error(out.cpu(), activate_torch(expected, epilogue)) <= 1e-5


def test_half_precision_keeps_the_choices():
    """Gates are as good as the logits of float16's own numbers allow: no rounding in between."""
    x, p, layer, _ = problem("qkv", False)
    first = p.size_out + p.columns
    rows = p.fused_weight[: first + p.logits].half()
    x, p = x.half(), replace(p, fused_weight=rows, lora_b=p.lora_b.half())
    layer_linear(x, p, layer)
    logits, gates = x.double() @ rows[first:].double().T, layer.gates
    for t, row in enumerate(logits.view(len(x), 3, 4)):
        for router, z in enumerate(row):
            weights, chosen = z.topk(2)
            found = gates[t, router]
            assert found.nonzero()[:, 0].tolist() == sorted(chosen.tolist())
            assert error(found[chosen], weights.softmax(0)) <= 1e-5


@pytest.mark.parametrize("tokens", [1, 48, 200, 2000])
def test_every_path_decides_as_float64_in_bfloat16(tokens):
    """One expert of |z|, a shared A, parts always on: of the same numbers, the same choices."""
    widths, experts, always, rank, size_in = [256, 128, 128], 4, 2, 8, 256
    g = torch.Generator().manual_seed(tokens)

    def normal(*shape, scale):
        return (torch.randn(*shape, generator=g) * scale).to(DEVICE, torch.bfloat16)

    x, weight = normal(tokens, size_in, scale=1), normal(sum(widths), size_in, scale=1 / 16)
    a = normal(3, 1 + always, rank, size_in, scale=1 / 16)
    routers, b = normal(3, experts, size_in, scale=1 / 16), normal(512, 6, rank, scale=0.1)
    fused = torch.cat([weight, a.flatten(0, 2), routers.flatten(0, 1)])
    scales = torch.tensor([2.0] * experts + [1.0] * always, device=DEVICE)
    gates = torch.zeros(tokens, 3, experts, device=DEVICE)
    active = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    gate = LayerGate(1, (experts,) * 3, always, absolute=True, shared=True)
    p = LayerProjection(gate, tuple(widths), (0, 1, 2), scales, b, None, 3 * experts, fused)
    assert p.columns == 3 * (1 + always) * rank
    y = layer_linear(x, p, LayerGates(gates, active))
    x, weight, a, routers, b = (t.double() for t in (x, weight, a, routers, b))
    z = torch.einsum("ti,pei->tpe", x, routers).abs()
    (best, second), chosen = z.topk(2).values.unbind(-1), z.argmax(-1)
    flipped = gates.argmax(-1) != chosen
    assert not (flipped & (best - second > 1e-4)).any() and flipped.sum() <= 2
    assert (gates.amax(-1) == 1).all() and ((gates != 0).sum(-1) == 1).all()
    lora_a_out = torch.einsum("ti,pari->tpar", x, a)[:, :, [0] * experts + [1, 2]]
    taken = torch.cat([gates.double(), gates.new_ones(tokens, 3, always).double()], -1) * scales
    delta = [
        torch.einsum("te,ter,oer->to", taken[:, p], lora_a_out[:, p], rows)
        for p, rows in enumerate(b.split(widths))
    ]
    exact = x @ weight.T + torch.cat(delta, -1)
    # s and the sum, rounded once each; W x as well where cuBLAS rounds it.
    assert error(y, exact) <= 2 * error(exact.bfloat16(), exact)
