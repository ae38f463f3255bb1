"""Typed look-ups in a JSON object that a stranger wrote."""

from __future__ import annotations

from typing import Any

from vllm_adafuse.text import show

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Scales and temperatures are used in float32: 0 and Inf are reached sooner there.
_TINY, _LARGE = 1.2e-38, 3.4e38


class Keys:
    """Typed look-ups in the file's object that collect every problem."""

    def __init__(self, values: dict[str, Any]):
        self.values, self.problems = values, []

    def bad(self, key: str, expected: str) -> None:
        found = show(self.values[key])
        self.problems.append(f"{CONFIG_FILE}: `{key}` is {found}, expected {expected}")

    def get(self, key: str, default: Any, accept, expected: str) -> Any:
        if key not in self.values:
            return default
        if accept(self.values[key]):
            return self.values[key]
        self.bad(key, expected)
        return default

    def per_expert(self, key: str, experts: int | None, accept, what: str) -> tuple | None:
        value = self.values.get(key)
        if key not in self.values:
            return None
        if isinstance(value, list):
            if experts is not None and len(value) != experts:
                self.bad(key, f"{experts} entries, one per expert, but it has {len(value)}")
            elif not value or not all(accept(v) for v in value):
                self.bad(key, f"{what} or a list of {what}, one per expert")
            else:
                return tuple(value)
        elif accept(value):
            return (value,) * (experts or 1)
        else:
            self.bad(key, f"{what} or a list of {what}, one per expert")
        return None


def is_int(low: int, high: int):
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def is_number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool) and -_LARGE <= v <= _LARGE


def is_positive(v: Any) -> bool:
    return is_number(v) and v >= _TINY


def is_hash(v: Any) -> bool:
    return isinstance(v, str) and len(v) == 64 and set(v) <= set("0123456789abcdef")


def is_names(v: Any) -> bool:
    return isinstance(v, list) and bool(v) and all(isinstance(s, str) and s for s in v)


def unnest(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """`{"router": {"input": …}}` is read like the flat key `"router.input"`."""
    values = {k: v for k, v in raw.items() if k != "router"}
    router = raw.get("router", {})
    if not isinstance(router, dict):
        problems.append(
            f"{CONFIG_FILE}: `router` is {show(router)}, expected an object, or the "
            "keys `router.input`, `router.weights` and so on"
        )
        return values
    for key, value in router.items():
        if f"router.{key}" in values:
            problems.append(
                f"{CONFIG_FILE}: key `router.{show(key)[1:-1]}` is given twice, flat and inside "
                "`router`; keep one"
            )
        values[f"router.{key}"] = value
    return values
