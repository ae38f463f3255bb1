"""A plain PEFT LoRA: one expert that every token uses. Arrow, compose-experts and a server that
takes LoRAs as they are read it too.

    model.layers.{i}.{block}.{module}.lora_A.weight [r, in], .lora_B.weight; `names.py` has what
    else may stand around it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_adafuse.convert.mixture import Linear, Mixture, Part
from vllm_adafuse.convert.options import Options
from vllm_adafuse.convert.patterns import first_matches
from vllm_adafuse.convert.peft_config import check_complete, check_config, check_plain
from vllm_adafuse.convert.source import Source
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import CONFIG_FILE, MAX_RANK
from vllm_adafuse.format.keys import is_int, is_positive
from vllm_adafuse.text import show

KIND = "PEFT LoRA"
OPTIONS: tuple[str, ...] = ()
LINEAR = r"(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+))"
_ENDING = r"\.lora_(?:A|B)\.weight"
_PAIR = LINEAR + _ENDING
# On any module, not only on the linears of a decoder's layers; embeddings have names of their own.
ANY_PAIR = r"((?:\w+\.)*\w+)\.lora_(?:[AB]\.weight|embedding_[AB])"


def recognises(source: Source) -> bool:
    """Pairs, no router, no numbered experts."""
    return source.has(_PAIR)


def read(source: Source, backbone: Backbone, options: Options) -> Mixture:
    """The LoRA as the always-on part of every linear."""
    parts = read_lora(source, backbone)
    return Mixture(KIND, {n: Linear(always=part) for n, part in parts.items()}, top_k=1)


def find_pairs(source: Source, pattern: str = _PAIR) -> dict[str, tuple[str, str]]:
    """Linear -> the names of its A and B, of which the file may lack one.

    Args:
        source: an open source.
        pattern: of a tensor's name; its first group is the linear's.
    """
    pairs = {}
    for match in source.match(pattern):
        ending = "lora_embedding_{}" if ".lora_embedding_" in match[0] else "lora_{}.weight"
        pairs.setdefault(match[1], tuple(f"{match[1]}.{ending.format(side)}" for side in "AB"))
    return pairs


def read_lora(source: Source, backbone: Backbone, pattern: str = _PAIR) -> dict[str, Part]:
    """All pairs of a plain PEFT LoRA; `rank_pattern` and `alpha_pattern` are followed.

    Args:
        source: an open source; `finish` is left to the caller.
        backbone: gives the shapes.
        pattern: of a tensor's name; its first group is the linear's.

    Returns:
        Linear -> LoRA.
    """
    check_config(source)
    check_plain(source)
    rslora = bool(source.config.get("use_rslora"))
    rank = source.integer("r", MAX_RANK)
    alpha = source.number("lora_alpha")
    pairs = find_pairs(source, pattern)
    modules = [source.module_in_peft(a) for a, _ in pairs.values()]
    ranks = _by_pattern(source, "rank_pattern", is_int(1, MAX_RANK), modules, rank)
    alphas = _by_pattern(source, "alpha_pattern", is_positive, modules, alpha)
    parts = {
        name: take_pair(source, backbone, name, a, b, own_rank, own_alpha, rslora)
        for (name, (a, b)), own_rank, own_alpha in zip(pairs.items(), ranks, alphas)
    }
    check_complete(source, parts, backbone)
    return parts


def take_pair(
    source: Source,
    backbone: Backbone,
    linear: str,
    a: str,
    b: str,
    rank: int,
    alpha: float,
    rslora: bool = False,
) -> Part:
    """Takes A [r, in] and B [out, r] of one linear, checked against config and backbone."""
    size_in, size_out = backbone.linears.get(linear, ("in", "out"))
    why = f"r is {rank} in {CONFIG_FILE}; the backbone is {backbone.path}"
    if linear not in backbone.linears:
        source.blame(
            a, f"fits no linear of the backbone {backbone.path}; {source.other_base}"
        )
    return Part(
        source.take(a, (rank, size_in), why), source.take(b, (size_out, rank), why), alpha, rslora
    )


def _by_pattern(
    source: Source, key: str, accept: Callable, modules: list[str], default: float
) -> list[Any]:
    """PEFT's rule for each module: the first pattern that matches the end of its name."""
    given = source.config.get(key) or {}
    try:
        values = list(given.values()) if isinstance(given, dict) else [given]
        if wrong := [value for value in values if not accept(value)]:
            raise ValueError(f"{show(wrong[0])} is no positive number")
        return [default if i is None else values[i] for i in first_matches(list(given), modules)]
    except ValueError as e:
        source.problems.append(
            f"{CONFIG_FILE}: `{key}` is {show(given)}, expected patterns and numbers ({e})"
        )
    return [default] * len(modules)
