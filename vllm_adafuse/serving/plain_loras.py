"""A plain PEFT LoRA as a server takes it: which of its tensors are understood, and what is refused.

Its pairs on linears lie on pages of ours. The rest, on the embedding, on the output head and on the
backbone's own experts, has no pages: it is for vLLM's own LoRA, where that stands beside ours
(`serving/rest.py`). So is a classifier's head that was trained whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm_adafuse.convert import peft_lora
from vllm_adafuse.convert.mixture import Part
from vllm_adafuse.convert.peft_config import check_modules_to_save
from vllm_adafuse.convert.refused import refused_source
from vllm_adafuse.convert.registry import FORMATS
from vllm_adafuse.convert.source import Source
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.backbone import Backbone

VLLM_LORA = "--additional-config '{\"adafuse\": {\"lora\": \"vllm\"}}'"
BOTH_LORA = VLLM_LORA.replace("vllm", "both")
# What has no pages, by the last part of its name in a checkpoint.
EMBEDDINGS, HEAD, EXPERTS = ("embed_tokens", "wte"), "lm_head", "experts"
_EXPERT = rf".*\b{EXPERTS}\.\d+\..*"
# Heads that PEFT trains whole for a classifier, whichever of them there is.
CLASSIFIERS = "score", "classifier"
_CLASSIFIER = rf"((?:\w+\.)*(?:{'|'.join(CLASSIFIERS)}))\.(weight|bias)"
# The backbone's own weights, which PEFT saves beside a LoRA on them.
_BASE = r"(.*\b(?:embed_tokens|wte|lm_head))\.base_layer\.weight"
# Tensors that are no pair on a linear, in the order of the checks: those of the rest, and others.
_REST = {
    r".*\.lora_embedding_[AB]\b.*|.*(?:embed_tokens|wte)\.(?:lora_|base_layer\.).*": (
        "adapts the embedding, expected LoRA on linears"
    ),
    r".*\blm_head\.(?!modules_to_save\b).*": "adapts the output head, expected LoRA on linears",
    _CLASSIFIER: "replaces a classifier's head (`modules_to_save`), expected LoRA on linears",
    _EXPERT: "adapts an expert of the backbone's own, expected LoRA on linears of all tokens",
}
_OTHERS = {
    rf".*\b{EXPERTS}\.(?!\d).*": "adapts the backbone's own experts in one tensor, expected LoRA on "
    "linears, or on each expert's by itself",
    r".*\bmodules_to_save\..*": (
        "replaces a module of the backbone (`modules_to_save`), expected LoRA on linears"
    ),
    r".*\.lora_magnitude_vector\b.*": "belongs to DoRA, expected plain LoRA",
    r".*\.ia3_l\b.*": "belongs to IA3, expected plain LoRA",
    r".*\.bias": 'is a trained bias, expected an adapter of `bias` "none"',
}
_WAY_OUT = f"train without it, or let vLLM's own LoRA try it ({VLLM_LORA})"
LOAD_AGAIN = "load it again when its files are complete"
_REST_WAY_OUT = (
    f"train without it, or let vLLM's own LoRA add it beside ours ({BOTH_LORA}), or serve all "
    f"({VLLM_LORA})"
)


def is_rest(name: str) -> bool:
    """Whether a module of a checkpoint gets no pages."""
    leaf = name.rpartition(".")[2]
    return leaf in (*EMBEDDINGS, HEAD, *CLASSIFIERS) or re.fullmatch(_EXPERT, name, re.ASCII) is not None


def refuse(path: Path, *problems: str) -> AdapterError:
    """The error of an adapter that is not served, to raise."""
    return AdapterError(f"adapter {path}", list(problems))


@contextmanager
def as_adapter(path: Path) -> Iterator[None]:
    """What readers of other formats call a source is an adapter to those who serve it."""
    try:
        yield
    except AdapterError as e:
        raise refuse(path, *e.problems) from e


Heads = dict[str, tuple[torch.Tensor, torch.Tensor | None]]


def read_parts(path: Path, backbone: Backbone | None, rest: bool) -> tuple[dict[str, Part], Heads]:
    """Every pair of a PEFT LoRA, by the name of its module, and the classifier's heads that it has
    whole, weight [labels, in] and bias [labels] or none, after all checks.

    Args:
        path: the directory.
        backbone: whose names and shapes it must have; None where nothing is known of it.
        rest: whether embedding, output head and experts may have pairs, and heads be whole.

    Raises:
        AdapterError: with every problem found.
    """
    known = backbone or Backbone(str(path), None, 0, 0, 0, 0.0, _AnyLinear())
    if rest and backbone is not None:
        known = _with_rest(backbone)
    with as_adapter(path):
        source = _open_source(path, rest)
        parts = peft_lora.read_lora(source, known, peft_lora.ANY_PAIR)
        heads = take_heads(source)
        # PEFT names both heads, whichever the backbone has.
        check_modules_to_save(source, CLASSIFIERS if heads else ())
        if not parts and not source.problems:
            source.problems.append(
                f"{source.file}: holds no lora_A / lora_B pair, expected at least one; nothing "
                "would be adapted"
            )
        source.finish()
    return parts, heads


def take_heads(source: Source) -> Heads:
    """The classifier's heads of a source, by their names."""
    found: Heads = {}
    why = "a head's, which PEFT saved whole"
    for name in dict.fromkeys(match[1] for match in source.match(_CLASSIFIER)):
        weight = source.take(f"{name}.weight", ("labels", "in"), why)
        bias = f"{name}.bias"
        has_bias = bias in source.tensors
        found[name] = weight, source.take(bias, (len(weight),), why) if has_bias else None
    return found


