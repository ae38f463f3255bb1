"""adapter_config.json: the keys of the adapter format, versions 1 and 2, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_adafuse.format.context_keys import CONTEXT_KEYS, context_json, parse_context
from vllm_adafuse.format.keys import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Keys,
    is_hash,
    is_int,
    is_names,
    is_number,
    is_positive,
    unnest,
)
from vllm_adafuse.text import show, some

__all__ = ["AdapterConfig", "CONFIG_FILE", "WEIGHTS_FILE", "parse_config", "show", "some"]
# The newest that is read. A config says 1 as long as it uses nothing of 2.
FORMAT_VERSION = 2
MAX_EXPERTS, MAX_RANK, MAX_LAYERS = 1024, 1 << 16, 10**6
MAX_NAME = 200  # characters of an expert's name
# A composed checkpoint's config.json: the section that names the adapter's directory.
SECTION, ADAPTER_KEY = "adafuse", "adapter"
# What serving adds to that section, see serving/attach.py.
FINGERPRINT_KEY, CONTENT_KEY = "fingerprint", "content"
# The weights that routes depend on, see `digest.backbone_hash`.
BASE_HASH = "base_model_hash"
PRE_GATED, LAYER_WISE = "pre_gated", "layer_wise"
FOREIGN = "make one in this format of it with: vllm-adafuse convert SRC OUT"
BLOCKS = ("self_attn", "mlp")
ROUTER_INPUTS = ("first_norm", "embedding")
ROUTER_WEIGHTS = ("topk_softmax", "softmax_topk")
ROUTER_SCOPES = ("linear", "block")
ROUTER_LOGITS = ("linear", "abs")
MIXES = ("linear", "ffn_output")
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
_PRE_GATED_ONLY = ("router.input", "router.layer", *CONTEXT_KEYS)
_LAYER_WISE_ONLY = (
    "router.scope",
    "router.logits",
    "shared_A",
    "mix",
    "always_r",
    "always_alpha",
)
VERSION_2 = ("router.layer", *CONTEXT_KEYS, *_LAYER_WISE_ONLY)
OPTIONAL = (
    "use_rslora",
    "routing",
    "router.input",
    "router.weights",
    "router.temperature",
    "expert_names",
    BASE_HASH,
    *VERSION_2,
)


@dataclass(frozen=True)
class AdapterConfig:
    """A checked adapter_config.json. Lists have one entry per expert.

    Attributes:
        base_model: the backbone, as written in the file.
        num_experts: E, the number of LoRA experts (of a layer-wise router: the most).
        top_k: k, the experts that each token uses; where k differs by block or layer, the largest.
        ranks: rank r_e of every expert.
        alphas: lora_alpha of every expert.
        use_rslora: scale alpha / sqrt(r) instead of alpha / r.
        target_modules: leaf names of the adapted Hugging Face linears.
        router_input: what the router reads, one of ROUTER_INPUTS (pre-gated).
        router_weights: how weights follow from logits, one of ROUTER_WEIGHTS.
        temperature: logits are divided by it.
        expert_names: unique names, shown to people.
        routing: PRE_GATED, one decision per token; or LAYER_WISE.
        router_layer: the router reads what enters this layer (pre-gated).
        router_context: "" or one of CONTEXTS: the router sees the request's past too (pre-gated).
        context_scale: of what the past says.
        context_half_life: tokens after which what was said counts half; None: all counts alike.
        router_scope: what has a router of its own, one of ROUTER_SCOPES (layer-wise, as below).
        router_logits: one of ROUTER_LOGITS.
        top_k_blocks: k of the blocks, in the order of BLOCKS, where they differ.
        top_k_layers: k of each backbone layer, where they differ.
        shared_A: one lora_A serves all experts of a linear.
        mix: where experts are mixed, one of MIXES.
        always_r: rank of the LoRA parts that are always on, 0 where there are none.
        always_alpha: their alpha.
        base_hash: `digest.backbone_hash` of the backbone that it was made on, "" if not known.
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
    routing: str = PRE_GATED
    router_layer: int = 0
    router_context: str = ""
    context_scale: float = 1.0
    context_half_life: float | None = None
    router_scope: str = "linear"
    router_logits: str = "linear"
    top_k_blocks: tuple[int, ...] = ()
    top_k_layers: tuple[int, ...] = ()
    shared_A: bool = False
    mix: str = "linear"
    always_r: int = 0
    always_alpha: float = 0.0
    base_hash: str = ""

    @property
    def layer_wise(self) -> bool:
        """Routers inside the layers, instead of one for the whole model."""
        return self.routing == LAYER_WISE

    @property
    def format_version(self) -> int:
        """The oldest version of the format that can say this."""
        return 2 if self.layer_wise or self.router_layer or self.router_context else 1

    @property
    def rank(self) -> int:
        """The largest rank: the r of every expert's tensor."""
        return max(self.ranks)

    @property
    def scales(self) -> tuple[float, ...]:
        """s_e = alpha_e / r_e, or alpha_e / sqrt(r_e) with rsLoRA."""
        return tuple(self._scale(alpha, rank) for alpha, rank in zip(self.alphas, self.ranks))

    @property
    def always_scale(self) -> float:
        """s_a of the parts that are always on; 0 where there are none."""
        return self._scale(self.always_alpha, self.always_r) if self.always_r else 0.0

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def k_of(self, layer: int, block: str) -> int:
        """k of a router in a layer's block (one of BLOCKS)."""
        if self.top_k_layers:
            return self.top_k_layers[layer]
        return self.top_k_blocks[BLOCKS.index(block)] if self.top_k_blocks else self.top_k

    def to_json(self) -> dict[str, Any]:
        """The file's content; `AdapterConfig` read back from it equals this one."""

        def short(values: tuple) -> Any:
            return values[0] if len(set(values)) == 1 else list(values)

        top_k: Any = self.top_k
        if self.top_k_blocks:
            top_k = dict(zip(BLOCKS, self.top_k_blocks))
        elif self.top_k_layers:
            top_k = list(self.top_k_layers)
        raw = {
            "peft_type": "ADAFUSE",
            "format_version": self.format_version,
            "base_model_name_or_path": self.base_model,
            "num_experts": self.num_experts,
            "top_k": top_k,
            "r": short(self.ranks),
            "lora_alpha": short(self.alphas),
            "use_rslora": self.use_rslora,
            "target_modules": list(self.target_modules),
            "routing": self.routing,
            "router.input": self.router_input,
            "router.layer": self.router_layer,
            "router.scope": self.router_scope,
            "router.logits": self.router_logits,
            "router.weights": self.router_weights,
            "router.temperature": self.temperature,
            "shared_A": self.shared_A,
            "mix": self.mix,
            "always_r": self.always_r,
            "always_alpha": self.always_alpha,
            "expert_names": list(self.expert_names),
            BASE_HASH: self.base_hash,
            **context_json(self.router_context, self.context_scale, self.context_half_life),
        }
        absent = set(_PRE_GATED_ONLY if self.layer_wise else _LAYER_WISE_ONLY)
        absent |= set() if self.router_layer else {"router.layer"}
        absent |= set() if self.always_r else {"always_r", "always_alpha"}
        absent |= set() if self.base_hash else {BASE_HASH}
        return {key: value for key, value in raw.items() if key not in absent}

    def base_path(self, adapter_dir: Path) -> str:
        """The backbone's path (relative ones start at the adapter's directory) or hub name."""
        local = Path(adapter_dir, self.base_model)
        try:
            return str(local.resolve()) if local.exists() else self.base_model
        except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, a loop of links
            return self.base_model


