"""adapter_config.json: the keys of the adapter format, version 1, and their checks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 1
MAX_EXPERTS = 1024
# A composed checkpoint's config.json: the section that names the adapter's directory.
SECTION, ADAPTER_KEY, FINGERPRINT_KEY = "adafuse", "adapter", "fingerprint"
ROUTER_INPUTS = ("first_norm", "embedding")
ROUTER_WEIGHTS = ("topk_softmax", "softmax_topk")
REQUIRED = (
    "peft_type",
    "format_version",
    "base_model_name_or_path",
    "num_experts",
    "top_k",
    "r",
    "lora_alpha",
    "target_modules",
)
OPTIONAL = (
    "use_rslora",
    "routing",
    "router.input",
    "router.weights",
    "router.temperature",
    "expert_names",
)
# Scales and temperatures are used in float32: 0 and Inf are reached sooner there.
_TINY, _LARGE = 1.2e-38, 3.4e38


@dataclass(frozen=True)
class AdapterConfig:
    """A checked adapter_config.json. Lists have one entry per expert.

    Attributes:
        base_model: the backbone, as written in the file.
        num_experts: E, the number of LoRA experts.
        top_k: k, the experts that each token uses.
        ranks: rank r_e of every expert.
        alphas: lora_alpha of every expert.
        use_rslora: scale alpha / sqrt(r) instead of alpha / r.
        target_modules: leaf names of the adapted Hugging Face linears.
        router_input: what the router reads, one of ROUTER_INPUTS.
        router_weights: how weights follow from logits, one of ROUTER_WEIGHTS.
        temperature: logits are divided by it.
        expert_names: unique names, shown to people.
    """

    base_model: str
    num_experts: int
    top_k: int
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    target_modules: tuple[str, ...]
    use_rslora: bool = False
    router_input: str = "first_norm"
    router_weights: str = "topk_softmax"
    temperature: float = 1.0
    expert_names: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank: the r of every tensor's shape."""
        return max(self.ranks)

    @property
    def scales(self) -> tuple[float, ...]:
        """s_e = alpha_e / r_e, or alpha_e / sqrt(r_e) with rsLoRA."""
        return tuple(
            alpha / (math.sqrt(rank) if self.use_rslora else rank)
            for alpha, rank in zip(self.alphas, self.ranks)
        )

    def to_json(self) -> dict[str, Any]:
        """The file's content; `AdapterConfig` read back from it equals this one."""

        def short(values: tuple) -> Any:
            return values[0] if len(set(values)) == 1 else list(values)

        return {
            "peft_type": "ADAFUSE",
            "format_version": FORMAT_VERSION,
            "base_model_name_or_path": self.base_model,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "r": short(self.ranks),
            "lora_alpha": short(self.alphas),
            "use_rslora": self.use_rslora,
            "target_modules": list(self.target_modules),
            "routing": "pre_gated",
            "router.input": self.router_input,
            "router.weights": self.router_weights,
            "router.temperature": self.temperature,
            "expert_names": list(self.expert_names),
        }

    def base_path(self, adapter_dir: Path) -> str:
        """The backbone's path (relative ones start at the adapter's directory) or hub name."""
        local = Path(adapter_dir, self.base_model)
        try:
            return str(local.resolve()) if local.exists() else self.base_model
        except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, a loop of links
            return self.base_model


