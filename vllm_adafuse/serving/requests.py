"""Which request each token of a step is of, for routers that see a request's past.

What a request's tokens so far add up to lies on the device, in a row that stays the request's from
step to step. `Requests` gives rows and has those seeded, from token ids or embeddings, whose tokens
were computed elsewhere: hits of the prefix cache, requests resumed after preemption, KV of another
engine. It asks for no event but the step itself: whoever does not go on where it ended is seeded.

Where drafts are rejected, the next step starts before the last one's end: within the ring of sums
that a row has (`context_routes`), so it goes on. How many were rejected the host may not know yet;
starts are then upper bounds here, and the device has the true ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from vllm_adafuse.kernels.context_routes import OFFSET, START, SUM_ROW
from vllm_adafuse.kernels.live_route import CHUNK
from vllm_adafuse.serving import vllm_api


class Tokens(NamedTuple):
    """Of a request, from its first on.

    Attributes:
        ids: [T] int32 or int64; where an embedding stands for the token any id of the vocabulary.
        given: [P, H] embeddings of its prompt, of any float dtype; or None.
        by_id: [P] bool, at which of these places the id counts all the same; None: at none.
    """

    ids: torch.Tensor
    given: torch.Tensor | None = None
    by_id: torch.Tensor | None = None

    def embeddings(self, embed: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[torch.Tensor]:
        """[n, H] of all tokens, in pieces: those of a long prompt would find no room at once.

        Args:
            embed: ids [n] -> embeddings [n, H] as they enter layer 0.
        """
        for start in range(0, len(self.ids), CHUNK):
            rows = embed(self.ids[start : start + CHUNK])
            if self.given is not None and start < len(self.given):
                given = self.given[start : start + len(rows)].to(rows, non_blocking=True)
                if self.by_id is not None:
                    by_id = self.by_id[start : start + len(given)].to(rows.device)
                    given = torch.where(by_id[:, None], rows[: len(given)], given)
                rows = torch.cat([given, rows[len(given) :]])
            yield rows


class Follower(Protocol):
    """Who keeps sums of requests."""

    @property
    def follows(self) -> bool:
        """Whether any request may need one."""

    def sees(self, place: int) -> bool:
        """Whether the request at a place in the batch has one."""

    def seed(self, place: int, row: int, tokens: Tokens) -> None:
        """Sets a row to the sums over tokens of the request at a place in the batch, and over those
        without the last ones."""


class Requests(torch.nn.Module):
    """The requests of a step, in a static buffer.

    Args:
        most: S, requests that a step can have (--max-num-seqs).
        ring: R, sums that are kept of each: one more than the tokens that a step may take back.
        embed: token ids [n] -> embeddings [n, H] as they enter layer 0, where steps are given as
            embeddings (`--enable-prompt-embeds`); None where they are given as ids.

    Attributes:
        table: [3, S + 1] int32 on the device, as `context_routes` takes it; of nobody at first.
        followers: whose rows are seeded.
    """

    def __init__(
        self,
        most: int,
        ring: int = 1,
        embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        super().__init__()
        table = torch.zeros(3, most + 1, dtype=torch.int32)
        self.register_buffer("table", table, persistent=False)
        self.followers: list[Follower] = []
        self.most, self.ring, self.embed = most, ring, embed
        # Request -> its row, and from where to where it can go on; the one used last at the end.
        self._known: dict[str, tuple[int, int, int]] = {}
        self._batch: list[str] = []
        self._rows, self._from, self._to = np.zeros((3, 0), np.int64)
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
        tokens_of: Callable[[int, int], Tokens],
        on_device: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    ) -> None:
        """Prepares a step.

        Args:
            requests: ids of the batch, R of them.
            starts: [R] tokens of each that are computed.
            counts: [R] its tokens in this step.
            tokens_of: (place, T) -> the first T tokens of a request of the batch.
            on_device: starts [R] and where the requests' tokens begin and end [R + 1], if the host
                has upper bounds only; else None.
        """
        if self._dummy:
            return
        count, starts = len(requests), np.asarray(starts, dtype=np.int64)
        # Of upper bounds drafts are a part that were taken back before the last step ran.
        more = 0 if on_device[0] is None else self.ring - 1
        known = self._batch == requests and (self._from <= starts) & (starts <= self._to + more)
        if not np.all(known):
            self._place(requests, starts, tokens_of, more)
        self._batch, self._to = list(requests), starts + counts
        self._from = np.maximum(self._from, self._to - self.ring + 1)
        table = np.zeros((3, self.most + 1), dtype=np.int32)
        table[SUM_ROW, :count], table[START, :count] = self._rows, starts
        ends = np.cumsum(counts)
        table[OFFSET, 1 : count + 1] = ends
        table[OFFSET, count + 1 :] = ends[-1] if count else 0
        copy_to(self.table, table)
        true_starts, true_offsets = on_device
        if true_starts is not None:
            self.table[START, :count] = true_starts
        if true_offsets is not None:
            self.table[OFFSET, : count + 1] = true_offsets
            self.table[OFFSET, count + 1 :] = true_offsets[-1]

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
        columns = (column.tolist() for column in (self._rows, self._from, self._to))
        for request, row, low, high in zip(self._batch, *columns):
            self._known.pop(request, None)
            self._known[request] = row, low, high
        self._batch = []
        self._rows, self._from, self._to = np.zeros((3, 0), np.int64)

    def _place(
        self, requests: list[str], starts: np.ndarray, tokens_of: Callable, more: int
    ) -> None:
        before = set(self._batch)
        self._settle()
        here, taken = set(requests), {row for row, _, _ in self._known.values()}
        free = [row for row in range(self.most) if row not in taken]
        others = (request for request in list(self._known) if request not in here)
        rows, lows = [], []
        for place, (request, start) in enumerate(zip(requests, starts.tolist())):
            row, low, high = self._known.get(request, (None, 0, -1))
            if row is None:
                # No row is free: that of the request which has waited longest.
                row = free.pop() if free else self._known.pop(next(others))[0]
            goes_on = low <= start <= high + (more if request in before else 0)
            seeing = [] if goes_on or not start else [f for f in self.followers if f.sees(place)]
            if seeing:
                tokens = tokens_of(place, start)
                ids = tokens.ids.to(self.table.device, non_blocking=True)
                tokens = tokens._replace(ids=ids)
            for follower in seeing:
                follower.seed(place, row, tokens)
            rows.append(row)
            lows.append(low if goes_on else max(0, start - self.ring + 1))
        self._rows, self._from = np.array([rows, lows], dtype=np.int64)


def requests_of(vllm_config: Any, embed: Callable[[torch.Tensor], torch.Tensor]) -> Requests:
    """For an engine of this config, whose model embeds token ids so."""
    most = vllm_config.scheduler_config.max_num_seqs
    embedded = vllm_api.has_embeddings(vllm_config.model_config)
    return Requests(most, 1 + vllm_config.num_speculative_tokens, embed if embedded else None)


def copy_to(target: torch.Tensor, source: np.ndarray) -> None:
    """To the device without waiting for it; the source may change at once."""
    host = torch.from_numpy(source.copy())
    target.copy_(host.pin_memory() if target.is_cuda else host, non_blocking=True)
