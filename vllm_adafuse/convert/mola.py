"""MoLA (arXiv 2402.08562): every linear has a router of its own, layers may differ in experts.

    model.layers.{i}.{block}.{module}.router.router.weight [E_i, in]
    ….lora_A_{e}.weight [r_i, in]   ….lora_B_{e}.weight [out, r_i]

MoE-PEFT's dialect of it has the names of `moe_peft.py`.
"""

from __future__ import annotations

from vllm_adafuse.convert import moe_peft
from vllm_adafuse.convert.mixture import Linear, Mixture
from vllm_adafuse.convert.options import Options
from vllm_adafuse.convert.peft_config import check_complete, check_config
from vllm_adafuse.convert.peft_lora import LINEAR, take_pair
from vllm_adafuse.convert.source import Source
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import CONFIG_FILE, MAX_EXPERTS, MAX_RANK
from vllm_adafuse.format.keys import is_int
from vllm_adafuse.text import show

KIND = "MoLA"
OPTIONS = ("top_k",)
_ROUTER = LINEAR + r"\.router\.router\.weight"
_EXPERT = LINEAR + r"\.lora_[AB]_(\d+)\.weight"


def recognises(source: Source) -> bool:
    """By the doubled word in its router's name, or MoE-PEFT's first word."""
    return source.has(_ROUTER) or source.has(_EXPERT) or source.has(r"mola\..*")


def read(source: Source, backbone: Backbone, options: Options) -> Mixture:
    """One router for every linear."""
    if source.has(r"mola\..*"):
        return _read_moe_peft(source, backbone, options)
    check_config(source, rslora=False)
    if options.top_k is None:
        source.problems.append(
            f"{CONFIG_FILE}: MoLA does not save its top_k; say it with --top-k, one number or one "
            "for each layer (its scripts train with 2)"
        )
    linears: dict[str, Linear] = {}
    for match in [*source.match(_ROUTER), *source.match(_EXPERT)]:
        if (name := match[1]) not in linears:
            stem = match[0][: match[0].index(name) + len(name)]
            linears[name] = _read_linear(source, backbone, name, stem, int(match[2]))
    check_complete(source, linears, backbone)
    notes = ["top_k is not saved by MoLA: taken from --top-k"]
    return Mixture(KIND, linears, _check_top_k(source, options, linears, backbone), notes=notes)


def _read_linear(source: Source, backbone: Backbone, name: str, stem: str, layer: int) -> Linear:
    """A linear whose number of experts is the number of its router's rows."""
    size_in = backbone.linears.get(name, ("in", "out"))[0]
    router = source.take(
        f"{stem}.router.router.weight", ("experts", size_in), f"backbone {backbone.path}"
    )
    alpha = source.number("lora_alpha")
    rank = source.config.get("r")
    if isinstance(rank, list):
        rank = rank[layer] if layer < len(rank) else None
    if not is_int(1, MAX_RANK)(rank):
        source.problems.append(
            f"{CONFIG_FILE}: `r` is {show(source.config.get('r'))}, expected a positive integer, "
            f"or a list of them with one for layer {layer}; correct it"
        )
        rank = 1
    return Linear(
        experts=[
            take_pair(
                source, backbone, name, f"{stem}.lora_A_{e}.weight", f"{stem}.lora_B_{e}.weight",
                rank, alpha,
            )
            for e in range(router.shape[0])
        ],
        router=router,
    )  # fmt: skip


def _check_top_k(
    source: Source, options: Options, linears: dict[str, Linear], backbone: Backbone
) -> int | list[int]:
    """k, or a list with one for each layer; no router has fewer experts."""
    given = options.top_k or 1
    by_layer = list(given) if isinstance(given, tuple) else [given] * backbone.num_layers
    if len(by_layer) != backbone.num_layers:
        source.problems.append(
            f"--top-k has {len(by_layer)} numbers, expected one, or one for each of the "
            f"backbone's {backbone.num_layers} layers"
        )
        return 1
    for name, linear in linears.items():
        k = by_layer[min(int(name.split(".")[2]), len(by_layer) - 1)]
        if k > len(linear.experts):
            source.problems.append(
                f"--top-k is {k} for {name}, which has {len(linear.experts)} experts; give each "
                "layer a k of its own: --top-k 1,2,2"
            )
            break
    return by_layer if isinstance(given, tuple) else given


def _read_moe_peft(source: Source, backbone: Backbone, options: Options) -> Mixture:
    notes = []
    top_k = source.integer("top_k", MAX_EXPERTS, default=2)
    if "top_k" not in source.config:
        notes.append("top_k is not in the config: 2, MoE-PEFT's default")
    if options.top_k is not None and options.top_k != top_k:
        source.problems.append(
            f"--top-k is {show(options.top_k)}, but {CONFIG_FILE} says {top_k}; leave it out"
        )
    linears = moe_peft.read_routed_linears(source, backbone, "mola")
    return Mixture(f"{KIND} (MoE-PEFT)", linears, top_k, notes=notes)
