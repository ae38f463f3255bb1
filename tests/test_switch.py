"""The fused switch against float64: odd shapes, every route anew, no drift."""

import pytest
import torch
from ops import DEVICE, error
from vllm_adafuse.kernels.switch import (
    SwitchConfig,
    SwitchPlan,
    switch,
    switch_constants,
    switch_torch,
    switch_triton,
)

SMALL = SwitchConfig(rows=16, cols=32, strip=64)
RUNS = [switch, switch_torch, switch_triton]
CASES = {
    # (out, in) of the linears, E, k, r
    "even": ([(64, 128), (32, 64)], 4, 2, 16),
    "not-a-multiple": ([(77, 131), (5, 64), (16, 200)], 3, 2, 5),
    "one-by-one": ([(1, 1), (3, 70)], 2, 1, 1),
    "rank-256": ([(18, 40)], 2, 1, 256),
    "rank-70": ([(33, 50)], 3, 2, 70),
    "padded-columns": ([(32, 64)], 3, 3, 16),
    "every-expert": ([(40, 64), (64, 40)], 5, 5, 3),
    "dense-of-many": ([(20, 36)], 24, 24, 2),
    "one-expert": ([(32, 32)], 1, 1, 8),
}


def make_plan(shapes, experts, rank, dtype=torch.float32, config=SMALL, seed=0) -> SwitchPlan:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale):
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(DEVICE)

    pristine = [normal(o, i, scale=i**-0.5) for o, i in shapes]
    a = [normal(experts, rank, i, scale=i**-0.5) for _, i in shapes]
    b = [normal(experts, o, rank, scale=rank**-0.5) for o, _ in shapes]
    live = [torch.full_like(w, float("nan")) for w in pristine]
    return SwitchPlan.make(live, pristine, a, b, config)


def exact(plan: SwitchPlan, weights: torch.Tensor) -> tuple[SwitchPlan, torch.Tensor]:
    """A plan and weights of few bits: what they merge to is exact in float32, whatever the order of
    its sums, so that one rounding leaves the same bits on every machine."""

    def few_bits(tensors, step):
        return [(t.float() / step).round().clamp(-64, 64).mul(step).to(t.dtype) for t in tensors]

    a, b = few_bits(plan.banks_a, 1 / 32), few_bits(plan.banks_b, 1 / 16)
    pristine = few_bits(plan.pristine, 1 / 1024)
    live = [torch.full_like(w, float("nan")) for w in pristine]
    return SwitchPlan.make(live, pristine, a, b, plan.config), (64 * weights).ceil() / 64


def make_routes(count, experts, top_k, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(count, experts, generator=g).argsort(1)[:, :top_k].int()
    return ids.contiguous().to(DEVICE), (torch.rand(count, top_k, generator=g) + 0.1).to(DEVICE)


def row(number: int) -> torch.Tensor:
    return torch.tensor([number], device=DEVICE)


def truth(plan, ids, weights, number, dtype=torch.float64):
    """The merged weights, expert by expert in `dtype`."""
    merged = []
    for w, a, b in zip(plan.pristine, plan.banks_a, plan.banks_b):
        total = w.to(dtype)
        for e, g in zip(ids[number].tolist(), weights[number]):
            total = total + g.to(dtype) * (b[e].to(dtype) @ a[e].to(dtype))
        merged.append(total)
    return merged


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name, run):
    shapes, experts, top_k, rank = CASES[name]
    plan = make_plan(shapes, experts, rank)
    before = [w.clone() for w in plan.pristine]
    ids, weights = make_routes(3, experts, top_k)
    for number in (2, 0):
        run(plan, ids, weights, row(number))
        for w, want in zip(plan.live, truth(plan, ids, weights, number)):
            assert error(w, want) <= 1e-5
    assert all(torch.equal(w, old) for w, old in zip(plan.pristine, before))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("name", ["even", "not-a-multiple", "rank-70", "dense-of-many"])
def test_half_precision_is_no_worse_than_plain_torch(name, dtype, run):
    shapes, experts, top_k, rank = CASES[name]
    plan = make_plan(shapes, experts, rank, dtype)
    ids, weights = make_routes(1, experts, top_k)
    run(plan, ids, weights, row(0))
    want, plain = (truth(plan, ids, weights, 0, d) for d in (torch.float64, dtype))
    for w, exact, other in zip(plan.live, want, plain):
        assert error(w, exact) <= 1.2 * error(other, exact)


