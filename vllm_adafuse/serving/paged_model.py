"""Gives the linears of a loaded model pages for adapters that requests choose."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.architectures import ARCHITECTURES, Architecture
from vllm_adafuse.serving import projections, vllm_api
from vllm_adafuse.serving.bank import place_banks
from vllm_adafuse.serving.fits import in_fp8
from vllm_adafuse.serving.ops import make_known
from vllm_adafuse.serving.page_bank import PageBank
from vllm_adafuse.serving.page_step import PageStep
from vllm_adafuse.serving.plain_loras import VLLM_LORA
from vllm_adafuse.serving.pool import Size
from vllm_adafuse.serving.requests import requests_of
from vllm_adafuse.serving.routes import SharedRotary
from vllm_adafuse.serving.wrap.linears import wrap_pages
from vllm_adafuse.serving.wrap.vllm_lora import backbones_embedding

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")
# Slices of a projection's output that the kernels tell apart.
MAX_SLICES = 3
UNKNOWN = Architecture("", "")


@torch.no_grad()
def wrap_model(
    model: torch.nn.Module, vllm_config: VllmConfig, size: Size, device: torch.device
) -> tuple[PageStep, list[PageBank]]:
    """Wraps every linear that can take adapters.

    Args:
        model: loaded.
        vllm_config: of the engine.
        size: of the pool.
        device: of the model.

    Raises:
        AdapterError: there is none; or the pool cannot be in fp8.
    """
    _check_default(model)
    config, fp8 = vllm_config.model_config, in_fp8(vllm_config)
    with torch.device(device):
        rows, family = vllm_api.max_tokens(vllm_config), _family(model)
        requests = getattr(model, "adafuse_requests", None) or requests_of(
            vllm_config, backbones_embedding(model)
        )
        vocab_size = config.get_vocab_size() if vllm_api.has_token_ids(config) else 0
        if vllm_api.has_embeddings(config):
            vocab_size = rows
        step = PageStep(rows, size, vocab_size, requests)
        step.rotary, behind = SharedRotary(rows, family.rotary_follows), {}
        if family.residual_norms:
            behind = projections.norms_behind(model.model, vllm_config, residual_norms=True)
        banks, layers, left = [], [], []
        targets = vllm_api.lora_targets(vllm_config)
        packed = vllm_api.packed_modules(model)
        below = vllm_api.language_prefixes(model)
        for layer, block, linears in projections.linears_of(model, packed, below):
            names = {layer.prefix.rpartition(".")[2], layer.prefix, *linears}
            names |= {name.rpartition(".")[2] for name in linears}
            if targets is not None and names.isdisjoint(targets):
                continue
            try:
                fuse = projections.can_fuse(layer)
                bank = PageBank(layer, linears, size.pages, step, len(banks), fuse, fp8)
            except (TypeError, ValueError) as e:
                left.append(f"{layer.prefix} ({e})")
                continue
            if len(bank.widths) > MAX_SLICES or layer.params_dtype != config.dtype:
                left.append(layer.prefix)
                continue
            layers.append((layer, block))
            banks.append(bank)
        if not banks:
            raise AdapterError(
                "--enable-lora",
                [
                    f"{type(model).__name__} has no linear that takes adapters; leave the option "
                    f"out, or let vLLM's own LoRA try it ({VLLM_LORA})"
                ],
            )
        for (layer, block), bank in zip(layers, banks):
            place_banks([bank], config.dtype)
            wrap_pages(layer, block, bank, behind.get(layer), step.rotary)
            bank.settle()
            make_known(bank, vllm_config)
        step.reserve(len(banks), [bank.workspace_sizes() for bank in banks])
    if left:
        logger.warning(
            "AdaFuse: adapters of these linears are refused, none can be added there: %s", left
        )
    vllm_api.mark_compiled(vllm_config, f"pages {size.pages} {size.columns}{' fp8' * fp8}")
    return step, banks


def _check_default(model: torch.nn.Module) -> None:
    """Refuses a default mixture that does not let go of a request with an adapter of its own."""
    adapter = getattr(model, "adafuse_adapter", None)
    if adapter is not None and (adapter.config.layer_wise or adapter.config.router_layer):
        raise AdapterError(
            f"adapter {adapter.path} with --enable-lora",
            [
                "its routers stand inside the layers, where requests that choose an adapter would "
                "get it besides; leave out --enable-lora, or let vLLM's own LoRA add to it "
                f"({VLLM_LORA})"
            ],
        )


def _family(model: torch.nn.Module) -> Architecture:
    """What is known of the class of a model, and of no other by its name; of the rest nothing."""
    family = ARCHITECTURES.get(type(model).__name__, UNKNOWN)
    known = type(model).__module__ == f"vllm.model_executor.models.{family.module}"
    return family if known else UNKNOWN