def _with_rest(backbone: Backbone) -> Backbone:
    """A backbone whose embedding and output head are linears too, of V inputs and V outputs."""
    hidden, vocab = backbone.hidden_size, backbone.vocab_size
    rest = {f"model.{EMBEDDINGS[0]}": (vocab, hidden)}
    if not backbone.inner:
        rest[HEAD] = hidden, vocab
    return replace(backbone, linears={**backbone.linears, **rest})


def _open_source(path: Path, rest: bool) -> Source:
    """A PEFT directory whose tensors are pairs alone, as far as their names tell."""
    source = Source.open(path)
    if reason := refused_source(source):
        raise refuse(path, reason)
    for format_ in FORMATS:
        if format_ is not peft_lora and format_.recognises(source):
            raise refuse(
                path,
                f"{path}: is a {format_.KIND} adapter, expected AdaFuse's format or a plain PEFT "
                f"LoRA; make one of it with: vllm-adafuse convert {path} OUT",
            )
    source.other_base = "serve it on the backbone that it was trained on"
    if rest:
        source.taken.update(match[0] for match in source.match(_BASE))
    else:
        for pattern, problem in _REST.items():
            source.leave(pattern, f"{problem}; {_REST_WAY_OUT}")
    for pattern, problem in _OTHERS.items():
        source.leave(pattern, f"{problem}; {_WAY_OUT}")
    return source


class _AnyLinear(dict):
    """Linears of which neither names nor shapes are known: holds every name, lists none."""

    def __contains__(self, name: Any) -> bool:
        return True

    def get(self, name: Any, default: Any = None) -> Any:
        return default


Pair = Callable[[str], tuple[torch.Tensor, torch.Tensor]]


@contextmanager
def read_pairs(path: Path) -> Iterator[Pair]:
    """Yields `pair(module) -> (A [1, r, in], B [1, out, r])` of a PEFT directory that was checked.

    Raises:
        AdapterError: a tensor is gone since.
    """
    with as_adapter(path):
        source = Source.open(path)
    names = peft_lora.find_pairs(source, peft_lora.ANY_PAIR)

    def pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if missing := {*names.get(name, (name,))} - source.tensors.keys():
            raise refuse(
                path,
                f"{source.file}: tensor {min(missing)} is gone since the adapter was checked; "
                f"{LOAD_AGAIN}",
            )
        a, b = names[name]
        return source.tensors[a][None], source.tensors[b][None]

    yield pair


def read_base(path: Path) -> list[tuple[str, torch.Tensor]]:
    """The backbone's weights in a PEFT directory that was checked: module, weight."""
    with as_adapter(path):
        source = Source.open(path)
    return [(match[1], source.tensors[match[0]]) for match in source.match(_BASE)]


def read_heads(path: Path) -> Heads:
    """The classifier's heads in a PEFT directory that was checked."""
    with as_adapter(path):
        return take_heads(Source.open(path))
