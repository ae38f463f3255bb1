"""Deltas of a down projection whose experts read activations of their own, against float64."""

import pytest
import torch
from ops import DEVICE, error
from vllm_adafuse.kernels.expand import expand_triton
from vllm_adafuse.kernels.layerwise.ffn_down import ffn_down, weigh_slots_triton

# tokens, out, experts, top_k, always, rank, shared
CASES = {
    "one-token": (1, 96, 4, 2, 0, 8, False),
    "odd": (5, 77, 3, 2, 1, 5, False),
    "shared": (17, 64, 4, 3, 2, 4, True),
    "dense": (9, 64, 3, 3, 0, 4, False),
    "one-expert": (3, 64, 1, 1, 0, 16, False),
}


def make(name, seed=0):
    tokens, out, experts, top_k, always, rank, shared = CASES[name]
    g = torch.Generator().manual_seed(seed)
    num_all_experts = experts + always
    ids = torch.rand(tokens, experts, generator=g).argsort(1)[:, :top_k]
    gates = torch.full((tokens + 2, 1, experts), float("nan"))
    gates[:tokens] = 0
    gates[:tokens, 0].scatter_(1, ids, torch.rand(tokens, top_k, generator=g) + 0.1)
    rows_a = (1 if shared else experts) + always
    lora_a_out = torch.randn((1 + top_k) * tokens, rows_a * rank, generator=g)
    scales = torch.rand(num_all_experts, generator=g) + 0.5
    lora_b = torch.randn(out, num_all_experts, rank, generator=g) * rank**-0.5
    y = torch.randn(tokens, out, generator=g)
    active = torch.full((1,), -1)
    tensors = (t.to(DEVICE) for t in (y, lora_a_out, gates, scales, active, lora_b))
    return *tensors, always, shared


def truth(y, lora_a_out, gates, scales, active, lora_b, always, shared):
    tokens, (_, num_all_experts, rank) = len(y), lora_b.shape
    lora_a_out = lora_a_out.double().view(-1, tokens, lora_a_out.shape[1] // rank, rank)
    delta, b = torch.zeros_like(y, dtype=torch.float64), lora_b.double()
    for t in range(tokens):
        for j, e in enumerate(gates[t, 0].nonzero()[:, 0].tolist()):
            weight = gates[t, 0, e].double() * scales[e].double()
            delta[t] += weight * (b[:, e] @ lora_a_out[1 + j, t, 0 if shared else e])
        for i in range(always):
            e = num_all_experts - always + i
            delta[t] += scales[e].double() * (b[:, e] @ lora_a_out[0, t, lora_a_out.shape[2] - always + i])
    return delta


def by_triton(y, lora_a_out, gates, scales, active, lora_b, always, shared):
    s = weigh_slots_triton(
        lora_a_out, gates, scales, len(y), lora_b.shape[2], always, shared, torch.float32
    )
    expand_triton(y, s, lora_b, active, [0], [y.shape[1]])


BOTH = pytest.mark.parametrize("run", [ffn_down, by_triton])


@BOTH
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name, run):
    y, *rest = make(name)
    expected = truth(y, *rest)
    before = y.double()
    run(y, *rest)
    assert error(y.double() - before, expected) <= 1e-5


@BOTH
def test_places_that_no_expert_has_may_hold_anything(run):
    y, lora_a_out, gates, *rest = make("odd")
    gates[2] = 0
    gates[2, 0, 1] = 0.5  # one expert of two places
    places = lora_a_out.view(3, len(y), -1)
    places[2, 2] = float("nan")
    expected = truth(y, lora_a_out, gates, *rest)
    before = y.double()
    run(y, lora_a_out, gates, *rest)
    assert error(y.double() - before, expected) <= 1e-5


@BOTH
def test_rows_of_nan_stay_inside(run):
    y, lora_a_out, gates, *rest = make("shared")
    before, expected = y.double(), truth(y, lora_a_out, gates, *rest)
    gates[3] = float("nan")
    run(y, lora_a_out, gates, *rest)
    rows = [t for t in range(len(y)) if t != 3]
    assert error(y[rows].double() - before[rows], expected[rows]) <= 1e-5


def test_inside_torch_compile():
    y, *rest = make("odd")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(y):
        out = y * 1.0
        ffn_down(out, *rest)
        return out

    assert error(f(y).double() - y.double(), truth(y, *rest)) <= 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the schema and fakes once")
def test_schema_and_fake():
    y, lora_a_out, gates, *rest = make("odd")
    torch.library.opcheck(
        torch.ops.vllm_adafuse.ffn_down.default, (y, lora_a_out, gates.nan_to_num(), *rest)
    )
