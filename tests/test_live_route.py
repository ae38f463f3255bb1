"""Routes written inside the model: those of the gate, in the rows of the step alone."""

import pytest
import torch
from vllm_adafuse.kernels.gate import Gate, gate
from vllm_adafuse.kernels.live_route import CHUNK, live_route

HIDDEN, EXPERTS, TOP_K = 96, 5, 2


def problem(tokens, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    hidden, residual = normal(tokens, HIDDEN).to(dtype), normal(tokens, HIDDEN).to(dtype)
    tensors = normal(EXPERTS, HIDDEN) / 10, normal(EXPERTS), normal(HIDDEN), normal(EXPERTS).abs()
    buffers = torch.full((tokens + 3, TOP_K), -1, dtype=torch.int32), torch.zeros(tokens + 3, TOP_K)
    return hidden, residual, Gate(*tensors, **OPTIONS), buffers


OPTIONS = {"norm_eps": 1e-6, "temperature": 0.7, "top_k": TOP_K, "softmax_first": False}


@pytest.mark.parametrize("tokens", [1, 7, CHUNK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_gate_of_the_sum(tokens, dtype):
    hidden, residual, router, (ids, weights) = problem(tokens, dtype)
    live_route(hidden, residual, router, ids, weights)
    expected_ids, expected_weights = gate(hidden + residual, router)
    assert torch.equal(ids[:tokens], expected_ids)
    torch.testing.assert_close(weights[:tokens], expected_weights, rtol=1e-6, atol=0)
    assert (ids[tokens:] == -1).all() and not weights[tokens:].any()
    assert tokens == 1 or len(expected_ids.unique()) > 2


def test_without_a_residual():
    hidden, _, router, (ids, weights) = problem(4)
    live_route(hidden, None, router, ids, weights)
    assert torch.equal(ids[:4], gate(hidden, router)[0])


def test_inside_torch_compile():
    hidden, residual, router, (ids, weights) = problem(6)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(hidden, ids, weights):
        live_route(hidden * 1.0, residual, router, ids, weights)
        return weights.sum()

    f(hidden, ids, weights)
    assert torch.equal(ids[:6], gate(hidden + residual, router)[0])


def test_schema_and_fake():
    hidden, residual, router, (ids, weights) = problem(4)
    numbers = router.norm_eps, router.temperature, router.softmax_first
    arguments = hidden, residual, router.tensors, ids, weights, *numbers
    torch.library.opcheck(torch.ops.vllm_adafuse.live_route.default, arguments)
