"""Routes to gates: the same weights at their experts' places, who is active, semaphores zero."""

import pytest
import torch
from ops import DEVICE, bits
from vllm_adafuse.kernels.dispatch import MAX_ACTIVE_TOKENS
from vllm_adafuse.kernels.spread_routes import (
    spread_routes,
    spread_routes_torch,
    spread_routes_triton,
)


def routes(tokens, experts, top_k):
    g = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens + 2, experts, generator=g).argsort(1)[:, :top_k].int()
    ids[:, 0] = 1  # so that others may be absent
    for row in ids:
        row[1:] = torch.tensor([e for e in range(experts) if e != 1][: top_k - 1])
    return ids.to(DEVICE), torch.rand(tokens + 2, top_k, generator=g).to(DEVICE)


@pytest.mark.parametrize("run", [spread_routes, spread_routes_torch, spread_routes_triton])
@pytest.mark.parametrize("experts,top_k", [(1, 1), (5, 2), (8, 8), (64, 3)])
@pytest.mark.parametrize("tokens", [1, 37, MAX_ACTIVE_TOKENS, MAX_ACTIVE_TOKENS + 1])
def test_gates_active_experts_and_semaphores(run, tokens, experts, top_k):
    if experts == 1:
        ids, weights = torch.zeros(tokens + 2, 1, dtype=torch.int32, device=DEVICE), None
        weights = torch.rand(tokens + 2, 1, device=DEVICE)
    else:
        ids, weights = routes(tokens, experts, top_k)
    gates = torch.full((tokens + 2, experts), 7.0, device=DEVICE)
    active = torch.full((2 + experts,), 7, dtype=torch.int64, device=DEVICE)
    semaphores = torch.full((300, 4), 7, dtype=torch.int32, device=DEVICE)
    run(ids, weights, gates, active, semaphores, tokens)
    for t in range(tokens):
        for e in range(experts):
            chosen = (ids[t] == e).nonzero()
            assert gates[t, e] == (weights[t, chosen[0, 0]] if len(chosen) else 0)
    assert (gates[tokens:] == 7).all() and not semaphores.any()
    used = torch.tensor([e in ids[:tokens] for e in range(experts)], device=DEVICE)
    if tokens > MAX_ACTIVE_TOKENS:
        assert active[0] == -1
    else:
        chosen = used.nonzero()[:, 0].tolist()
        wanted = [bits(used).item(), len(chosen), *chosen]
        assert active[: len(wanted)].tolist() == wanted


@pytest.mark.parametrize("run", [spread_routes, spread_routes_torch, spread_routes_triton])
@pytest.mark.parametrize("experts,top_k", [(65, 2), (256, 3), (200, 20)])
@pytest.mark.parametrize("tokens", [3, MAX_ACTIVE_TOKENS + 1])
def test_more_experts_than_the_word_has_bits(run, experts, top_k, tokens):
    """It says that all are there, or a kernel would leave out those beyond."""
    draw = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens + 2, experts, generator=draw).argsort(1)[:, :top_k].int().to(DEVICE)
    weights = torch.rand(tokens + 2, top_k, generator=draw).to(DEVICE)
    gates = torch.full((tokens + 2, experts), 7.0, device=DEVICE)
    active = torch.full((2 + experts,), 7, dtype=torch.int64, device=DEVICE)
    run(ids, weights, gates, active, torch.ones(5, dtype=torch.int32, device=DEVICE), tokens)
    expected = torch.zeros(tokens, experts, device=DEVICE)
    expected[torch.arange(tokens, device=DEVICE)[:, None], ids[:tokens].long()] = weights[:tokens]
    assert torch.equal(gates[:tokens], expected) and (gates[tokens:] == 7).all()
    used = (expected != 0).any(0).nonzero()[:, 0].tolist()
    assert active[0] == -1
    if tokens <= MAX_ACTIVE_TOKENS:
        assert active[1 : 2 + len(used)].tolist() == [len(used), *used]
