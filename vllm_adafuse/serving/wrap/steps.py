"""What happens around the forward of a model whose requests name their adapters."""

from __future__ import annotations

from typing import Any

import torch
from vllm_adafuse.serving.page_step import LOST, PageStep
from vllm_adafuse.serving.warm_up import warm_up


def watch(model: torch.nn.Module, step: PageStep) -> None:
    """Has a model's steps routed before its forward, and those of lost adapters silenced behind it.

    Both run outside what is compiled, and within what a CUDA graph captures whole.
    """
    model.adafuse_step, model.adafuse_requests = step, step.requests
    model.register_forward_pre_hook(_route, with_kwargs=True)
    model.register_forward_hook(_silence)


def _route(model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    step = model.adafuse_step
    if step.cold:
        step.cold = False
        _warm_up(model, step)
    positions = kwargs.get("positions", args[1] if len(args) > 1 else None)
    if step.rotary is not None:
        step.rotary(positions)
    if not step.adapts:
        return
    token_ids = kwargs.get("input_ids", args[0] if args else None)
    if token_ids is None:  # plain LoRAs need none
        like = kwargs.get("inputs_embeds")
        rows = like.shape[0] if like is not None else positions.shape[-1]
        token_ids = torch.zeros(rows, dtype=torch.int32, device=step.slots.device)
    step.route(token_ids)


def _warm_up(model: torch.nn.Module, step: PageStep) -> None:
    """Has all kernels compiled that steps with adapters launch, and those without."""
    has_adapters, ids = step.has_adapters.clone(), torch.zeros_like(step.slots)
    step.has_adapters.fill_(True)
    warm_up(model, len(ids), lambda tokens: step.route(ids[:tokens]))
    step.has_adapters.fill_(False)
    warm_up(model, len(ids), lambda tokens: None)
    step.has_adapters.copy_(has_adapters)


def _silence(model: torch.nn.Module, args: tuple, output: Any) -> None:
    """Zeroes the hidden states of tokens whose adapter is lost: their logits say nothing, and no
    request gets the base model's words under an adapter's name."""
    step = model.adafuse_step
    if not step.adapts:
        return
    for hidden in output if isinstance(output, (tuple, list)) else [output]:
        if isinstance(hidden, torch.Tensor):
            lost = step.slots[: hidden.shape[0]] == LOST
            hidden.masked_fill_(lost[:, None], 0)
