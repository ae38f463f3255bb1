"""Routers that see a request's past (`router.context`): their tables, and their sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from vllm_adafuse.format.config import AdapterConfig
from vllm_adafuse.format.context_keys import CONTEXT_WEIGHT
from vllm_adafuse.kernels.context_routes import (
    CHOSEN,
    CONTEXT_COLUMNS,
    EXPERTS,
    FADING,
    SOFTMAX_FIRST,
    ContextRoutes,
    context_routes,
    context_rows,
    faded_sums,
    fading_of,
)
from vllm_adafuse.kernels.live_route import CHUNK
from vllm_adafuse.serving.requests import Requests, Tokens
from vllm_adafuse.serving.routes import Route, Router, norm_factors


def context_of(config: AdapterConfig, columns: list[int], most: int) -> torch.Tensor:
    """What `context_routes` needs to know of an adapter: a column [5 + 2 C] int32 of `contexts`.

    Args:
        config: the adapter's.
        columns: of its experts in the tables.
        most: C.
    """
    column = torch.zeros(CONTEXT_COLUMNS + 2 * most, dtype=torch.int32)
    column[EXPERTS], column[CHOSEN] = config.num_experts, config.top_k
    column[SOFTMAX_FIRST] = int(config.router_weights == "softmax_topk")
    fading = torch.tensor([fading_of(config.context_half_life)], dtype=torch.float64)
    column[FADING:CONTEXT_COLUMNS] = fading.view(torch.int32)
    column[CONTEXT_COLUMNS:][: len(columns)] = torch.tensor(columns)
    scales = torch.tensor(config.scales, dtype=torch.float32).view(torch.int32)
    column[CONTEXT_COLUMNS + most :][: len(columns)] = scales
    return column


def seed_ring(ring: torch.Tensor, c: torch.Tensor, fading: float) -> None:
    """Sets the sums of a request after the last R of T tokens and as many before as there are.

    Args:
        ring: [R, E] float64, as `context_routes` takes it.
        c: [E, T] float32, of its tokens; T >= 1.
        fading: of what was said, see `fading_of`.
    """
    count, kept = c.shape[1], min(c.shape[1], len(ring))
    start = count - kept + 1
    left = torch.exp(fading * torch.arange(start - 1, -1, -1, dtype=torch.float64, device=c.device))
    first = (c[:, :start].double() * left).sum(1)
    more = torch.arange(1, kept, dtype=torch.float64, device=c.device)[:, None]
    sums = first * torch.exp(fading * more) + faded_sums(c[:, start:].t(), fading)
    for at, row in zip(range(start, count + 1), [first, *sums]):
        ring[at % len(ring)] = row


class PastRouter(Router):
    """Fills a `Route` by what a request has said so far: everybody's default adapter.

    Args:
        config: the adapter's.
        route: the buffers to fill; None only to stamp tables.
        hidden_size: H.
        vocab_size: V.
        norm_eps: epsilon of the norm.
        requests: of the engine; None only to stamp tables.

    Attributes:
        w, c: [E, V] float32, of the vocabulary.
        own_w, own_c: [E, N] float32, of the step's tokens, where those are given as embeddings.
        sums: [S, R, E] float64, as `context_routes` takes it.
    """

    def __init__(
        self,
        config: AdapterConfig,
        route: Route | None,
        hidden_size: int,
        vocab_size: int,
        norm_eps: float,
        requests: Requests | None,
    ):
        super().__init__(config, route, hidden_size, 0, norm_eps)
        experts, rows = config.num_experts, route.expert_ids.shape[0] if route else 0
        context = context_of(config, list(range(experts)), experts)
        most, ring = (requests.most, requests.ring) if requests else (0, 1)
        embedded = rows if requests and requests.embed else 0
        for name, tensor in (
            ("context_weight", torch.zeros(experts, hidden_size, dtype=torch.float32)),
            ("w", torch.zeros(experts, vocab_size, dtype=torch.float32)),
            ("c", torch.zeros(experts, vocab_size, dtype=torch.float32)),
            ("contexts", context[:, None].contiguous()),
            ("sums", torch.zeros(most, ring, experts, dtype=torch.float64)),
            ("slots", torch.zeros(rows, dtype=torch.int32)),
            ("rows", torch.zeros(rows, dtype=torch.int32)),
            ("own_w", torch.zeros(experts, embedded, dtype=torch.float32)),
            ("own_c", torch.zeros(experts, embedded, dtype=torch.float32)),
            ("turns", torch.arange(embedded, dtype=torch.int32)),
        ):
            self.register_buffer(name, tensor, persistent=False)
        # In a list: the model's, not a part of this one.
        self._requests = [requests] if requests else []
        if requests:
            requests.followers.append(self)

    @property
    def passport_bytes(self) -> int:
        return self.w.nbytes + self.c.nbytes

    @property
    def columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The bits of w, and c."""
        return self.w.view(torch.int32), self.c

    @property
    def by_id(self) -> bool:
        return True

    def load(self, read: Callable[[str], torch.Tensor], has_bias: bool) -> None:
        """As `Router.load`."""
        super().load(read, has_bias)
        self.context_weight.copy_(read(CONTEXT_WEIGHT))

    def stamp(
        self,
        embed: Callable[[torch.Tensor], torch.Tensor],
        norm: torch.nn.Module,
        norm_offset: float,
    ) -> Iterator[None]:
        """As `Router.stamp`: both tables, of the whole vocabulary."""
        self.norm_weight.copy_(norm_factors(norm, norm_offset))
        for own, embeddings in self._vocabulary(embed, self.w.shape[1]):
            self.w[:, own], self.c[:, own] = self._terms(embeddings)
            yield
        for requests in self._requests:
            requests.forget()  # what their tokens add up to was another table's

    def _terms(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """w and c [E, T] of embeddings [T, H]."""
        scale = self.config.context_scale
        w, c = context_rows(embeddings, self._gate, self.context_weight, scale)
        return w.t(), c.t()

    @property
    def follows(self) -> bool:
        """See `Follower`; a later pipeline stage has no tables, and is told routes."""
        return self.c.numel() > 0

    def sees(self, place: int) -> bool:
        """See `Follower`."""
        return True

    def seed(self, place: int, row: int, tokens: Tokens) -> None:
        """See `Follower`."""
        if embed := self._requests[0].embed:
            said = torch.cat([self._terms(piece)[1] for piece in tokens.embeddings(embed)], 1)
        else:
            said = self.c[:, tokens.ids.long().clamp(0, self.c.shape[1] - 1)]
        seed_ring(self.sums[row], said, fading_of(self.config.context_half_life))

    def forward(self, input_ids: torch.Tensor | None, embeddings: torch.Tensor | None) -> None:
        """As `Router.forward`.

        Raises:
            RuntimeError: embeddings reach a server that was not started for them.
        """
        (requests,), tables = self._requests, (self.w, self.c)
        if embeddings is not None:
            if requests.embed is None:
                raise RuntimeError(
                    "vllm-adafuse: a step of embeddings reached a router with `router.context`, "
                    "expected token ids: start with --enable-prompt-embeds"
                )
            tables, input_ids = (self.own_w, self.own_c), self.turns[: len(embeddings)]
            for start in range(0, len(embeddings), CHUNK):
                own = slice(start, min(start + CHUNK, len(embeddings)))
                self.own_w[:, own], self.own_c[:, own] = self._terms(embeddings[own])
        out = ContextRoutes(self.rows, self.route.expert_ids.t(), self.route.weights.t())
        context_routes(
            input_ids, self.slots, self.contexts, tables, self.sums, requests.table, out
        )
        self.route.spread(input_ids.shape[0])
