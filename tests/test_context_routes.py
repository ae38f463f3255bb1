"""The router that sees a request's past: its tables, and requests over several steps."""

import dataclasses

import numpy as np
import pytest
import torch
from ops import DEVICE
from vllm_adafuse.kernels.context_routes import (
    ContextRoutes,
    choose_by_past,
    context_routes,
    context_routes_torch,
    context_routes_triton,
    context_rows,
    fading_of,
)
from vllm_adafuse.kernels.gate import Gate, choose, gate
from vllm_adafuse.serving.past import seed_ring


def test_without_a_past_it_is_gate():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 32, generator=generator), torch.randn(6, 32, generator=generator)
    bias, norm, scales = torch.randn(6, generator=generator), torch.rand(32), torch.rand(6)
    router = Gate(weight, bias, norm, scales, 1e-6, 0.7, 3, False)
    w, c = context_rows(hidden, router, torch.zeros_like(weight), 4.0)
    assert w.dtype == c.dtype == torch.float32 and not c.any()
    for softmax_first in (False, True):
        ids, weights = choose_by_past(w, c, scales, 3, softmax_first)
        expected = gate(hidden, dataclasses.replace(router, softmax_first=softmax_first))
        assert torch.equal(ids, expected[0])
        torch.testing.assert_close(weights, expected[1])


def test_after_many_tokens_it_is_still_right():
    generator = torch.Generator().manual_seed(1)
    w, c = torch.randn(2, 32_000, 8, generator=generator).unbind()
    ids, weights = choose_by_past(w, c + 0.1, torch.ones(8), 8, False)
    mean = (c + 0.1).double().mean(0)
    expected = torch.softmax(w[-1].double() + mean, -1)[ids[-1].long()]
    assert (weights[-1].double() - expected).abs().max() < 1e-6


VOCAB, COLUMNS, REQUESTS = 50, 12, 6
# Of slots: experts, k, softmax over all; tokens after which what was said counts half.
KINDS = {0: (3, 2, 0, None), 4: (5, 5, 1, 16.0), 8: (4, 1, 0, 1.0)}


def means(c, half_life):
    """Of [T, E]: the formula, a token at a time."""
    kept = 1.0 if half_life is None else 0.5 ** (1 / half_life)
    found, total, count = [], np.zeros(c.shape[1]), 0.0
    for row in c.double().numpy():
        total, count = kept * total + row, kept * count + 1
        found.append(total / count)
    return torch.tensor(np.array(found))


