"""Which request each token of a step is of, for routers that see a request's past.

What a request's tokens so far add up to lies on the device, in a row that stays the request's from
step to step. `Requests` gives rows and has those seeded, from token ids, whose tokens were computed
elsewhere: hits of the prefix cache, requests resumed after preemption, KV of another engine. It asks
for no event but the step itself: whoever does not go on where it ended is seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from vllm_adafuse.kernels.context_routes import OFFSET, START, SUM_ROW


class Follower(Protocol):
    """Who keeps sums of requests."""

    @property
    def follows(self) -> bool:
        """Whether any request may need one."""

    def sees(self, place: int) -> bool:
        """Whether the request at a place in the batch has one."""

    def seed(self, place: int, row: int, token_ids: torch.Tensor) -> None:
        """Sets a row to the sum over token ids [T] of the request at a place in the batch."""


class Requests(torch.nn.Module):
    """The requests of a step, in a static buffer.

    Args:
        most: S, requests that a step can have (--max-num-seqs).

    Attributes:
        table: [3, S + 1] int32 on the device, as `context_routes` takes it; of nobody at first.
        followers: whose rows are seeded.
    """

    def __init__(self, most: int):
        super().__init__()
        table = torch.zeros(3, most + 1, dtype=torch.int32)
        self.register_buffer("table", table, persistent=False)
        self.followers: list[Follower] = []
        self.most = most
        # Request -> its row, and the position behind its last token; the one used last at the end.
        self._known: dict[str, tuple[int, int]] = {}
        self._batch: list[str] = []
        self._rows, self._next = np.zeros(0, np.int32), np.zeros(0, np.int64)
        self._dummy = False

    @property
    def wanted(self) -> bool:
        """Whether anybody needs to know of a step's requests."""
        return any(follower.follows for follower in self.followers)

    def rest(self) -> None:
        """Prepares a step that nobody needs to know of."""
        if self._batch or self._known:
            self.forget()
            self.table.zero_()

    def begin(
        self,
        requests: list[str],
        starts: np.ndarray,
        counts: np.ndarray,
        tokens_of: Callable[[int, int], torch.Tensor],
    ) -> None:
        """Prepares a step.

        Args:
            requests: ids of the batch, R of them.
            starts: [R] tokens of each that are computed.
            counts: [R] its tokens in this step.
            tokens_of: (place, T) -> the first T token ids of a request of the batch.
        """
        if self._dummy:
            return
        count, starts = len(requests), np.asarray(starts, dtype=np.int64)
        if self._batch != requests or not np.array_equal(self._next, starts):
            self._place(requests, starts, tokens_of)
        self._batch, self._next = list(requests), starts + counts
        table = np.zeros((3, self.most + 1), dtype=np.int32)
        table[SUM_ROW, :count], table[START, :count] = self._rows, starts
        ends = np.cumsum(counts)
        table[OFFSET, 1 : count + 1] = ends
        table[OFFSET, count + 1 :] = ends[-1] if count else 0
        copy_to(self.table, table)

    @contextmanager
    def nobodys(self) -> Iterator[None]:
        """Around a dummy run: what is said of its requests is not heard."""
        self.table.zero_()
        self._dummy = True
        try:
            yield
        finally:
            self._dummy = False

    def forget(self, requests: Iterable[str] | None = None) -> None:
        """Requests, or all of them, that are to be seeded when they go on."""
        self._settle()
        for request in list(self._known) if requests is None else requests:
            self._known.pop(request, None)

    def _settle(self) -> None:
        """Takes the last step's requests among those known."""
        for request, row, end in zip(self._batch, self._rows.tolist(), self._next.tolist()):
            self._known.pop(request, None)
            self._known[request] = row, end
        self._batch = []
        self._rows, self._next = np.zeros(0, np.int32), np.zeros(0, np.int64)

    def _place(self, requests: list[str], starts: np.ndarray, tokens_of: Callable) -> None:
        self._settle()
        here, taken = set(requests), {row for row, _ in self._known.values()}
        free = [row for row in range(self.most) if row not in taken]
        others = (request for request in list(self._known) if request not in here)
        rows = []
        for place, (request, start) in enumerate(zip(requests, starts.tolist())):
            row, end = self._known.get(request, (None, None))
            if row is None:
                # No row is free: that of the request which has waited longest.
                row = free.pop() if free else self._known.pop(next(others))[0]
            seeing = [f for f in self.followers if f.sees(place)] if start and start != end else []
            if seeing:
                token_ids = tokens_of(place, start).to(self.table.device, non_blocking=True)
            for follower in seeing:
                follower.seed(place, row, token_ids)
            rows.append(row)
        self._rows = np.array(rows, dtype=np.int32)


def copy_to(target: torch.Tensor, source: np.ndarray) -> None:
    """To the device without waiting for it; the source may change at once."""
    host = torch.from_numpy(source.copy())
    target.copy_(host.pin_memory() if target.is_cuda else host, non_blocking=True)
