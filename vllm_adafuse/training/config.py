"""What is trained: the shape of a mixture, and how its router is kept in balance."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.config import MAX_EXPERTS, ROUTER_INPUTS, ROUTER_WEIGHTS
from vllm_adafuse.format.context_keys import CONTEXTS, context_json
from vllm_adafuse.text import show

ROUTINGS = ("pre_gated", "layer_wise")
SCOPES = ("linear", "block")
# Of `router.context`: with 1 a router learns slowly to listen to the past.
CONTEXT_SCALE = 4.0


@dataclass(frozen=True)
class MixtureConfig:
    """A mixture of LoRA experts to train; checked at construction.

    Attributes:
        num_experts: E.
        top_k: k, the experts that each token uses.
        r: rank of every expert.
        lora_alpha: the scale is alpha / r; default 2 r.
        use_rslora: scale alpha / sqrt(r) instead.
        target_modules: leaf names of the adapted linears; default all of the decoder layers.
        layers: indices of the adapted layers; default all from `router_layer` on.
        routing: "pre_gated", one decision per token for the whole model, or "layer_wise".
        router_scope: of layer-wise routing: a router per "linear" or per "block".
        router_input: of pre-gated routing: the router reads the state that enters layer
            `router_layer` as it is ("embedding") or after that layer's norm ("first_norm").
        router_layer: m; with m > 0 the decision sees context, and layers below m stay plain.
        router_context: "mean": the router also sees the mean of what `context_scale` times a second
            matrix says of the tokens so far (pre-gated, at the entrance); or "".
        context_scale: how much that counts.
        context_half_life: tokens after which what was said counts half in it; None: never less.
        router_weights: "topk_softmax" or "softmax_topk", see docs/format.md.
        router_bias: give routers a bias.
        temperature: divides the logits; the value that is saved and served.
        temperature_start: temperature of the first step; falls (or rises) linearly to
            `temperature` over `anneal` of the training. None: no annealing.
        anneal: share of the training, 0 to 1, over which the temperature changes.
        jitter: training multiplies the router's input by uniform noise in [1 - j, 1 + j]
            (Switch Transformer, arXiv 2101.03961, section 2.2).
        balance_coef: of the load-balance loss (same paper, equation 4).
        z_loss_coef: of the router z-loss (ST-MoE, arXiv 2202.08906, equation 5).
        router_init: standard deviation of a fresh router's logits for an input of unit size.
        expert_names: shown by the tools; default expert_0, expert_1, …
        seed: of the fresh weights.
    """

    num_experts: int = 8
    top_k: int = 2
    r: int = 16
    lora_alpha: float | None = None
    use_rslora: bool = False
    target_modules: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    routing: str = "pre_gated"
    router_scope: str = "linear"
    router_input: str = "first_norm"
    router_layer: int = 0
    router_context: str = ""
    context_scale: float = CONTEXT_SCALE
    context_half_life: float | None = None
    router_weights: str = "topk_softmax"
    router_bias: bool = False
    temperature: float = 1.0
    temperature_start: float | None = None
    anneal: float = 0.5
    jitter: float = 0.0
    balance_coef: float = 0.01
    z_loss_coef: float = 0.001
    router_init: float = 0.1
    expert_names: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("target_modules", "layers", "expert_names"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
        if self.lora_alpha is None and self._integer("r"):
            object.__setattr__(self, "lora_alpha", 2.0 * self.r)
        if problems := self._problems():
            raise AdapterError("training config", problems)

    def _integer(self, name: str, low: int = 1, high: int = 1 << 16) -> bool:
        value = getattr(self, name)
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    def _problems(self) -> list[str]:
        problems = []

        def check(name: str, good: bool, expected: str) -> None:
            if not good:
                problems.append(f"`{name}` is {show(getattr(self, name))}, expected {expected}")

        def number(name: str, low: float, high: float = 1e30) -> bool:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                return False
            return math.isfinite(value) and low <= value <= high

        experts = self._integer("num_experts", 1, MAX_EXPERTS)
        check("num_experts", experts, f"an integer from 1 to {MAX_EXPERTS}")
        most = self.num_experts if experts else MAX_EXPERTS
        fits = self._integer("top_k", 1, most)
        check("top_k", fits, f"an integer from 1 to num_experts ({most})")
        check("r", self._integer("r"), "a positive integer")
        check("lora_alpha", number("lora_alpha", -1e30), "a finite number")
        check("routing", self.routing in ROUTINGS, f"one of {ROUTINGS}")
        check("router_scope", self.router_scope in SCOPES, f"one of {SCOPES}")
        check("router_input", self.router_input in ROUTER_INPUTS, f"one of {ROUTER_INPUTS}")
        check("router_weights", self.router_weights in ROUTER_WEIGHTS, f"one of {ROUTER_WEIGHTS}")
        check("router_layer", self._integer("router_layer", 0), "a layer's index, 0 or more")
        if self.routing == "layer_wise" and self.router_layer:
            problems.append(
                "`router_layer` belongs to pre-gated routing; layer-wise routers read their own "
                "layer, leave it out"
            )
        check("router_context", self.router_context in ("", *CONTEXTS), f"one of {CONTEXTS} or ''")
        check("context_scale", number("context_scale", 1e-6), "a number above 0")
        if self.context_half_life is not None:
            fine = number("context_half_life", 1e-6)
            check("context_half_life", fine, "a number of tokens above 0, or None")
            if not self.router_context:
                problems.append(
                    "`context_half_life` is of what `router_context` remembers; give both or neither"
                )
        if self.router_context and (self.router_layer or self.routing == "layer_wise"):
            problems.append(
                "`router_context` belongs to a router at the entrance; later layers have seen the "
                "past already, leave it out"
            )
        check("temperature", number("temperature", 1e-6), "a number above 0")
        start = self.temperature_start is None or number("temperature_start", 1e-6)
        check("temperature_start", start, "a number above 0, or None")
        check("anneal", number("anneal", 1e-6, 1), "above 0 and at most 1")
        check("jitter", number("jitter", 0, 0.999), "from 0 to below 1")
        for name in ("balance_coef", "z_loss_coef", "router_init"):
            check(name, number(name, 0), "0 or a positive number")
        for name in ("target_modules", "layers", "expert_names"):
            value = getattr(self, name)
            fine = value is None or (len(value) > 0 and len(set(value)) == len(value))
            check(name, fine, "a list with every entry once, or None")
        if self.expert_names is not None and experts and len(self.expert_names) != most:
            problems.append(
                f"`expert_names` has {len(self.expert_names)} entries, expected {most}, one per "
                "expert"
            )
        return problems

    @property
    def scale(self) -> float:
        """s = alpha / r, or alpha / sqrt(r)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def temperature_at(self, progress: float) -> float:
        """The temperature after a share of the training, 0 to 1."""
        if self.temperature_start is None:
            return self.temperature
        done = min(1.0, progress / self.anneal)
        return self.temperature_start + done * (self.temperature - self.temperature_start)

    def to_adapter(self, base_model: str, targets: list[str]) -> dict[str, Any]:
        """The adapter_config.json of the trained mixture.

        Args:
            base_model: base_model_name_or_path.
            targets: leaf names of the adapted linears.
        """
        later = self.routing == "layer_wise" or self.router_layer
        raw = {
            "peft_type": "ADAFUSE",
            "format_version": 2 if later or self.router_context else 1,
            "base_model_name_or_path": base_model,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "use_rslora": self.use_rslora,
            "target_modules": targets,
            "routing": self.routing,
            "router.weights": self.router_weights,
            "router.temperature": float(self.temperature),
        }
        if self.routing == "layer_wise":
            raw["router.scope"] = self.router_scope
        else:
            raw["router.input"] = self.router_input
        if self.router_layer:
            raw["router.layer"] = self.router_layer
        half_life = self.context_half_life
        half_life = None if half_life is None else float(half_life)
        raw |= context_json(self.router_context, float(self.context_scale), half_life)
        if self.expert_names:
            raw["expert_names"] = list(self.expert_names)
        return raw


def option_names() -> list[str]:
    """Names of all options of a mixture."""
    return [f.name for f in fields(MixtureConfig)]
