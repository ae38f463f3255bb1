"""Routes without serving: what the router decides for tokens, or for the whole vocabulary."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import Adapter
from vllm_adafuse.format.backbone import EMBEDDING, FIRST_NORM, Backbone, load_backbone_tensors
from vllm_adafuse.format.context_keys import CONTEXT_KEY, CONTEXT_WEIGHT
from vllm_adafuse.kernels.context_routes import choose_by_past, context_rows, fading_of
from vllm_adafuse.kernels.gate import Gate, gate

# Rows routed at once: bounds the float64 copy of their embeddings.
CHUNK = 4096


class OfflineRouter:
    """An adapter's router on the CPU; reads two tensors of the backbone and no other.

    Embeddings stay in the dtype of the checkpoint, so that an engine told to serve another
    dtype may decide near ties the other way.

    Args:
        adapter: a checked adapter.
        base: the backbone's directory.
        tool: that wants routes, for messages.

    Raises:
        AdapterError: the backbone lacks a tensor, a shape does not fit its config, or the routes
            hang on a token's context.
    """

    def __init__(self, adapter: Adapter, base: str | Path, tool: str = "route"):
        _refuse_later_layers(adapter)
        backbone = Backbone.from_path(str(base))
        self.base = base
        self.config, self.norm_eps = adapter.config, backbone.norm_eps
        self.scaled_embedding = backbone.architecture.scaled_embedding
        first_norm = self.config.router_input == "first_norm"
        names = [EMBEDDING, FIRST_NORM] if first_norm else [EMBEDDING]
        tensors = load_backbone_tensors(str(base), names, tool)
        _expect_shape(base, tensors, EMBEDDING, (backbone.vocab_size, backbone.hidden_size))
        self.embedding = tensors[EMBEDDING]
        self.norm_weight = None
        if first_norm:
            _expect_shape(base, tensors, FIRST_NORM, (backbone.hidden_size,))
            self.norm_weight = tensors[FIRST_NORM].float() + backbone.architecture.norm_offset
        with adapter.reader() as read:
            self.weight = read("router.weight").float()
            has_bias = "router.bias" in adapter.tensors
            self.bias = read("router.bias").float() if has_bias else None
            past = self.config.router_context
            self.context_weight = read(CONTEXT_WEIGHT).float() if past else None
        if self.weight.shape[1] != backbone.hidden_size:
            raise AdapterError(
                f"adapter {adapter.path}",
                [
                    f"tensor router.weight has shape {list(self.weight.shape)}, but the backbone "
                    f"{base} has hidden_size {backbone.hidden_size}"
                ],
            )

    @property
    def vocab_size(self) -> int:
        """V, the rows of the embedding."""
        return self.embedding.shape[0]

    def routes(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of tokens and their plain gates (without LoRA's scale).

        Args:
            token_ids: [T] integers; with `router.context` a request's from its first on.

        Returns:
            Expert ids [T, k] int32 by falling logit, gates [T, k] float32.

        Raises:
            AdapterError: a token id without a row in the embedding.
        """
        outside = token_ids[(token_ids < 0) | (token_ids >= self.vocab_size)]
        if outside.numel():
            raise AdapterError(
                f"backbone {self.base}",
                [
                    f"token id {int(outside[0])} has no row in its embedding, which has "
                    f"{self.vocab_size}; take the tokenizer that belongs to this backbone"
                ],
            )
        one_by_one = self.context_weight is None
        route = self._routes if one_by_one else self._context_rows
        parts = [route(chunk) for chunk in token_ids.split(CHUNK)]
        first, second = (torch.cat(tensors) for tensors in zip(*parts))
        if one_by_one:
            return first, second
        config = self.config
        return choose_by_past(
            first, second, torch.ones(config.num_experts), config.top_k,
            config.router_weights == "softmax_topk", fading_of(config.context_half_life),
        )  # fmt: skip

    def _context_rows(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the router says of tokens [T], and what it says of them as the past: [T, E]."""
        embeddings, scale = self._embed(token_ids), self.config.context_scale
        return context_rows(embeddings, self._gate, self.context_weight, scale)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        embeddings = self.embedding[token_ids]
        if self.scaled_embedding:
            factor = math.sqrt(embeddings.shape[-1])
            embeddings = embeddings * torch.tensor(factor, dtype=embeddings.dtype)
        return embeddings

    def _routes(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return gate(self._embed(token_ids), self._gate)

    @property
    def _gate(self) -> Gate:
        return Gate(
            self.weight,
            self.bias,
            self.norm_weight,
            torch.ones(self.config.num_experts),
            norm_eps=self.norm_eps,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            softmax_first=self.config.router_weights == "softmax_topk",
        )


def _refuse_later_layers(adapter: Adapter) -> None:
    """Raises AdapterError where a token's route is no function of its id."""
    config = adapter.config
    if not (config.layer_wise or config.router_layer):
        return
    where = f"its router reads what enters layer {config.router_layer} (`router.layer`)"
    if config.layer_wise:
        where = f"each {config.router_scope} has a router that reads its own input (layer_wise)"
    raise AdapterError(
        f"adapter {adapter.path}",
        [
            f"{where}, so a token's experts hang on the tokens before it and no table of the "
            "vocabulary exists; run the model by vllm_adafuse.offline.reference.load and look into "
            "model.adafuse.gates"
        ],
    )


def refuse_context(adapter: Adapter, way_out: str) -> None:
    """Raises AdapterError where the router sees a request's past (`router.context`)."""
    if context := adapter.config.router_context:
        raise AdapterError(
            f"adapter {adapter.path}",
            [
                f"`{CONTEXT_KEY}` is {context}, so a token's experts hang on the tokens before it: "
                f"{way_out}"
            ],
        )


def vocabulary_routes(adapter: Adapter, base: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The passports of a whole vocabulary, with plain gates.

    Args:
        adapter: a checked adapter.
        base: the backbone's directory.

    Returns:
        Expert ids [V, k] int32 by falling logit, gates [V, k] float32.

    Raises:
        AdapterError: as `OfflineRouter`.
    """
    refuse_context(adapter, "look at those of a text with: vllm-adafuse route")
    router = OfflineRouter(adapter, base, "inspect")
    return router.routes(torch.arange(router.vocab_size))


def _expect_shape(
    base: str | Path, tensors: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]
) -> None:
    if (found := tuple(tensors[name].shape)) != shape:
        raise AdapterError(
            f"backbone {base}",
            [f"tensor {name} has shape {list(found)}, but config.json says {list(shape)}"],
        )
