"""Buffers of a step whose requests name their adapters: written before it, read by all layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm_adafuse.format.config import AdapterConfig
from vllm_adafuse.kernels.context_routes import (
    CONTEXT_COLUMNS,
    ContextRoutes,
    context_routes,
    fading_of,
)
from vllm_adafuse.kernels.page_routes import (
    COLUMNS,
    EXPERT,
    OWNER,
    SCALE,
    TOP_K,
    PageGates,
    new_tile_blocks,
    page_routes,
)
from vllm_adafuse.serving.page_routers import PageRouters
from vllm_adafuse.serving.past import context_of, seed_ring
from vllm_adafuse.serving.pool import Place, Size
from vllm_adafuse.serving.requests import Requests, Tokens, copy_to
from vllm_adafuse.serving.routes import Route, SharedRotary, Step

# Slots of tokens whose request has no adapter, and of those whose adapter is lost.
NO_ADAPTER, LOST = -1, -2


class PageStep(Step):
    """A `Step` whose experts are the pages of a pool.

    Args:
        rows: N, of the largest step.
        size: of the pool.
        vocab_size: V, the rows of the passports; N where steps are given as embeddings, which are a
            vocabulary of their own; 0 in later pipeline stages.
        requests: of the engine.

    Attributes:
        has_adapters: [1] bool on the CPU. Ops read it when they run: a compiled model serves both
            kinds of steps, a captured graph the kind of its capture.
        slots: [N] int32, of each token the slot of its adapter, NO_ADAPTER or LOST.
        tile_blocks: as `page_routes` writes it.
        directory: [3 + C, pages] int32, see `page_routes`.
        rotary: the embedding that projections of queries and keys apply themselves; or None.
        table_ids, table_weights: [C, V + N] int32 and float32: the passports, and behind them
            those that tokens of the step have whose router sees the past.
        contexts, sums: as `context_routes` takes them.
        requests: of the engine.
        routers: that decide by embeddings, where vLLM hands the model those; or None.
    """

    def __init__(self, rows: int, size: Size, vocab_size: int, requests: Requests):
        super().__init__(rows, size.pages)
        self.rotary: SharedRotary | None = None
        self.routers: PageRouters | None = None
        self.vocab_size, self.requests = vocab_size, requests
        requests.followers.append(self)
        # Not a buffer: those follow the model to its device.
        self.has_adapters = torch.zeros(1, dtype=torch.bool, device="cpu")
        directory = torch.full((COLUMNS + size.columns, size.pages), -1, dtype=torch.int32)
        tables = size.columns, vocab_size + rows
        contexts = torch.zeros(CONTEXT_COLUMNS + 2 * size.columns, size.pages, dtype=torch.int32)
        sums = torch.zeros(requests.most, requests.ring, size.columns, dtype=torch.float64)
        for name, tensor in (
            ("slots", torch.full((rows,), NO_ADAPTER, dtype=torch.int32)),
            ("tile_blocks", new_tile_blocks(rows, size.pages)),
            ("directory", directory),
            ("contexts", contexts),
            ("sums", sums),
            # Without passports every token's routes are of this step alone.
            ("token_rows", torch.arange(rows, dtype=torch.int32)),
            ("table_ids", torch.zeros(tables, dtype=torch.int32)),
            ("table_weights", torch.zeros(tables, dtype=torch.float32)),
        ):
            self.register_buffer(name, tensor, persistent=False)
        # slot -> rows of its experts in the tables of terms, and how its memory fades
        self._seeing: dict[int, tuple[tuple[int, ...], float]] = {}
        self._batch = np.zeros(0, dtype=np.int32)
        self._listed = np.full(directory.shape, -1, dtype=np.int32)
        self._named = 0
        self.cold = current_platform.is_cuda_alike()

    def name(self, slots: np.ndarray, counts: np.ndarray) -> None:
        """Says whose the step's tokens are.

        Args:
            slots: [R] int32, of each request in the order of the batch.
            counts: [R], the tokens of each.
        """
        self._batch = slots
        named = np.repeat(slots, counts).astype(np.int32, copy=False)
        # Rows past the step's are those of a captured graph's padding: nobody's.
        tokens = max(len(named), self._named)
        padded = np.full(tokens, NO_ADAPTER, dtype=np.int32)
        padded[: len(named)] = named
        copy_to(self.slots[:tokens], padded)
        self._named = len(named)

    def list(
        self,
        place: Place,
        experts: Sequence[int],
        scale: float,
        config: AdapterConfig | None = None,
    ) -> None:
        """Enters an adapter into the directory.

        Args:
            place: of the adapter.
            experts: whose each of its pages is.
            scale: of a plain LoRA.
            config: of a mixture.
        """
        listed, pages = self._listed, list(place.pages)
        terms = place.columns
        if self.routers is not None:  # rows are pages: of each expert its first
            before = [-1, *experts]
            terms = tuple(p for p, e, last in zip(pages, experts, before) if e != last)
        listed[OWNER, pages], listed[EXPERT, pages] = place.slot, experts
        listed[SCALE, place.slot] = np.float32(scale).view(np.int32)
        columns = place.columns
        sees = config is not None and bool(config.router_context) and self.vocab_size > 0
        # Where its tokens' rows are of this step, any columns are theirs.
        if config is not None and (sees or not self.vocab_size or self.routers is not None):
            columns = tuple(range(config.top_k))
        listed[TOP_K, place.slot] = len(columns)
        listed[COLUMNS : COLUMNS + len(columns), place.slot] = columns
        copy_to(self.directory, listed)
        self._seeing.pop(place.slot, None)
        context = torch.zeros(self.contexts.shape[0], dtype=torch.int32)
        if sees:
            self._seeing[place.slot] = terms, fading_of(config.context_half_life)
            context = context_of(config, list(terms), self.table_ids.shape[0])
        copy_to(self.contexts[:, place.slot], context.numpy())

    def strike(self, place: Place) -> None:
        """Takes an adapter out of the directory."""
        self._listed[OWNER, list(place.pages)] = -1
        copy_to(self.directory, self._listed)
        self._seeing.pop(place.slot, None)

    @property
    def adapts(self) -> bool:
        """Whether the step has adapters; asked when it runs, or is captured."""
        return bool(self.has_adapters.item())

    @property
    def follows(self) -> bool:
        """See `Follower`."""
        return bool(self._seeing)

    def sees(self, place: int) -> bool:
        """See `Follower`."""
        return self.adapts and int(self._batch[place]) in self._seeing

    def seed(self, place: int, row: int, tokens: Tokens) -> None:
        """See `Follower`."""
        own, fading = self._seeing[int(self._batch[place])]
        rows = torch.tensor(own).to(self.slots.device)
        if self.routers is not None:
            pieces = tokens.embeddings(self.requests.embed)
            said = torch.cat([self.routers.said(piece)[rows] for piece in pieces], 1)
        else:
            ids = tokens.ids.long().clamp(0, self.vocab_size - 1)
            said = self.table_weights[rows[:, None], ids]
        seed_ring(self.sums[row, :, : len(own)], said, fading)

    def route(self, token_ids: torch.Tensor) -> None:
        """Writes the gates of a step of T tokens, from their ids [T]."""
        vocab_size = self.vocab_size
        w, c = self.table_ids.view(torch.float32)[:, :vocab_size], self.table_weights[:, :vocab_size]
        if self.routers is not None:
            w, c = self.routers.w, self.routers.c
        context_routes(
            token_ids, self.slots, self.contexts, (w, c), self.sums, self.requests.table,
            ContextRoutes(
                self.token_rows, self.table_ids[:, vocab_size:], self.table_weights[:, vocab_size:]
            ),
        )  # fmt: skip
        self.spread(token_ids.shape[0])

    def decide(self, embeddings: torch.Tensor) -> None:
        """Writes the gates of a step of T tokens, from their embeddings [T, H]."""
        columns, tokens = self.table_ids.shape[0], embeddings.shape[0]
        slots = self.slots[:tokens]
        ids, weights = self.routers.decide(embeddings, slots, self.directory, columns)
        self.table_ids[: ids.shape[1], :tokens].copy_(ids.t())
        self.table_weights[: ids.shape[1], :tokens].copy_(weights.t())
        self.route(self.routers.turns[:tokens])

    def spread(self, tokens: int) -> None:
        """Writes the gates of so many tokens, from their rows in the tables."""
        page_routes(
            self.token_rows[:tokens], self.slots, self.directory, self.table_ids,
            self.table_weights,
            PageGates(self.gates, self.active, self.tile_blocks, self.semaphores),
        )  # fmt: skip

    def hand_on(self) -> None:
        """Another pipeline stage follows: makes room for what it is told."""
        shape = self.slots.shape[0], self.table_ids.shape[0]
        for name, dtype in (("sent_ids", torch.int32), ("sent_weights", torch.float32)):
            tensor = torch.zeros(shape, dtype=dtype, device=self.slots.device)
            self.register_buffer(name, tensor, persistent=False)

    def sent(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the next stage is told of so many tokens: expert ids (LOST of those whose adapter
        is) and weights [tokens, C], in static buffers; in steps without adapters, of no step."""
        ids, weights = self.sent_ids[:tokens], self.sent_weights[:tokens]
        if self.adapts:
            slots = self.slots[:tokens]
            columns = self.directory[COLUMNS:, slots.clamp(min=0)].clamp(min=0).long()
            at = columns * self.table_ids.shape[1] + self.token_rows[:tokens]
            ids.copy_(self.table_ids.take(at).t())
            ids.masked_fill_((slots == LOST)[:, None], LOST)
            weights.copy_(self.table_weights.take(at).t())
        return ids, weights

    def receive(self, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Writes the gates of a step, from what the stage before has `sent`."""
        tokens = ids.shape[0]
        self.table_ids[:, :tokens].copy_(ids.t())
        self.table_weights[:, :tokens].copy_(weights.t())
        self.slots[:tokens].masked_fill_(ids[:, 0] == LOST, LOST)
        self.spread(tokens)

    def take_from(self, route: Route, tokens: int) -> None:
        """Leaves a mixture that is everybody's default to the requests that name no adapter: the
        others have no weights in its route."""
        if self.adapts:
            named = self.slots[:tokens] != NO_ADAPTER
            route.gates[:tokens].masked_fill_(named[:, None], 0)