@pytest.mark.parametrize("config", [SwitchConfig(), SwitchConfig(32, 16, 16), SwitchConfig(16, 64)])
def test_any_config(config):
    shapes, experts, top_k, rank = CASES["not-a-multiple"]
    plan = make_plan(shapes, experts, rank).with_config(config)
    ids, weights = make_routes(1, experts, top_k)
    switch_triton(plan, ids, weights, row(0))
    for w, want in zip(plan.live, truth(plan, ids, weights, 0)):
        assert error(w, want) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_ten_thousand_switches_leave_the_rounding_of_one(dtype):
    ids, weights = make_routes(50, 4, 2)
    rows = [row(number) for number in range(50)]
    plan, weights = exact(make_plan([(24, 40), (16, 16)], 4, 4, dtype), weights)
    # What is done in place: the old delta out, the new one in.
    deltas = [
        [m - w.double() for m, w in zip(truth(plan, ids, weights, n), plan.pristine)]
        for n in range(50)
    ]
    naive = [w.double() + d for w, d in zip(plan.pristine, deltas[0])]
    naive = [w.to(dtype) for w in naive]
    order = torch.randint(50, (9999,), generator=torch.Generator().manual_seed(1)).tolist() + [7]
    last = 0
    for number in order:
        switch(plan, ids, weights, rows[number])
        for w, old, new in zip(naive, deltas[last], deltas[number]):
            w.copy_(w.double() - old + new)
        last = number
    for w, drifted, want in zip(plan.live, naive, truth(plan, ids, weights, 7)):
        assert torch.equal(w, want.to(dtype)) and not torch.equal(w.double(), want)
        assert error(drifted, want) > 10 * error(w, want)


def test_the_kernel_forgets_the_last_route_too():
    ids, weights = make_routes(9, 4, 2)
    plan, weights = exact(make_plan([(24, 40)], 4, 4, torch.float16), weights)
    for number in (1, 5, 8, 3):
        switch_triton(plan, ids, weights, row(number))
    assert torch.equal(plan.live[0], truth(plan, ids, weights, 3)[0].half())


@pytest.mark.parametrize("run", [switch_torch, switch_triton])
def test_an_equal_route_moves_nothing(run):
    plan = make_plan([(24, 40)], 4, 4)
    ids, weights = make_routes(4, 4, 2)
    ids[1], weights[1] = ids[0], weights[0]
    ids[2], weights[2] = ids[0], weights[0] * 1.0000002
    plan.live[0].fill_(7.0)
    run(plan, ids, weights, row(0), row(1))
    assert (plan.live[0] == 7).all()
    for new in (2, 3):  # one weight's last bit, another route
        plan.live[0].fill_(7.0)
        run(plan, ids, weights, row(new), row(0))
        assert error(plan.live[0], truth(plan, ids, weights, new)[0]) <= 1e-5


@pytest.mark.gpu
def test_in_a_cuda_graph():
    plan = make_plan([(256, 512), (128, 256)], 8, 16, torch.bfloat16, SwitchConfig())
    ids, weights = make_routes(20, 8, 2)
    number = row(0)
    switch(plan, ids, weights, number)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        switch(plan, ids, weights, number)
    for n in (3, 11):
        number.fill_(n)
        graph.replay()
        for w, want in zip(plan.live, truth(plan, ids, weights, n)):
            assert error(w, want) <= 1.01 * error(want.bfloat16(), want)
    kept = [w.clone() for w in plan.live]
    for n in [*torch.randint(20, (9999,)).tolist(), 11]:
        number.fill_(n)
        graph.replay()
    assert all(map(torch.equal, plan.live, kept))


def test_constants():
    even = switch_constants(make_plan([(64, 128)], 2, 16), 2)
    assert even["EVEN"] and even["ALIGN"] == 16 and (even["BLOCK_C"], even["CHUNKS"]) == (32, 1)
    odd = switch_constants(make_plan([(64, 128), (64, 36)], 2, 16), 2)
    assert not odd["EVEN"] and odd["ALIGN"] == 4
    padded = switch_constants(make_plan([(64, 128)], 3, 5), 2)
    assert padded["EVEN"] and not padded["FULL"] and padded["BLOCK_C"] == 16
    assert switch_constants(make_plan([(16, 16)], 2, 200), 2)["CHUNKS"] == 4


def test_default_cuts():
    choose = SwitchConfig.choose
    assert choose(2, 32, [4096, 11008]) == SwitchConfig() == SwitchConfig(64, 128, 2048, 4, 3)
    assert choose(2, 32, [4096, 1088]) == SwitchConfig(64, 64)  # whole tiles of 64 alone
    assert choose(2, 32, [4096, 100]) == SwitchConfig()  # no whole tiles at all
    assert choose(2, 128, [4096]) == SwitchConfig(32, 128)
    assert [choose(4, columns, [4096]).rows for columns in (32, 64, 256)] == [64, 32, 16]
    # A plan does not know k: its config does for all experts.
    assert make_plan([(64, 128)], 4, 16, config=None).config == choose(4, 64, [128])


def test_misfits_are_refused():
    for bad in ({"rows": 48}, {"cols": 8}, {"strip": 100}, {"warps": 3}, {"stages": 0}):
        with pytest.raises(ValueError, match=f"switch: {list(bad)[0]} is"):
            SwitchConfig(**bad)
    plan = make_plan([(16, 32)], 2, 4)
    parts = [plan.live, plan.pristine, plan.banks_a, plan.banks_b]
    with pytest.raises(ValueError, match="as many of each"):
        SwitchPlan.make([], [], [], [])
    with pytest.raises(ValueError, match="linear 0: W, A, B have shapes"):
        SwitchPlan.make(*parts[:3], [plan.banks_b[0][:, :8]])
    with pytest.raises(ValueError, match="expected contiguous torch.float32"):
        SwitchPlan.make(*parts[:2], [plan.banks_a[0].half()], parts[3])
    with pytest.raises(ValueError, match="weights are torch.int8"):
        SwitchPlan.make([plan.live[0].to(torch.int8)], *parts[1:])
