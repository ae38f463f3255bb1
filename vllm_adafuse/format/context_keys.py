"""Keys of a router that sees a request's past (format version 2): `router.context` and those beside it."""

from __future__ import annotations

from typing import Any

from vllm_adafuse.format.keys import CONFIG_FILE, Keys, is_positive
from vllm_adafuse.text import show

CONTEXT_KEY, SCALE_KEY = "router.context", "router.context_scale"
# Tokens after which what was said counts half in the mean; without it all counts alike.
HALF_LIFE_KEY = "router.context_half_life"
CONTEXT_KEYS = (CONTEXT_KEY, SCALE_KEY, HALF_LIFE_KEY)
# "mean": of what the router's second matrix says of the request's tokens so far.
CONTEXTS = ("mean",)
CONTEXT_WEIGHT = "router.context.weight"


def parse_context(keys: Keys, layer_wise: bool, router_layer: int) -> dict[str, Any]:
    """The fields `router_context`, `context_scale` and `context_half_life`; bad values and
    combinations are problems."""
    context = keys.get(CONTEXT_KEY, "", lambda v: v in CONTEXTS, f"one of {CONTEXTS}")
    scale = keys.get(SCALE_KEY, 1.0, is_positive, "a finite number above 0")
    half_life = keys.get(HALF_LIFE_KEY, None, is_positive, "a finite number of tokens above 0")
    for key in (SCALE_KEY, HALF_LIFE_KEY):
        if key in keys.values and CONTEXT_KEY not in keys.values:
            keys.bad(key, f"`{CONTEXT_KEY}` beside it; give it or leave both out")
    if context and router_layer and not layer_wise:
        keys.problems.append(
            f"{CONFIG_FILE}: `{CONTEXT_KEY}` is {show(context)} and `router.layer` {router_layer}, "
            "expected one of the two: what enters a later layer has seen the past already"
        )
    half_life = None if half_life is None else float(half_life)
    return {
        "router_context": context,
        "context_scale": float(scale),
        "context_half_life": half_life,
    }


def show_half_life(half_life: float | None) -> str:
    """What a router remembers, for people."""
    return "all tokens alike" if half_life is None else f"with a half-life of {half_life:g} tokens"


def context_json(context: str, scale: float, half_life: float | None) -> dict[str, Any]:
    """The keys of a config that has these fields."""
    if not context:
        return {}
    memory = {} if half_life is None else {HALF_LIFE_KEY: half_life}
    return {CONTEXT_KEY: context, SCALE_KEY: scale, **memory}