def show(value: Any) -> str:
    """A value out of a file as short ASCII JSON: safe to print, whatever it holds."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        return "a deeply nested value"
    return text if len(text) <= 80 else text[:77] + "..."


def some(names: list[str]) -> str:
    """The first names of a list that may be long; "a, b, c and 12 more"."""
    listed = [show(name)[1:-1] for name in names[:3]]
    return ", ".join(listed) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class _Keys:
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


def _is_int(low: int, high: int):
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _is_number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool) and -_LARGE <= v <= _LARGE


def _is_positive(v: Any) -> bool:
    return _is_number(v) and v >= _TINY


def _is_names(v: Any) -> bool:
    return isinstance(v, list) and bool(v) and all(isinstance(s, str) and s for s in v)


def _unnest(raw: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """`{"router": {"input": …}}` is read like the flat key `"router.input"`."""
    values = {k: v for k, v in raw.items() if k != "router"}
    router = raw.get("router", {})
    if not isinstance(router, dict):
        problems.append(
            f"{CONFIG_FILE}: `router` is {show(router)}, expected an object, or the "
            "keys `router.input`, `router.weights`, `router.temperature`"
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


def parse_config(raw: Any) -> tuple[AdapterConfig | None, list[str]]:
    """Checks the parsed JSON of an adapter_config.json.

    Returns:
        The config, or None where a problem keeps it from being built; every problem found.
    """
    if not isinstance(raw, dict):
        return None, [
            f"{CONFIG_FILE}: holds a {type(raw).__name__}, expected a JSON object with the keys "
            f"{', '.join(REQUIRED)}"
        ]
    problems: list[str] = []
    keys = _Keys(_unnest(raw, problems))
    values, problems = keys.values, keys.problems + problems
    keys.problems = problems

    if values.get("peft_type", "ADAFUSE") != "ADAFUSE":
        keys.bad("peft_type", '"ADAFUSE"; convert other adapters before serving them')
    version = values.get("format_version", FORMAT_VERSION)
    if not _is_int(1, 10**6)(version):
        keys.bad("format_version", f"the integer {FORMAT_VERSION}")
    elif version > FORMAT_VERSION:
        keys.bad(
            "format_version",
            f"at most {FORMAT_VERSION}, the newest this vllm-adafuse reads; upgrade vllm-adafuse",
        )
        return None, problems  # a newer format's keys would only be misread
    for key in REQUIRED:
        if key not in values:
            problems.append(f"{CONFIG_FILE}: key `{key}` is missing; it is required, add it")
    known = REQUIRED + OPTIONAL
    if unknown := [key for key in values if key not in known and not key.startswith("x_")]:
        problems.append(
            f"{CONFIG_FILE}: unknown key `{some(unknown)}`; known are {', '.join(known)}, "
            "and any key that begins with x_"
        )

    base = keys.get(
        "base_model_name_or_path",
        None,
        lambda v: isinstance(v, str) and v,
        "a path or a hub name",
    )
    experts = keys.get(
        "num_experts", None, _is_int(1, MAX_EXPERTS), f"an integer from 1 to {MAX_EXPERTS}"
    )
    top_k = keys.get(
        "top_k",
        None,
        _is_int(1, experts or MAX_EXPERTS),
        f"an integer from 1 to num_experts ({experts or MAX_EXPERTS})",
    )
    ranks = keys.per_expert("r", experts, _is_int(1, 1 << 16), "a positive integer")
    alphas = keys.per_expert("lora_alpha", experts, _is_number, "a finite float32 number")
    targets = keys.get("target_modules", None, _is_names, "a list of module names")
    if targets and len(set(targets)) < len(targets):
        keys.bad("target_modules", "every name once")
    rslora = keys.get("use_rslora", False, lambda v: isinstance(v, bool), "true or false")
    keys.get(
        "routing",
        "pre_gated",
        lambda v: v == "pre_gated",
        '"pre_gated", the only routing of format version 1',
    )
    router_input = keys.get(
        "router.input", "first_norm", lambda v: v in ROUTER_INPUTS, f"one of {ROUTER_INPUTS}"
    )
    router_weights = keys.get(
        "router.weights", "topk_softmax", lambda v: v in ROUTER_WEIGHTS, f"one of {ROUTER_WEIGHTS}"
    )
    temperature = keys.get(
        "router.temperature", 1.0, _is_positive, "a finite number above 0"
    )
    names = keys.get(
        "expert_names",
        [f"expert_{e}" for e in range(experts or 0)],
        _is_names,
        "a list of num_experts names",
    )
    if experts and len(names) != experts:
        keys.bad("expert_names", f"{experts} names, one per expert, but it has {len(names)}")
    elif len(set(names)) < len(names):
        keys.bad("expert_names", "every name once")

    if problems:
        return None, problems
    config = AdapterConfig(
        base_model=base,
        num_experts=experts,
        top_k=top_k,
        ranks=ranks,
        alphas=tuple(float(a) for a in alphas),
        target_modules=tuple(targets),
        use_rslora=rslora,
        router_input=router_input,
        router_weights=router_weights,
        temperature=float(temperature),
        expert_names=tuple(names),
    )
    return config, []
