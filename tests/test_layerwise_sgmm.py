"""Layer-wise SGMM as it is added to a projection's output, against float64 over odd shapes."""

import math

import pytest
import torch
from ops import DEVICE, error
from vllm_adafuse.kernels.expand import expand_triton
from vllm_adafuse.kernels.layerwise.low_product import low_product
from vllm_adafuse.kernels.layerwise.operands import LayerGate, LayerGates, LayerProjection
from vllm_adafuse.kernels.layerwise.route import route_layer_triton
from vllm_adafuse.kernels.layerwise.sgmm import layer_sgmm

# tokens, in, widths, adapted, experts of each router, always, rank, gate
CASES = {
    "one-token": (1, 200, [72], [0], [4], 0, 8, {"top_k": 2}),
    "qkv": (5, 160, [96, 32, 32], [0, 1, 2], [4, 4, 4], 0, 4, {"top_k": 2}),
    "no-k": (9, 131, [77, 40, 33], [0, -1, 1], [3, 2], 1, 5, {"top_k": 2}),
    "block": (20, 64, [64, 70], [0, 1], [5], 0, 3, {"top_k": 5, "temperature": 0.5}),
    "packed": (4, 96, [48, 48], [0, 0], [4], 0, 4, {"top_k": 1, "absolute": True}),
    "always-alone": (6, 64, [64, 32], [0, 1], [], 2, 4, {"top_k": 0}),
    "gate-up": (7, 96, [80, 80], [0, 1], [4, 3], 1, 4, {"top_k": 2}),
    "gate-alone": (3, 64, [70, 70], [0, -1], [4], 0, 3, {"top_k": 2}),
    "always-of-a-block": (18, 64, [64, 32], [0, 1], [3], 2, 4, {"top_k": 2}),
    "one-expert": (2, 64, [64], [0], [1], 0, 16, {"top_k": 1}),
    "seventy": (70, 64, [64], [0], [8], 0, 16, {"top_k": 3, "softmax_first": True}),
}


def make(name, seed=0):
    tokens, size_in, widths, adapted, counts, always, rank, options = CASES[name]
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(DEVICE)

    experts, count = max(counts, default=0), max(adapted) + 1
    num_all_experts = experts + always
    x = normal(tokens, size_in)
    lora_a = normal(count, num_all_experts, rank, size_in, scale=size_in**-0.5)
    routers = normal(len(counts), experts, size_in, scale=size_in**-0.5)
    rows_of_b = sum(width for width, part in zip(widths, adapted) if part >= 0)
    lora_b = normal(rows_of_b, num_all_experts, rank, scale=rank**-0.5)
    scales = normal(num_all_experts).abs() + 0.1
    gate = LayerGate(experts=tuple(counts), always=always, **options)
    return x, lora_a, routers, lora_b, scales, gate, adapted, widths


def truth(x, lora_a, routers, lora_b, scales, gate, adapted, widths):
    delta = torch.zeros(len(x), sum(widths), dtype=torch.float64)
    x, lora_a, routers, lora_b = (t.double().cpu() for t in (x, lora_a, routers, lora_b))
    experts = lora_a.shape[1] - gate.always
    for t in range(len(x)):
        weights = []
        for count, router in zip(gate.experts, routers):
            z = [abs(v) if gate.absolute else v for v in (router[:count] @ x[t]).tolist()]
            z = [v / gate.temperature for v in z]
            order = sorted(range(count), key=lambda e: (-z[e], e))
            over = order if gate.softmax_first else order[: gate.top_k]
            total = sum(math.exp(z[e]) for e in over)
            weights.append({e: math.exp(z[e]) / total for e in order[: gate.top_k]})
        row = column = 0
        for part, width in zip(adapted, widths):
            if part >= 0:
                own = dict(weights[part if len(weights) > 1 else 0]) if weights else {}
                own |= {experts + i: 1.0 for i in range(gate.always)}
                for e, g in own.items():
                    lora_a_out = lora_a[part, e] @ x[t]
                    up = lora_b[row : row + width, e] @ lora_a_out
                    delta[t, column : column + width] += g * scales[e].item() * up
                row += width
            column += width
    return delta


def run(y, x, lora_a, routers, lora_b, scales, gate, adapted, widths, triton=False):
    size_in, experts = x.shape[1], lora_a.shape[1] - gate.always
    rows = torch.cat([lora_a.view(-1, size_in), routers.view(-1, size_in)])
    lora_a_out = low_product(x, rows)
    columns = lora_a[..., 0].numel()
    logits = lora_a_out[:, columns:] if gate.experts else None
    gates = torch.full((len(x) + 1, max(1, len(gate.experts)), experts), -1.0, device=DEVICE)
    active = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    lora_a_out, layer = lora_a_out[:, :columns], LayerGates(gates, active)
    p = LayerProjection(gate, tuple(widths), tuple(adapted), scales, lora_b)
    if triton:
        s = y.new_empty(len(x), lora_a.shape[0], lora_a.shape[1] * lora_a.shape[2])
        route_layer_triton(lora_a_out, logits, p, layer, s)
        expand_triton(y, s, lora_b, active, adapted, widths)
    else:
        layer_sgmm(y, lora_a_out, logits, p, layer)


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name, triton):
    x, *rest = make(name)
    y = torch.randn(len(x), sum(rest[-1])).to(DEVICE)
    before = y.double().cpu()
    run(y, x, *rest, triton=triton)
    expected = truth(x, *rest)
    found = y.double().cpu() - before
    assert error(found, expected) <= 1e-5
    for column, (width, part) in zip((0, 77, 117), zip(rest[-1], rest[-2])):
        if part < 0:
            assert not found[:, column : column + width].any()