def _check_routing(keys: Keys, version: int) -> bool:
    """Whether routing is layer-wise; keys that do not go with version or routing are problems."""
    values = keys.values
    allowed = (PRE_GATED, LAYER_WISE) if version > 1 else (PRE_GATED,)
    only = f'"{PRE_GATED}" or "{LAYER_WISE}"'
    if version < 2:
        only = f'"{PRE_GATED}", the only routing of format version 1; others need version 2'
    layer_wise = keys.get("routing", PRE_GATED, lambda v: v in allowed, only) == LAYER_WISE
    # A bad value of `routing` says nothing of the other keys.
    meant = values.get("routing", PRE_GATED)
    for key in (key for key in values if key in VERSION_2 and version < 2):
        keys.problems.append(
            f"{CONFIG_FILE}: key `{key}` belongs to format version 2; set `format_version` to 2 "
            "or leave it out"
        )
    wrong = {PRE_GATED: _LAYER_WISE_ONLY, LAYER_WISE: _PRE_GATED_ONLY}
    for key in wrong.get(meant, ()) if version > 1 and isinstance(meant, str) else ():
        if key in values:
            other = LAYER_WISE if meant == PRE_GATED else PRE_GATED
            keys.problems.append(
                f'{CONFIG_FILE}: key `{key}` is {show(values[key])}, but goes with `routing` '
                f'"{other}" only, and routing is "{meant}"; leave it out'
            )
    return layer_wise


def _parse_top_k(keys: Keys, experts: int | None, layer_wise: bool) -> dict[str, Any]:
    """top_k, top_k_blocks and top_k_layers."""
    most = experts or MAX_EXPERTS
    accept, expected = is_int(1, most), f"an integer from 1 to num_experts ({most})"
    value = keys.values.get("top_k")
    if not layer_wise or not isinstance(value, (dict, list)):
        return {"top_k": keys.get("top_k", None, accept, expected)}
    if isinstance(value, dict):
        if set(value) == set(BLOCKS) and all(map(accept, value.values())):
            return {"top_k": max(value.values()), "top_k_blocks": tuple(value[b] for b in BLOCKS)}
        keys.bad("top_k", f"an object with self_attn and mlp, each {expected}")
    elif value and len(value) <= MAX_LAYERS and all(map(accept, value)):
        return {"top_k": max(value), "top_k_layers": tuple(value)}
    else:
        keys.bad("top_k", f"a list with an entry per layer, each {expected}")
    return {"top_k": None}


