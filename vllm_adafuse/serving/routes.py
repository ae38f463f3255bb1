"""Routes: one decision per token, at the entrance or at a later layer, read by every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from vllm_adafuse.format.config import AdapterConfig
from vllm_adafuse.kernels.gate import Gate, gate
from vllm_adafuse.kernels.gather_routes import gather_routes
from vllm_adafuse.kernels.live_route import live_route
from vllm_adafuse.kernels.spread_routes import new_active, spread_routes
from vllm_adafuse.kernels.workspace import Workspace

# Rows whose routes are computed at once when the passports are stamped.
PASSPORT_CHUNK = 1024
# Names under which routes travel to later pipeline stages: everybody's, and those of requests'
# own adapters.
ROUTES = "adafuse_expert_ids", "adafuse_weights"
PAGE_ROUTES = "adafuse_page_expert_ids", "adafuse_page_weights"


def norm_factors(norm: torch.nn.Module, offset: float) -> torch.Tensor:
    """What an RMSNorm multiplies by: [H] float32, of a family whose factors are offset + weight."""
    return norm.weight.float() + offset


class Step(torch.nn.Module):
    """What every projection reads of a step, in static buffers: CUDA graphs replay over their
    addresses.

    Attributes:
        gates: [N, E] float32, each token's weights at their experts' places.
        active: [2 + E] int64, the experts that the step needs, see `spread_routes`.
        semaphores: [projections, 4] int32, on which programs of one launch wait for each other.
        workspace: what all launches share.
    """

    def __init__(self, rows: int, num_experts: int):
        super().__init__()
        gates = torch.zeros(rows, num_experts, dtype=torch.float32)
        self.register_buffer("gates", gates, persistent=False)
        self.register_buffer("active", new_active(num_experts), persistent=False)

    def reserve(self, projections: int, sizes: Iterable[tuple[int, int, int]]) -> None:
        """Makes what depends on the projections.

        Args:
            projections: their number.
            sizes: `workspace_sizes` of each.
        """
        bytes_, floats, semaphores = (max(column) for column in zip(*sizes))
        workspace = Workspace.make(bytes_, floats, semaphores, self.gates.device)
        for name, tensor in workspace._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
        semaphores = torch.zeros(projections, 4, dtype=torch.int32)
        self.register_buffer("semaphores", semaphores, persistent=False)

    @property
    def workspace(self) -> Workspace:
        return Workspace(self.lora_a_out, self.partial_sums, self.split_k_semaphores, self.unused)


class Route(Step):
    """The step's routes, spread for its projections.

    Attributes:
        expert_ids: [N, k] int32, valid experts in every row at all times.
        weights: [N, k] float32, with LoRA's scale alpha / r multiplied in.
    """

    def __init__(self, rows: int, top_k: int, num_experts: int):
        super().__init__(rows, num_experts)
        for name, dtype in (("expert_ids", torch.int32), ("weights", torch.float32)):
            tensor = torch.zeros(rows, top_k, dtype=dtype)
            self.register_buffer(name, tensor, persistent=False)

    def spread(self, tokens: int) -> None:
        """Prepares what layers read, from the first `tokens` rows of ids and weights."""
        spread_routes(
            self.expert_ids, self.weights, self.gates, self.active, self.semaphores, tokens
        )


class SharedRotary(torch.nn.Module):
    """The rotary embedding of all layers, and a step's cosines and sines in a static buffer.

    Args:
        rows: tokens of the largest step.
        follows_qkv: in this family nothing comes between the projection and the embedding.

    Attributes:
        cos_sin: [rows, D], cosines of each token's position, then sines; once a table is adopted.
    """

    def __init__(self, rows: int, follows_qkv: bool):
        super().__init__()
        self.rows, self.follows_qkv = rows, follows_qkv
        self.stock: torch.nn.Module | None = None

    def adopt(self, rotary: torch.nn.Module) -> bool:
        """Whether this embedding's table is the one that all layers share."""
        if not self.follows_qkv:
            return False
        if self.stock is None:
            self.stock = rotary
            cache = rotary.cos_sin_cache
            cos_sin = cache.new_zeros(self.rows, cache.shape[1])
            self.register_buffer("cos_sin", cos_sin, persistent=False)
        return self.stock is rotary

    def forward(self, positions: torch.Tensor) -> None:
        """Looks up the step's cosines and sines.

        Args:
            positions: [T] int64.
        """
        if self.stock is not None:
            rows = self.cos_sin[: positions.shape[0]]
            torch.index_select(self.stock.cos_sin_cache, 0, positions, out=rows)


