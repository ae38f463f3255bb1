"""Layer-wise routing against the format's formula in float64, and what it makes of s."""

import math

import pytest
import torch
from ops import DEVICE, error
from vllm_adafuse.kernels.dispatch import MAX_LAYER_ACTIVE_TOKENS
from vllm_adafuse.kernels.layerwise.operands import LayerGate, LayerGates, LayerProjection
from vllm_adafuse.kernels.layerwise.route import (
    route_layer,
    route_layer_torch,
    route_layer_triton,
    split_router,
)

# tokens, linears, routers, experts (rows of each router), always, rank, gate
CASES = {
    "one-token": (1, 3, 3, [4, 4, 4], 0, 8, {"top_k": 2}),
    "odd": (5, 2, 2, [3, 5], 0, 3, {"top_k": 3, "temperature": 0.6}),
    "of-a-block": (7, 3, 1, [5], 0, 4, {"top_k": 2}),
    "router-alone": (4, 0, 1, [6], 0, 1, {"top_k": 2}),
    "no-experts-in-a-part": (6, 3, 3, [4, 0, 2], 1, 4, {"top_k": 2}),
    "always": (3, 2, 1, [4], 2, 5, {"top_k": 1, "softmax_first": True}),
    "always-alone": (20, 2, 1, [0], 1, 4, {"top_k": 0}),
    "abs": (9, 1, 1, [8], 0, 16, {"top_k": 3, "absolute": True, "temperature": 2.0}),
    "abs-softmax-first": (
        9, 2, 2, [3, 3], 0, 2, {"top_k": 2, "absolute": True, "softmax_first": True}
    ),
    "dense": (17, 1, 1, [5], 0, 4, {"top_k": 5}),
    "shared": (40, 2, 2, [4, 3], 1, 4, {"top_k": 2, "shared": True}),
    "plain": (33, 2, 1, [4], 1, 4, {"top_k": 2, "plain": True}),
    "many-experts": (19, 1, 1, [100], 0, 2, {"top_k": 7}),
    "one-expert": (2, 1, 1, [1], 0, 16, {"top_k": 1}),
}  # fmt: skip


def make(name, seed=0):
    tokens, linears, routers, counts, always, rank, options = CASES[name]
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE)

    experts = max(counts)
    gate = LayerGate(experts=tuple(counts), always=always, **options)
    a = (1 if gate.shared and experts else experts) + always
    both = normal(tokens, linears * a * rank + routers * experts + 3)  # rows that are part of others
    lora_a_out, logits = both.split([linears * a * rank, routers * experts, 3], 1)[:2]
    bias = normal(routers, experts)
    scales = normal(experts + always).abs() + 0.1
    gates = torch.full((tokens + 2, routers, experts), float("nan"), device=DEVICE)
    active = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    return lora_a_out, logits, bias, scales, gates, active, gate, linears, rank


def truth(lora_a_out, logits, bias, scales, gate, linears, rank):
    """Gates and s in float64, one token and router after the other."""
    tokens, (routers, experts) = lora_a_out.shape[0], bias.shape
    num_all_experts = len(scales)
    gates = torch.zeros(tokens, routers, experts, dtype=torch.float64)
    for t in range(tokens):
        for router, count in enumerate(gate.experts):
            z = logits[t].double().view(routers, experts)[router] + bias[router].double()
            z = [(abs(v) if gate.absolute else v) / gate.temperature for v in z[:count].tolist()]
            order = sorted(range(count), key=lambda e: (-z[e], e))
            over = order if gate.softmax_first else order[: gate.top_k]
            total = sum(math.exp(z[e]) for e in over)
            for e in order[: gate.top_k]:
                gates[t, router, e] = math.exp(z[e]) / total
    s = torch.zeros(tokens, linears, num_all_experts, rank, dtype=torch.float64)
    rows = lora_a_out.double().view(tokens, linears, -1, rank).cpu() if linears else s
    for t in range(tokens):
        for part in range(linears):
            for e in range(num_all_experts):
                at = e
                if gate.shared and experts:
                    at = 0 if e < experts else e - experts + 1
                weight = scales[e].double().item()
                if e < experts:
                    g = gates[t, part if routers > 1 else 0, e].item()
                    weight *= float(g != 0) if gate.plain else g
                s[t, part, e] = weight * rows[t, part, at]
    return gates, s.flatten(2)


def projection(scales, bias, gate, linears, rank) -> LayerProjection:
    """Of `linears` linears; of B the shape alone is read."""
    lora_b = scales.new_empty(0, len(scales), rank)
    return LayerProjection(gate, (1,) * linears, tuple(range(linears)), scales, lora_b, bias)


def run_by(function, lora_a_out, logits, bias, scales, gates, active, gate, linears, rank, dtype):
    s = lora_a_out.new_empty(lora_a_out.shape[0], linears, len(scales) * rank, dtype=dtype)
    p = projection(scales, bias, gate, linears, rank)
    function(lora_a_out, logits, p, LayerGates(gates, active), s)
    return s


@pytest.mark.parametrize("function", [route_layer_torch, route_layer_triton])
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name, function):
    lora_a_out, logits, bias, scales, gates, active, gate, linears, rank = make(name)
    args = (lora_a_out, logits, bias, scales, gates, active, gate, linears, rank)
    s = run_by(function, *args, torch.float32).cpu()
    true_gates, true_s = truth(lora_a_out.cpu(), logits.cpu(), bias.cpu(), scales.cpu(), gate, linears, rank)
    tokens = lora_a_out.shape[0]
    found = gates[:tokens].cpu()
    assert torch.equal(found != 0, true_gates != 0)
    if found.numel():
        assert error(found, true_gates) <= 1e-6
        assert gates[tokens:].isnan().all()
    if linears:
        assert error(s, true_s) <= 1e-6
        assert torch.equal(s != 0, true_s != 0)
    experts = gates.shape[2]
    if tokens <= MAX_LAYER_ACTIVE_TOKENS and len(scales) <= 63:
        bits = sum(1 << e for e in range(experts) if true_gates[..., e].any())
        bits += sum(1 << (experts + i) for i in range(gate.always))
        assert active.item() == bits
    else:
        assert active.item() == -1