def _parse_layer_wise(keys: Keys, ranks: tuple[int, ...] | None) -> dict[str, Any]:
    """The fields that only layer-wise routing has, and their bad combinations."""

    def one_of(key: str, choices: tuple[str, ...]) -> str:
        return keys.get(key, choices[0], lambda v: v in choices, f"one of {choices}")

    fields = {
        "router_scope": one_of("router.scope", ROUTER_SCOPES),
        "router_logits": one_of("router.logits", ROUTER_LOGITS),
        "mix": one_of("mix", MIXES),
        "shared_A": keys.get(
            "shared_A", False, lambda v: isinstance(v, bool), "true or false"
        ),
        "always_r": keys.get("always_r", 0, is_int(1, MAX_RANK), "a positive integer"),
        "always_alpha": float(
            keys.get("always_alpha", 0.0, is_number, "a finite float32 number")
        ),
    }
    if fields["mix"] == "ffn_output" and fields["router_scope"] != "block":
        keys.bad("mix", '"linear", or `router.scope` "block": experts that are mixed at the '
                 "MLP's output share one router")  # fmt: skip
    if fields["mix"] == "ffn_output" and keys.values.get("router.weights") == "softmax_topk":
        keys.bad("mix", '"linear", or `router.weights` "topk_softmax": the weights must sum to 1')
    if fields["shared_A"] and ranks and len(set(ranks)) > 1:
        keys.bad("r", "one integer, because `shared_A` is true")
    for key, other in (("always_r", "always_alpha"), ("always_alpha", "always_r")):
        if key in keys.values and other not in keys.values:
            keys.bad(key, f"`{other}` beside it; give both or neither")
    return fields


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
    keys = Keys(unnest(raw, problems))
    values, problems = keys.values, keys.problems + problems
    keys.problems = problems

    if values.get("peft_type", "ADAFUSE") != "ADAFUSE":
        keys.bad("peft_type", f'"ADAFUSE"; {FOREIGN}')
        if "num_experts" not in values or "format_version" not in values:
            return None, problems[-1:]  # of another library: all else would only follow from it
    version = values.get("format_version", 1)
    if not is_int(1, 10**6)(version):
        keys.bad("format_version", f"an integer from 1 to {FORMAT_VERSION}")
        version = FORMAT_VERSION
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
        "num_experts", None, is_int(1, MAX_EXPERTS), f"an integer from 1 to {MAX_EXPERTS}"
    )
    layer_wise = _check_routing(keys, version)
    top_k = _parse_top_k(keys, experts, layer_wise)
    ranks = keys.per_expert("r", experts, is_int(1, MAX_RANK), "a positive integer")
    alphas = keys.per_expert("lora_alpha", experts, is_number, "a finite float32 number")
    targets = keys.get("target_modules", None, is_names, "a list of module names")
    if targets and len(set(targets)) < len(targets):
        keys.bad("target_modules", "every name once")
    rslora = keys.get("use_rslora", False, lambda v: isinstance(v, bool), "true or false")
    router_input = keys.get(
        "router.input", "first_norm", lambda v: v in ROUTER_INPUTS, f"one of {ROUTER_INPUTS}"
    )
    router_layer = keys.get(
        "router.layer", 0, is_int(0, MAX_LAYERS), "the index of a layer, 0 or more"
    )
    router_weights = keys.get(
        "router.weights", "topk_softmax", lambda v: v in ROUTER_WEIGHTS, f"one of {ROUTER_WEIGHTS}"
    )
    temperature = keys.get(
        "router.temperature", 1.0, is_positive, "a finite number above 0"
    )
    base_hash = keys.get(BASE_HASH, "", is_hash, "64 hexadecimal digits, in lower case")
    context = parse_context(keys, layer_wise, router_layer)
    layered = _parse_layer_wise(keys, ranks) if layer_wise else {}
    names = keys.get(
        "expert_names",
        [f"expert_{e}" for e in range(experts or 0)],
        is_names,
        "a list of num_experts names",
    )
    if experts and len(names) != experts:
        keys.bad("expert_names", f"{experts} names, one per expert, but it has {len(names)}")
    elif len(set(names)) < len(names):
        keys.bad("expert_names", "every name once")
    elif max(map(len, names), default=0) > MAX_NAME:
        keys.bad("expert_names", f"names of at most {MAX_NAME} characters")

    if problems:
        return None, problems
    config = AdapterConfig(
        base_model=base,
        num_experts=experts,
        ranks=ranks,
        alphas=tuple(float(a) for a in alphas),
        target_modules=tuple(targets),
        use_rslora=rslora,
        router_input=router_input,
        router_weights=router_weights,
        temperature=float(temperature),
        expert_names=tuple(names),
        base_hash=base_hash,
        routing=LAYER_WISE if layer_wise else PRE_GATED,
        router_layer=router_layer,
        **context,
        **top_k,
        **layered,
    )
    return config, []
