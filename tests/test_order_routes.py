"""The order of a long step's tokens: a permutation, equal sets side by side, true words."""

import pytest
import torch
from ops import DEVICE, make_gates
from vllm_adafuse.kernels import order_routes as module
from vllm_adafuse.kernels.order_routes import (
    MIN_ORDER_TOKENS,
    ORDER_TILE,
    Order,
    _order_torch,
    _order_triton,
    order_routes,
)

CASES = [(1, 4, 2), (64, 8, 2), (65, 3, 3), (200, 8, 2), (130, 64, 4), (70, 1, 1), (100, 40, 40)]


def make(tokens, experts, top_k):
    gates = make_gates(tokens, experts, top_k)
    ids = gates.topk(top_k).indices.int()
    rows = torch.full((tokens + 5,), -7, dtype=torch.int32, device=DEVICE)
    present = torch.full((-(-tokens // ORDER_TILE) + 1,), -7, dtype=torch.int64, device=DEVICE)
    return gates, ids, Order(rows, present)


@pytest.mark.parametrize("run", [_order_torch, _order_triton])
@pytest.mark.parametrize("case", CASES)
def test_order(case, run):
    tokens, experts, _ = case
    gates, ids, order = make(*case)
    run(ids, *order, tokens, experts)
    rows = order.rows[:tokens].long()
    assert torch.equal(rows.sort().values, torch.arange(tokens, device=DEVICE))
    assert (order.rows[tokens:] == -7).all() and order.present[-1] == -7
    sets = [tuple(row) for row in (gates[rows] != 0).tolist()]
    changes = sum(a != b for a, b in zip(sets, sets[1:]))
    assert changes == len(set(sets)) - 1
    for i, word in enumerate(order.present[:-1].tolist()):
        tile = gates[rows[i * ORDER_TILE : (i + 1) * ORDER_TILE]]
        used = {e for e in range(experts) if (tile[:, e] != 0).any()}
        assert {e for e in range(64) if word >> e & 1} == used


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the schema and fakes once")
def test_schema_and_fake():
    _, ids, order = make(70, 4, 2)
    torch.library.opcheck(torch.ops.vllm_adafuse.order_routes.default, (ids, *order, 70, 4))


def test_short_steps_and_many_experts_have_no_order(monkeypatch):
    assert Order.make(MIN_ORDER_TOKENS - 1, 8, 32, DEVICE).rows.numel() == 0
    assert Order.make(10_000, 65, 16, DEVICE).rows.numel() == 0
    assert Order.make(10_000, 65, 16, DEVICE).of(5000) is None
    assert Order.make(10_000, 8, 16, DEVICE).rows.numel() == 0  # one product takes them all
    order = Order.make(MIN_ORDER_TOKENS, 32, 8, DEVICE)
    assert order.of(MIN_ORDER_TOKENS - 1) is None and order.of(MIN_ORDER_TOKENS) is order
    _, ids, _ = make(100, 8, 2)
    order_routes(ids, order, 100, 8)
    assert not order.rows.any()
    monkeypatch.setattr(module, "MIN_ORDER_TOKENS", 100)
    order_routes(ids, order, 100, 8)
    assert order.rows.any()


@pytest.mark.parametrize("hopper", [False, True])
def test_ranks_that_the_vendors_product_takes_have_no_order(hopper, monkeypatch):
    monkeypatch.setattr(module, "on_hopper", lambda tensor: hopper)
    ordered = lambda *mixture: Order.make(10_000, *mixture, DEVICE).rows.numel() > 0  # noqa: E731
    assert not ordered(8, 16)
    assert ordered(16, 16) == ordered(64, 16) == ordered(5, 32) == (not hopper)
    assert ordered(64, 32) and ordered(32, 8)
