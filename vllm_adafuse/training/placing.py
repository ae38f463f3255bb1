"""Where a mixture goes: which linears have experts, which of them share a router's decision."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.training.config import MixtureConfig
from vllm_adafuse.training.layers import Router

# Linears of one layer that read the same tensor.
SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Decide:
    """A pre-hook that lets a router read the hidden state that enters a layer or a block."""

    def __init__(self, router: Router, read=None):
        self.router, self.read = router, read

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        if self.router.context is not None and cache is not None and cache.get_seq_length():
            raise ValueError(
                "a router with `router_context` is trained on whole sequences and keeps nothing of "
                "those in a cache: pass use_cache=False, or save the adapter and load it by "
                "vllm_adafuse.offline.reference"
            )
        self.router(hidden if self.read is None else self.read(hidden))


class TellPadding:
    """A pre-hook on the decoder that tells a router which tokens of the batch are none."""

    def __init__(self, router: Router):
        self.router = router

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(
                f"attention_mask has {mask.dim()} dimensions, expected [batch, length]: a router "
                "with `router_context` counts the tokens that it leaves in"
            )
        self.router.mask = mask


def adapted(config: MixtureConfig, shape: Backbone) -> list[str]:
    """Full names of the linears to adapt, in the model's order.

    Raises:
        AdapterError: with every module or layer that is not there.
    """
    known = sorted(shape.modules())
    problems = [
        f"target module {name} is not in {shape.path}; it has {', '.join(known)}"
        for name in config.target_modules or ()
        if name not in known
    ]
    if config.router_layer >= shape.num_layers:
        problems.append(
            f"`router_layer` is {config.router_layer}, expected less than the backbone's "
            f"{shape.num_layers} layers"
        )
    first = config.router_layer if config.routing == "pre_gated" else 0
    for layer in config.layers or ():
        if not 0 <= layer < shape.num_layers:
            problems.append(f"layer {layer} is not there; the backbone has {shape.num_layers}")
        elif layer < first:
            problems.append(
                f"layer {layer} lies below `router_layer` {first}, where nothing is decided yet; "
                "leave it out of `layers`"
            )
    if problems:
        raise AdapterError("training config", problems)
    layers = set(config.layers or range(first, shape.num_layers))
    targets = set(config.target_modules or known)
    return [
        name
        for name in shape.linears
        if int(name.split(".")[2]) in layers and name.rsplit(".", 1)[1] in targets
    ]


def by_input(names: list[str]) -> list[list[str]]:
    """The names by shared input, each group in the order in which its linears are called."""
    groups: dict[tuple, list[str]] = {}
    for name in names:
        block, leaf = name.rsplit(".", 1)
        shared = next((leaves for leaves in SHARED_INPUT if leaf in leaves), (leaf,))
        groups.setdefault((block, shared), []).append(name)
    return [
        sorted(members, key=lambda n: shared.index(n.rsplit(".", 1)[1]))
        for (_, shared), members in groups.items()
    ]