class Problem:
    """Requests of adapters with a past and without, over several steps; and what they should get."""

    def __init__(self, seed=0, device=DEVICE, ring=1, most=COLUMNS, kinds=KINDS, rows=None):
        draw = torch.Generator().manual_seed(seed)
        rows = rows or most
        self.w, self.c = torch.randn(2, rows, VOCAB, generator=draw).to(device).unbind()
        self.contexts = torch.zeros(5 + 2 * most, 9, dtype=torch.int32)
        self.kinds, self.out_k = kinds, max(6, *(k for _, k, *_ in kinds.values()))
        columns, self.own = torch.randperm(rows, generator=draw), {}
        for slot, (experts, k, first, half_life) in self.kinds.items():
            own, columns = columns[:experts], columns[experts:]
            scales = torch.rand(experts, generator=draw) + 0.5
            self.own[slot] = own, scales
            self.contexts[:3, slot] = torch.tensor([experts, k, first])
            fading = torch.tensor([fading_of(half_life)], dtype=torch.float64)
            self.contexts[3:5, slot] = fading.view(torch.int32)
            self.contexts[5 : 5 + experts, slot] = own.int()
            self.contexts[5 + most :][:experts, slot] = scales.view(torch.int32)
        self.contexts = self.contexts.to(device)
        shape = REQUESTS, ring, most
        self.sums = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        self.device, self.draw = device, draw
        self.texts = {
            request: torch.randint(-2, VOCAB + 3, (400,), generator=draw) for request in range(5)
        }
        self.slot_of = {0: 0, 1: 4, 2: -1, 3: 8, 4: 6}  # 6 sees no past
        self.done = dict.fromkeys(self.texts, 0)

    def step(self, counts, run, padding=3):
        """Runs one step of {request: tokens}; checks it; returns its ids and weights."""
        rows, starts, offsets, slots, ids = [], [], [0], [], []
        for request, count in counts.items():
            at = self.done[request]
            rows.append(request + 1)
            starts.append(at)
            offsets.append(offsets[-1] + count)
            slots += [self.slot_of[request]] * count
            ids.append(self.texts[request][at : at + count])
        requests = torch.zeros(3, REQUESTS + 1, dtype=torch.int32)
        requests[0, : len(rows)], requests[1, : len(rows)] = map(torch.tensor, (rows, starts))
        requests[2] = offsets[-1]
        requests[2, : len(offsets)] = torch.tensor(offsets)
        total = offsets[-1] + padding
        token_ids = torch.cat([*ids, torch.full((padding,), 7)]).int().to(self.device)
        slots = torch.tensor(slots + [0] * (padding + 2), dtype=torch.int32).to(self.device)
        out = ContextRoutes(
            torch.full((total + 2,), -9, dtype=torch.int32, device=self.device),
            torch.full((total + 2, self.out_k), -9, dtype=torch.int32, device=self.device).t(),
            torch.full((total + 2, self.out_k), -9.0, device=self.device).t(),
        )
        tables = self.w, self.c
        run(token_ids, slots, self.contexts, tables, self.sums, requests.to(self.device), out)
        rows, found, weights = (t.cpu() for t in out)
        clamped = token_ids.cpu().long().clamp(0, VOCAB - 1)
        for (request, count), begin in zip(counts.items(), offsets):
            here, slot = slice(begin, begin + count), self.slot_of[request]
            if slot not in self.kinds:
                assert torch.equal(rows[here].long(), clamped[here])
                assert (found[:, here] == -9).all()
            else:
                expected_ids, expected = self.expected(request, count)
                k = expected_ids.shape[1]
                assert torch.equal(rows[here].long(), VOCAB + torch.arange(begin, begin + count))
                assert torch.equal(found[:k, here].t(), expected_ids)
                torch.testing.assert_close(weights[:k, here].t(), expected, rtol=1e-5, atol=1e-6)
                assert (found[k:, here] == -9).all()
            self.done[request] += count
        assert torch.equal(rows[offsets[-1] : total].long(), clamped[offsets[-1] :])
        assert not weights[:, offsets[-1] : total].any() and (weights[:, total:] == -9).all()
        assert (rows[total:] == -9).all()
        return found, weights

    def reject(self, request, count):
        """Takes the last tokens of a request back; others come in their place."""
        self.done[request] -= count
        text = self.texts[request][self.done[request] :]
        text.copy_(torch.randint(0, VOCAB, text.shape, generator=self.draw))

    def expected(self, request, count):
        own, scales = self.own[self.slot_of[request]]
        _, k, first, half_life = self.kinds[self.slot_of[request]]
        ids = self.texts[request][: self.done[request] + count].clamp(0, VOCAB - 1)
        w, c = (t.cpu()[own][:, ids].t() for t in (self.w, self.c))
        z = (w.double() + means(c, half_life)).float()
        return [t[-count:] for t in choose(z, scales, k, bool(first))]


RUNS = [context_routes_torch, context_routes_triton]


@pytest.mark.parametrize("run", RUNS, ids=["torch", "triton"])
@pytest.mark.parametrize("rows", [COLUMNS, 3 * COLUMNS])
def test_chunks_of_requests_add_up(run, rows):
    problem = Problem(rows=rows)
    problem.step({0: 5}, run)
    problem.step({1: 40, 0: 1, 2: 3, 4: 2}, run)
    problem.step({0: 1, 3: 17, 2: 1, 1: 33, 4: 1}, run, padding=0)
    problem.step({3: 1, 0: 1, 1: 1}, run, padding=40)
    problem.step({1: 130}, run)


@pytest.mark.parametrize("run", RUNS, ids=["torch", "triton"])
def test_rejected_tokens_are_taken_back(run):
    problem = Problem(seed=4, ring=4)
    problem.step({0: 5, 1: 33, 3: 1}, run)
    problem.step({0: 4, 1: 4, 3: 4}, run)
    problem.reject(0, 3)
    problem.reject(3, 1)
    problem.step({3: 4, 0: 4, 1: 1, 2: 2}, run, padding=0)
    problem.reject(0, 2)
    problem.step({0: 3, 3: 2}, run)
    problem.reject(3, 1)
    problem.step({0: 40, 3: 4, 1: 4}, run)
    problem.reject(0, 3)
    problem.reject(1, 3)
    problem.step({0: 1, 1: 1}, run)


@pytest.mark.parametrize("run, kind", [
    (context_routes_torch, (256, 256, 0, None)), (context_routes_torch, (256, 2, 1, 7.0)),
    (context_routes_triton, (256, 2, 0, 7.0)), (context_routes_triton, (256, 2, 1, None)),
])  # fmt: skip
def test_256_experts(run, kind):
    problem = Problem(ring=2, most=256, kinds={0: kind})
    problem.step({0: 11, 2: 2}, run)
    problem.step({0: 1}, run, padding=1)