class Router(torch.nn.Module):
    """Fills a `Route`: from the passports for token ids, by the live router for embeddings.

    Where the adapter's router stands at a later layer (`router.layer`) there are no passports:
    it fills the route whenever a step enters that layer (`wrap.hooks.route_at`).

    Args:
        config: the adapter's.
        route: the buffers to fill.
        hidden_size: H.
        vocab_size: V, the rows of the passports.
        norm_eps: epsilon of the layer's norm.
    """

    def __init__(
        self,
        config: AdapterConfig,
        route: Route,
        hidden_size: int,
        vocab_size: int,
        norm_eps: float,
    ):
        super().__init__()
        self.config, self.route, self.norm_eps = config, route, norm_eps
        experts, shape = config.num_experts, (vocab_size, config.top_k)
        f32 = torch.float32
        for name, tensor in (
            ("weight", torch.zeros(experts, hidden_size, dtype=f32)),
            ("bias", torch.zeros(experts, dtype=f32)),
            ("norm_weight", torch.ones(hidden_size, dtype=f32)),
            ("scales", torch.tensor(config.scales, dtype=f32)),
            ("passport_ids", torch.zeros(shape, dtype=torch.int32)),
            ("passport_weights", torch.zeros(shape, dtype=f32)),
        ):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def passport_bytes(self) -> int:
        return self.passport_ids.nbytes + self.passport_weights.nbytes

    @property
    def columns(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The passports as a pool of columns holds them, int32 and float32 [columns, V]."""
        return self.passport_ids.t(), self.passport_weights.t()

    @property
    def by_id(self) -> bool:
        """Whether routes follow from token ids."""
        return self.passport_ids.numel() > 0

    def decide(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Routes of embeddings [T, H] as they enter layer 0: ids and weights [T, k]."""
        return gate(embeddings, self._gate)

    @property
    def _gate(self) -> Gate:
        config = self.config
        return Gate(
            self.weight, self.bias,
            self.norm_weight if config.router_input == "first_norm" else None, self.scales,
            self.norm_eps, config.temperature, config.top_k,
            config.router_weights == "softmax_topk",
        )  # fmt: skip

    def enter(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Writes the routes of hidden states [T, H], of which a part may stand in the residual."""
        route = self.route
        live_route(hidden, residual, self._gate, route.expert_ids, route.weights)
        route.spread(hidden.shape[0])

    def forward(self, input_ids: torch.Tensor | None, embeddings: torch.Tensor | None) -> None:
        """Writes the step's routes.

        Args:
            input_ids: [T] token ids; not read where embeddings are given.
            embeddings: [T, H] prompt embeddings, or None.
        """
        if embeddings is None:
            gather_routes(
                input_ids,
                self.passport_ids,
                self.passport_weights,
                self.route.expert_ids,
                self.route.weights,
            )
            self.route.spread(input_ids.shape[0])
        else:
            self.receive(*self.decide(embeddings))

    def receive(self, expert_ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Writes routes [T, k] computed elsewhere (by another pipeline stage)."""
        self.route.expert_ids[: expert_ids.shape[0]].copy_(expert_ids)
        self.route.weights[: weights.shape[0]].copy_(weights)
        self.route.spread(weights.shape[0])

    def load(self, read: Callable[[str], torch.Tensor], has_bias: bool) -> None:
        """Loads the adapter's own tensors; `stamp` follows.

        Args:
            read: adapter tensor name -> tensor on the CPU.
            has_bias: the adapter has router.bias.
        """
        self.weight.copy_(read("router.weight"))
        if has_bias:
            self.bias.copy_(read("router.bias"))

    def stamp(
        self,
        embed: Callable[[torch.Tensor], torch.Tensor],
        norm: torch.nn.Module,
        norm_offset: float,
    ) -> Iterator[None]:
        """Takes what it needs of the backbone's weights, as they are now: the norm's factors, and
        the passports, if any, of the whole vocabulary; in pieces, so that other work of the device
        may come in between.

        Args:
            embed: token ids [T] -> embeddings [T, H] as they enter layer 0.
            norm: input norm of the layer that the router stands at.
            norm_offset: its factors are norm_offset + weight.
        """
        self.norm_weight.copy_(norm_factors(norm, norm_offset))
        for own, embeddings in self._vocabulary(embed, self.passport_ids.shape[0]):
            ids, weights = self.decide(embeddings)
            self.passport_ids[own].copy_(ids)
            self.passport_weights[own].copy_(weights)
            yield

    def _vocabulary(
        self, embed: Callable[[torch.Tensor], torch.Tensor], vocab_size: int
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """The embeddings of all token ids, in pieces: which ids, and [T, H]."""
        for start in range(0, vocab_size, PASSPORT_CHUNK):
            own = slice(start, min(start + PASSPORT_CHUNK, vocab_size))
            yield own, embed(torch.arange(own.start, own.stop, device=self.weight.device))
