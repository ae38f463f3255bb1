"""Rows of requests: who goes on where it ended keeps its row, all others are seeded."""

import numpy as np
import pytest
import torch
from vllm_adafuse.serving.requests import Requests, Tokens


class Told:
    """A follower that writes down what it is told."""

    follows = True

    def __init__(self, blind=()):
        self.seeds, self.blind = [], blind

    def sees(self, place):
        return place not in self.blind

    def seed(self, place, row, tokens):
        self.seeds.append((place, row, tokens.ids.tolist()))


@pytest.fixture
def requests():
    made = Requests(3)
    made.followers.append(Told())
    return made


def step(requests, **batch):
    """{name: (tokens before, tokens)}; returns (rows, seeds)."""
    told = requests.followers[0]
    told.seeds.clear()
    starts, counts = zip(*batch.values()) if batch else ((), ())
    requests.begin(
        list(batch), np.array(starts, dtype=np.int32), np.array(counts),
        lambda place, count: Tokens(torch.arange(count) + 100 * place),
    )  # fmt: skip
    table = requests.table
    ends = np.cumsum(counts)
    assert table[1, : len(batch)].tolist() == list(starts)
    assert table[2].tolist() == [0, *ends, *[sum(counts)] * (3 - len(batch))]
    return table[0, : len(batch)].tolist(), list(told.seeds)


def test_rows_are_kept_and_given_on(requests):
    (a, b), seeds = step(requests, a=(0, 5), b=(0, 1))
    assert a != b and not seeds
    assert step(requests, a=(5, 1), b=(1, 1)) == ([a, b], [])
    assert step(requests, b=(2, 7)) == ([b], [])
    (c, d), _ = step(requests, c=(0, 1), d=(0, 2))
    assert len({b, c, d}) == 3  # a has waited longest
    assert step(requests, b=(9, 1), c=(1, 1)) == ([b, c], [])
    (row, _), seeds = step(requests, a=(6, 2), b=(10, 1))
    assert seeds == [(0, row, [0, 1, 2, 3, 4, 5])] and row != b


def test_who_does_not_go_on_where_it_ended_is_seeded(requests):
    (row,), seeds = step(requests, a=(4, 2))
    assert seeds == [(0, row, [0, 1, 2, 3])]
    assert step(requests, a=(6, 1)) == ([row], [])
    assert step(requests, a=(3, 2))[1] == [(0, row, [0, 1, 2])]
    assert step(requests, a=(0, 5)) == ([row], [])
    requests.forget(["a"])
    assert len(step(requests, a=(5, 1))[1]) == 1
    requests.forget()
    assert len(step(requests, a=(6, 1))[1]) == 1


def test_who_takes_drafts_back_goes_on(requests):
    requests.ring = 4
    (row,), _ = step(requests, a=(0, 9))
    assert step(requests, a=(9, 4)) == ([row], [])
    assert step(requests, a=(10, 4)) == ([row], [])  # 3 of 4 taken back
    assert step(requests, a=(14, 1)) == ([row], [])
    assert step(requests, b=(0, 1), a=(12, 2))[1] == []
    assert len(step(requests, a=(10, 1))[1]) == 1  # 10 is of more than 3 before
    # Seeded after 10: from 7 on it is known, then from 8.
    assert step(requests, a=(8, 3)) == ([row], [])
    assert len(step(requests, a=(7, 1))[1]) == 1
    assert len(step(requests, a=(9, 1))[1]) == 1  # further than it was


def test_upper_bounds_may_have_drafts_that_were_taken_back_before_they_ran():
    """As of n-grams on a GPU: the scheduler counts three drafts, the runner finds none."""
    requests = Requests(2, ring=4)
    requests.followers.append(Told())
    told = requests.followers[0]

    def bounded(names, starts, true_starts, counts):
        told.seeds.clear()
        requests.begin(
            names, np.array(starts), np.array(counts), lambda place, count: Tokens(torch.arange(count)),
            (torch.tensor(true_starts), None),
        )  # fmt: skip
        assert requests.table[1, : len(names)].tolist() == true_starts
        return [ids for _, _, ids in told.seeds]

    assert not bounded(["a", "b"], [0, 0], [0, 0], [1, 1])
    assert not bounded(["a", "b"], [1, 1], [1, 1], [1, 1])
    assert not bounded(["a", "b"], [5, 2], [2, 2], [1, 1])  # of 1 + 3 tokens
    assert bounded(["b"], [7], [7], [1]) == [list(range(7))]  # no draft could be so many
    assert bounded(["a", "b"], [9, 8], [3, 8], [1, 1]) == [list(range(9))]  # back, from elsewhere


def test_rows_of_the_batch_are_nobody_elses(requests):
    (a, b, c), _ = step(requests, a=(0, 1), b=(0, 1), c=(0, 1))
    step(requests, b=(1, 1), c=(1, 1))
    # a has waited longest, and goes on: d takes the row of b.
    assert step(requests, d=(0, 4), a=(1, 1), c=(2, 1)) == ([b, a, c], [])


def test_the_blind_are_not_seeded_and_an_idle_step_is_nobodys(requests):
    requests.followers[0].blind = (0,)
    _, seeds = step(requests, a=(3, 1), b=(2, 1))
    assert [place for place, _, _ in seeds] == [1]
    with requests.nobodys():
        requests.begin(["dummy"], np.array([7]), np.array([3]), None)
        assert not requests.table.any()
    assert not step(requests, a=(4, 1), b=(3, 1))[1]
    requests.followers[0].follows = False
    assert not requests.wanted
    requests.rest()
    assert not requests.table.any()
    assert [place for place, _, _ in step(requests, a=(5, 1), b=(4, 1))[1]] == [1]
