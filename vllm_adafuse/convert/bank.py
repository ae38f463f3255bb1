"""Stacks of experts as our format holds them, with ranks and scales of any origin folded in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from vllm_adafuse.convert.mixture import Linear, Mixture, Part
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.tensor_file import machine_memory

MODEL = "model.layers."


@dataclass
class Bank:
    """The keys `r`, `lora_alpha`, `use_rslora` (and those of always-on parts), and the tensors.

    Attributes:
        ranks: r_e of every expert: its largest among all linears.
        alphas: lora_alpha of every expert.
        use_rslora: of all.
        tensors: lora_A [E, r, in], lora_B [E, out, r], always_A, always_B.
        always: rank and alpha of the always-on parts; None if there are none.
        folded: linears in which a scale had to be multiplied into some B.
    """

    ranks: list[int]
    alphas: list[float]
    use_rslora: bool
    tensors: dict[str, torch.Tensor]
    always: tuple[int, float] | None
    folded: list[str]


def make_bank(linears: dict[str, Linear], shared_a: bool = False) -> Bank:
    """Stacks experts and always-on parts.

    An expert's scale in the format holds for all its linears. Where a source has several, the one
    of its largest rank is kept and the others' ratio to it is multiplied into B (in float64, kept
    in float32).

    Args:
        linears: at least one with a part; a linear may have fewer experts than another.
        shared_a: all experts of a linear have one A; it is written once.
    """
    experts = max(len(linear.experts) for linear in linears.values())
    by_expert: list[list[Part]] = [[] for _ in range(experts)]
    for linear in linears.values():
        for e, part in enumerate(linear.experts):
            if part is not None:
                by_expert[e].append(part)
    always = [linear.always for linear in linears.values() if linear.always is not None]
    rslora = all(part.rslora for parts in [*by_expert, always] for part in parts)
    # An expert without any part is all zeros, whatever its rank.
    leads = [max(parts, key=lambda p: p.rank) if parts else None for parts in by_expert]
    lead = max(always, key=lambda p: p.rank) if always else None
    ranks = [part.rank if part else 1 for part in leads]
    _refuse_padding(linears.values(), max(ranks))
    tensors, folded = {}, []
    for name, linear in linears.items():
        before = len(folded)
        if linear.experts:
            a, b = _stack(linear.experts, leads, max(ranks), name, folded)
            tensors[f"{name}.lora_A"] = a[:1].clone() if shared_a else a
            tensors[f"{name}.lora_B"] = b
        if linear.always is not None:
            a, b = _stack([linear.always], [lead], lead.rank, name, folded)
            tensors[f"{name}.always_A"], tensors[f"{name}.always_B"] = a[0].clone(), b[0].clone()
        del folded[before + 1 :]  # once is enough
    return Bank(
        ranks=ranks,
        alphas=[_alpha(part, rslora) if part else 1.0 for part in leads],
        use_rslora=rslora,
        tensors=tensors,
        always=(lead.rank, _alpha(lead, rslora)) if lead else None,
        folded=folded,
    )


def _refuse_padding(linears: Iterable[Linear], rank: int) -> None:
    """Every expert takes the largest rank of all: one large one may take all memory."""
    parts = [part for linear in linears for part in linear.experts if part is not None]
    needed = sum(4 * rank * (part.a.shape[1] + part.b.shape[0]) for part in parts)
    if needed > (memory := machine_memory()):
        raise AdapterError(
            "the mixture",
            [
                f"all its {len(parts)} experts of linears take the largest rank, {rank}, in this "
                f"format: {needed} bytes, more than the {memory} of this machine's memory; train "
                "with ranks that differ less"
            ],
        )


def _alpha(part: Part, rslora: bool) -> float:
    """The alpha that gives a part's scale under the adapter's one choice of `use_rslora`."""
    return part.alpha if part.rslora == rslora else part.alpha * math.sqrt(part.rank)


def _stack(
    parts: list[Part | None], leads: list[Part | None], rank: int, name: str, folded: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [E, rank, in], B [E, out, rank] of one linear; absent experts and ranks are zeros."""
    present = [part for part in parts if part is not None]
    dtype = present[0].a.dtype
    for part in present:
        dtype = torch.promote_types(torch.promote_types(dtype, part.a.dtype), part.b.dtype)
    if any(p is not None and p.scale != lead.scale for p, lead in zip(parts, leads)):
        dtype = torch.float32
        folded.append(name)
    a = torch.zeros(len(parts), rank, present[0].a.shape[1], dtype=dtype)
    b = torch.zeros(len(parts), present[0].b.shape[0], rank, dtype=dtype)
    for e, (part, lead) in enumerate(zip(parts, leads)):
        if part is None:
            continue
        a[e, : part.rank] = part.a
        ratio = part.scale / lead.scale if part.scale != lead.scale else 1.0
        b[e, :, : part.rank] = part.b if ratio == 1 else part.b.double() * ratio
    return a, b


def to_format(mixture: Mixture, base: str, hidden_size: int) -> tuple[dict, dict]:
    """A mixture in the adapter format.

    Args:
        mixture: what a source was read into.
        base: `base_model_name_or_path` to write.
        hidden_size: of the backbone.

    Returns:
        adapter_config.json without `x_converted_from`, and the tensors. A mixture without any
        router is one LoRA: version 1 with one expert. Everything else is version 2, layer-wise.
    """
    linears = mixture.linears
    plain = not any(linear.experts for linear in linears.values())
    if plain:  # one expert that everyone uses
        linears = {name: Linear(experts=[linear.always]) for name, linear in linears.items()}
    bank = make_bank(linears, shared_a=mixture.options.get("shared_A", False))
    raw = {
        "peft_type": "ADAFUSE",
        "format_version": 1 if plain else 2,
        "base_model_name_or_path": base,
        "num_experts": len(bank.ranks),
        "top_k": 1 if plain else mixture.top_k,
        "r": _short(bank.ranks),
        "lora_alpha": _short(bank.alphas),
        "use_rslora": bank.use_rslora,
        "target_modules": sorted({name.rsplit(".", 1)[1] for name in linears}),
        "routing": "pre_gated" if plain else "layer_wise",
        **({} if plain else mixture.options),
    }
    if bank.always:
        raw["always_r"], raw["always_alpha"] = bank.always
    if mixture.expert_names:
        raw["expert_names"] = mixture.expert_names
    tensors = dict(bank.tensors)
    if plain:
        tensors["router.weight"] = torch.zeros(1, hidden_size)
    for name, linear in linears.items():
        if linear.router is not None:
            tensors[f"{name}.router.weight"] = linear.router
    for block, weight in mixture.routers.items():
        tensors[f"{block}.router.weight"] = weight
    if bank.folded:
        mixture.notes.append(
            f"{len(bank.folded)} linears have scales or ranks of their own: the scale's ratio to "
            "the expert's is multiplied into B, in float32"
        )
    return raw, {name: tensor.contiguous() for name, tensor in tensors.items()}


def _short(values: list) -> list | int | float:
    return values[0] if len(set(values)) == 1 else values
