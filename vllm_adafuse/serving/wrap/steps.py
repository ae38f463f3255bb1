"""What happens around the forward of a model whose requests name their adapters."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.sequence import IntermediateTensors
from vllm_adafuse.serving.page_step import LOST, PageStep
from vllm_adafuse.serving.routes import PAGE_ROUTES
from vllm_adafuse.serving.warm_up import warm_up
from vllm_adafuse.serving.wrap.hooks import pass_routes_on, take_routes


def watch(model: torch.nn.Module, step: PageStep) -> None:
    """Has a model's steps routed before its forward, and those of lost adapters silenced behind it;
    between pipeline stages routes are passed on.

    Both run outside what is compiled, and within what a CUDA graph captures whole.
    """
    model.adafuse_step, model.adafuse_requests = step, step.requests
    if (stages := get_pp_group()).world_size > 1:
        pass_routes_on(model, PAGE_ROUTES, step.table_ids.shape[0])
        if not stages.is_last_rank:
            step.hand_on()
    model.register_forward_pre_hook(_route, with_kwargs=True)
    model.register_forward_hook(_pass_on_or_silence)


def _route(
    model: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    step = model.adafuse_step
    if step.cold:
        step.cold = False
        _warm_up(model, step)
    positions = kwargs.get("positions", args[1] if len(args) > 1 else None)
    if step.rotary is not None:
        step.rotary(positions)
    if (sent := kwargs.get("intermediate_tensors")) is not None:
        received, others = take_routes(sent, PAGE_ROUTES)
        if step.adapts:
            step.receive(*received)
        return args, kwargs | {"intermediate_tensors": others}
    if not step.adapts:
        return None
    token_ids = kwargs.get("input_ids", args[0] if args else None)
    embeddings = kwargs.get("inputs_embeds")
    if step.routers is not None:
        step.decide(embeddings)
    elif token_ids is not None and step.vocab_size:
        step.route(token_ids)
    else:  # plain LoRAs need none
        step.spread(positions.shape[-1] if embeddings is None else embeddings.shape[0])
    return None


def _warm_up(model: torch.nn.Module, step: PageStep) -> None:
    """Has all kernels compiled that steps with adapters launch, and those without."""
    has_adapters, ids = step.has_adapters.clone(), torch.zeros_like(step.slots)
    step.has_adapters.fill_(True)
    route = (lambda tokens: step.route(ids[:tokens])) if step.vocab_size else step.spread
    warm_up(model, len(ids), route)
    step.has_adapters.fill_(False)
    warm_up(model, len(ids), lambda tokens: None)
    step.has_adapters.copy_(has_adapters)


def _pass_on_or_silence(model: torch.nn.Module, args: tuple, output: Any) -> None:
    """Adds routes to what the next stage gets. At the last one zeroes the hidden states of tokens
    whose adapter is lost on any: their logits say nothing, and no request gets the base model's
    words under an adapter's name."""
    step = model.adafuse_step
    if isinstance(output, IntermediateTensors):
        tokens = output["hidden_states"].shape[0]
        output.tensors.update(zip(PAGE_ROUTES, step.sent(tokens)))
        return
    if not step.adapts:
        return
    for hidden in output if isinstance(output, (tuple, list)) else [output]:
        if isinstance(hidden, torch.Tensor):
            lost = step.slots[: hidden.shape[0]] == LOST
            hidden.masked_fill_(lost[:, None], 0)
