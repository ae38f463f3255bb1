"""vLLM's own LoRA wrappers, where the backbone's modules are asked behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    LogitsProcessorWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm_adafuse.serving import vllm_api


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The backbone's module."""
    return module.base_layer if isinstance(module, BaseLayerWithLoRA) else module


@contextmanager
def without_lora(model: torch.nn.Module) -> Iterator[None]:
    """Embeddings that vLLM's own LoRA has wrapped are the backbone's meanwhile, to whoever calls
    the modules themselves and not what was compiled of them."""
    wrapped = [m for m in model.modules() if isinstance(m, VocabParallelEmbeddingWithLoRA)]
    for module in wrapped:
        module.forward = module.base_layer.forward
    try:
        yield
    finally:
        for module in wrapped:
            del module.forward


def backbones_embedding(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """Token ids [T] -> embeddings [T, H] as they enter layer 0 of requests without such a LoRA."""

    def embed(token_ids: torch.Tensor) -> torch.Tensor:
        with without_lora(model):
            return model.embed_input_ids(token_ids)

    return embed


def decide_logits(module: LogitsProcessorWithLoRA, adapted: Callable[[int], bool]) -> None:
    """Has an output head ask each time whether it computes with LoRA. No graph holds it.

    Args:
        module: of vLLM's, which reads the head itself.
        adapted: from a number of rows.
    """

    def _get_logits(hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor | None:
        if adapted(len(hidden_states)):
            return type(module)._get_logits(module, hidden_states, *args, **kwargs)
        return module.base_layer._get_logits(hidden_states, *args, **kwargs)

    module._get_logits = _get_logits


def decide_head(module: BaseLayerWithLoRA, adapted: Callable[[int], bool]) -> None:
    """Has a classifier's head ask each time whether it is adapted, or another.

    Args:
        module: of vLLM's.
        adapted: from a number of rows.
    """

    def forward(hidden_states: torch.Tensor) -> Any:
        if adapted(len(hidden_states)):
            return type(module).forward(module, hidden_states)
        result = module.base_layer(hidden_states)
        return result[0] if isinstance(result, tuple) else result

    module.forward = forward


def draft_without_lora(runner: Any) -> None:
    """Has a model that drafts tokens take the backbone's own embedding where it shares that: its
    steps have other tokens than the batch says. What it drafts decides no token.

    Args:
        runner: of either kind, before it loads such a model, if it has one.
    """
    for drafter in vllm_api.drafters(runner):
        _unwrap_when_loaded(drafter)


def _unwrap_when_loaded(drafter: Any) -> None:
    load = drafter.load_model

    def load_model(*arguments: Any, **options: Any) -> Any:
        result = load(*arguments, **options)
        model = getattr(drafter, "model", None)
        for module in model.modules() if isinstance(model, torch.nn.Module) else ():
            for name, child in module.named_children():
                if isinstance(child, VocabParallelEmbeddingWithLoRA):
                    setattr(module, name, child.base_layer)
        return result

    drafter.load_model = load_model
