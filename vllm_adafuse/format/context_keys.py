"""Keys of a router that sees a request's past (format version 2): `router.context`, its scale."""

from __future__ import annotations

from typing import Any

from vllm_adafuse.format.keys import CONFIG_FILE, Keys, is_positive
from vllm_adafuse.text import show

CONTEXT_KEY, SCALE_KEY = "router.context", "router.context_scale"
# "mean": of what the router's second matrix says of the request's tokens so far.
CONTEXTS = ("mean",)
CONTEXT_WEIGHT = "router.context.weight"


def parse_context(keys: Keys, layer_wise: bool, router_layer: int) -> dict[str, Any]:
    """The fields `router_context` and `context_scale`; bad values and combinations are problems."""
    context = keys.get(CONTEXT_KEY, "", lambda v: v in CONTEXTS, f"one of {CONTEXTS}")
    scale = keys.get(SCALE_KEY, 1.0, is_positive, "a finite number above 0")
    if SCALE_KEY in keys.values and CONTEXT_KEY not in keys.values:
        keys.bad(SCALE_KEY, f"`{CONTEXT_KEY}` beside it; give it or leave both out")
    if context and router_layer and not layer_wise:
        keys.problems.append(
            f"{CONFIG_FILE}: `{CONTEXT_KEY}` is {show(context)} and `router.layer` {router_layer}, "
            "expected one of the two: what enters a later layer has seen the past already"
        )
    return {"router_context": context, "context_scale": float(scale)}


def context_json(context: str, scale: float) -> dict[str, Any]:
    """The keys of a config that has these fields."""
    return {CONTEXT_KEY: context, SCALE_KEY: scale} if context else {}
