"""All that changes the modules of a vLLM model: nothing else in this package does.

    linears.py     linear methods that add deltas, or compute the projection with them
    blocks.py      what stands in a block for a norm, a rotary embedding or an activation
    layer_wise.py  linear methods and activations where layers route themselves
    hooks.py       functions that vLLM's modules call: after loading, before a layer
    steps.py       what happens around the forward where requests name their adapters
    vllm_lora.py   vLLM's own LoRA wrappers, and the backbone's modules behind them
    parts.py       the parts of a wrapped model that launch kernels, each to be run by itself

What was put where is asked of the functions below, and of no attribute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def bank_of(layer: torch.nn.Module) -> Any | None:
    """The experts that a linear computes with: an `ExpertBank`, `PageBank` or `LayerBank`."""
    return getattr(layer, "adafuse_bank", None)


def adapted(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The linears of a model that compute with experts, after their names."""
    return ((name, m) for name, m in model.named_modules() if bank_of(m) is not None)


def banks_of(model: torch.nn.Module) -> list[Any]:
    """The banks of the mixture that a model is served with by default; none of a stock model."""
    return list(getattr(model, "adafuse_banks", ()))


def router_of(model: torch.nn.Module) -> Any | None:
    """The `Router` of that mixture, None where layers route themselves or there is none."""
    return getattr(model, "adafuse_router", None)