@pytest.mark.parametrize("function", [route_layer_torch, route_layer_triton])
@pytest.mark.parametrize("name", ["of-a-block", "always", "plain", "many-experts"])
def test_gates_of_another_projection_are_read(name, function):
    lora_a_out, logits, bias, scales, gates, active, gate, linears, rank = make(name)
    first = run_by(
        function, lora_a_out, logits, bias, scales, gates, active, gate, linears, rank, torch.float32
    )
    follower = LayerGate(gate.top_k, always=gate.always, plain=gate.plain, shared=gate.shared)
    kept, active_before = gates.clone(), active.clone()
    active.zero_()
    args = (lora_a_out, None, None, scales, gates, active, follower, linears, rank)
    assert torch.equal(run_by(function, *args, torch.float32), first)
    assert torch.equal(gates[: lora_a_out.shape[0]], kept[: lora_a_out.shape[0]])
    assert torch.equal(active, active_before)


@pytest.mark.parametrize("function", [route_layer_torch, route_layer_triton])
def test_ties_go_to_the_lower_expert(function):
    lora_a_out, logits, bias, scales, gates, active, gate, linears, rank = make("many-experts")
    bias.zero_()
    logits.zero_()
    logits[:, [60, 7, 33]] = 1.5
    run_by(function, lora_a_out, logits, bias, scales, gates, active, gate, linears, rank, torch.float32)
    expected = sorted([7, 33, 60, 0, 1, 2, 3])
    for row in gates[: lora_a_out.shape[0], 0]:
        assert row.nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("function", [route_layer_torch, route_layer_triton])
def test_what_was_not_chosen_may_be_anything(function):
    """Inf times a gate of zero would be NaN."""
    lora_a_out, logits, bias, scales, gates, active, gate, linears, rank = make("one-token")
    clean = run_by(
        function, lora_a_out, logits, bias, scales, gates, active, gate, linears, rank, torch.float32
    )
    lora_a_out[clean.flatten(1) == 0] = float("inf")
    again = run_by(
        function, lora_a_out, logits, bias, scales, gates, active, gate, linears, rank, torch.float32
    )
    assert error(again, clean.double()) <= 1e-6 and torch.equal(again == 0, clean == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_a_split_router_is_float32(dtype, scale):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 300, generator=g) * scale
    pieces = split_router(weight, dtype)
    assert pieces.shape == (3, 4, 300) and pieces.dtype == dtype
    total = sum(part.double() / 2048.0**i for i, part in enumerate(pieces))
    assert error(total, weight.double()) <= 1e-7
    rounded = weight.to(dtype).float()
    assert torch.equal(split_router(rounded, dtype), rounded.to(dtype)[None])


@pytest.mark.parametrize("function", [route_layer_torch, route_layer_triton])
def test_logits_of_a_split_router(function):
    """Choices and gates as those of the router in float32, near ties included."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(12, 256, generator=g).bfloat16()
    weight = torch.randn(2 * 4, 256, generator=g) / 16
    weight[1] = weight[0] * (1 + 1e-5)  # logits closer than bfloat16 can tell
    pieces = split_router(weight, torch.bfloat16)
    logits = (x.double() @ pieces.double().flatten(0, 1).T).float().to(DEVICE)
    gate = LayerGate(2, (4, 4))
    gates = torch.zeros(12, 2, 4, device=DEVICE)
    active = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    lora_a_out, scales = logits[:, :0], torch.ones(4, device=DEVICE)
    run_by(function, lora_a_out, logits, None, scales, gates, active, gate, 0, 1, torch.bfloat16)
    exact = (x.double() @ weight.double().T).view(12, 2, 4)
    for t in range(12):
        for router in range(2):
            chosen = gates[t, router].nonzero()[:, 0].tolist()
            assert chosen == sorted(exact[t, router].topk(2).indices.tolist())


@pytest.mark.parametrize("function", [route_layer_torch, route_layer_triton])
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_half_precision_rounds_once(dtype, function):
    lora_a_out, logits, bias, scales, gates, active, gate, linears, rank = make("of-a-block")
    args = (lora_a_out, logits, bias, scales, gates, active, gate, linears, rank)
    exact = run_by(route_layer_torch, *args, torch.float32).double()
    assert error(run_by(function, *args, dtype), exact) <= 1.01 * error(exact.to(dtype), exact)


def test_bad_numbers_are_refused():
    for options in ({"top_k": 3, "experts": (2,)}, {"top_k": -1}, {"top_k": 1, "temperature": 0}):
        with pytest.raises(ValueError, match="LayerGate"):
            LayerGate(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_by_the_kernel_of_the_device(dtype):
    lora_a_out, logits, bias, scales, gates, active, gate, linears, rank = make("odd")
    p = projection(scales, bias, gate, linears, rank)
    s = route_layer(lora_a_out, logits, p, LayerGates(gates, active), dtype)
    expected = truth(lora_a_out.cpu(), logits.cpu(), bias.cpu(), scales.cpu(), gate, linears, rank)[1]
    assert s.dtype == dtype and error(s.cpu(), expected) <= (1e-6 if dtype.itemsize > 2 else 1e-3)