def test_a_seeded_ring_is_as_if_computed():
    c = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    for count, ring, half_life in ((9, 4, None), (2, 4, 3.0), (9, 1, 3.0), (4, 4, None), (9, 4, 1.0)):
        seeded = torch.full((ring, 3), torch.nan, dtype=torch.float64)
        seed_ring(seeded, c[:, :count], fading_of(half_life))
        for n in range(max(1, count - ring + 1), count + 1):
            ages = torch.arange(n - 1, -1, -1)
            left = torch.ones(n) if half_life is None else 0.5 ** (ages.double() / half_life)
            torch.testing.assert_close(seeded[n % ring], (c[:, :n].double() * left).sum(1))
        assert seeded.isnan().any() == (count < ring)


@pytest.mark.parametrize("run", RUNS, ids=["torch", "triton"])
def test_a_step_of_nobody_changes_nothing(run):
    problem = Problem()
    problem.step({0: 5}, run)
    before = problem.sums.clone()
    problem.step({}, run, padding=9)
    assert torch.equal(before.nan_to_num(), problem.sums.nan_to_num())


def test_long_steps_take_larger_blocks(monkeypatch):
    monkeypatch.setattr("vllm_adafuse.kernels.context_routes.SHORT_STEP", 8)
    problem = Problem(seed=2)
    problem.step({1: 150, 0: 1}, context_routes_triton)
    problem.step({0: 140, 1: 3}, context_routes_triton)


@pytest.mark.parametrize("run", RUNS, ids=["torch", "triton"])
def test_equal_logits_go_to_the_lower_expert(run):
    problem = Problem()
    problem.w.zero_()
    problem.c.zero_()
    problem.step({0: 3, 3: 2}, run)


@pytest.mark.parametrize("run", RUNS, ids=["torch", "triton"])
@pytest.mark.parametrize("half_life", [1e-30, 0.02, 1.0, 64.0, 1e6, 1e38])
def test_memories_of_any_length(run, half_life):
    """No power of what fades in a block over- or underflows into something else; a memory without end
    is the mean of all."""
    problem = Problem(seed=6, kinds=KINDS | {4: (5, 5, 1, half_life)})
    problem.step({1: 90, 0: 3}, run)
    problem.step({0: 1, 1: 70, 3: 20}, run)
    problem.step({1: 1, 3: 1}, run)
    if half_life == 1e38:
        text = problem.texts[1][:161].clamp(0, VOCAB - 1)
        expected = problem.c.cpu()[problem.own[4][0]][:, text].double().sum(1)
        torch.testing.assert_close(problem.sums[2, 0, :5].cpu(), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("half_life", [None, 1.0, 300.0, 1e6])
def test_decoding_after_32_000_tokens(device, half_life):
    """Prefill in chunks, then tokens one by one and drafts, some taken back: each route is within
    1e-5 of what float64 gives over all that was said. What is added up grows all the while."""
    kinds = {0: (3, 2, 0, half_life)}
    problem, length = Problem(seed=3, device=device, ring=4, kinds=kinds), 32_000
    problem.c += 0.5
    problem.texts[0] = torch.randint(0, VOCAB, (length + 40,), generator=problem.draw)
    for _ in range(4):
        problem.step({0: length // 4}, context_routes_torch if device == "cpu" else context_routes_triton)
    for count, back in ((1, 0), (4, 2), (1, 0), (4, 3), (3, 0), (1, 0)):
        ids, weights = problem.step({0: count}, context_routes_triton)
        own, scales = problem.own[0]
        text = problem.texts[0][: problem.done[0]]
        w, c = (table.cpu()[own].double().numpy() for table in (problem.w, problem.c))
        for at in range(count):
            said = text[: len(text) - count + at + 1]
            ages = np.arange(len(said))[::-1]
            left = np.ones(len(said)) if half_life is None else 0.5 ** (ages / half_life)
            z = w[:, said[-1]] + c @ np.bincount(said, left, minlength=VOCAB) / left.sum()
            best = np.argsort(-z)[:2]
            expected = np.exp(z[best]) / np.exp(z[best]).sum() * scales.double().numpy()[best]
            assert ids[:2, at].tolist() == best.tolist()
            assert np.abs(weights[:2, at].double().numpy() - expected).max() < 1e-5
        problem.reject(0, back)


def test_the_op_is_what_torch_compile_expects():
    problem = Problem(device="cpu")
    requests = torch.zeros(3, REQUESTS + 1, dtype=torch.int32)
    out = (torch.zeros(9, dtype=torch.int32), torch.zeros(6, 9, dtype=torch.int32), torch.zeros(6, 9))
    slots, ids = torch.zeros(9, dtype=torch.int32), torch.arange(4)
    arguments = (ids, slots, problem.contexts, problem.w, problem.c, problem.sums.nan_to_num(), requests)
    torch.library.opcheck(torch.ops.vllm_adafuse.context_routes.default, (*arguments, *out))
    context_routes(*arguments[:3], arguments[3:5], *arguments[5:], ContextRoutes(*out))
    assert out[0][:4].tolist() == [0, 1, 2, 3]
