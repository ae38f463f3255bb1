"""A mixture with experts more or fewer: the rows of all others stay, in the router too."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from vllm_adafuse.convert.mixture import Part
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.experts.compose import Composed, write_mixture
from vllm_adafuse.experts.context import ContextOptions, Form, read_rows, train_router
from vllm_adafuse.experts.loras import read_experts, stack_experts
from vllm_adafuse.format.adapter import Adapter, check_adapter, load_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import MAX_EXPERTS
from vllm_adafuse.format.origin import origin_problem
from vllm_adafuse.format.places import output_problem, require_backbone, written_name
from vllm_adafuse.text import show, some


def change_mixture(
    mixture: str | Path,
    out: str | Path,
    add: dict[str, str | Path],
    remove: Sequence[str] = (),
    base: str | Path | None = None,
    options: ContextOptions | None = None,
    progress: bool = False,
    mixed_backbones: bool = False,
) -> Composed:
    """Puts plain PEFT LoRAs beside the experts of a mixture, and takes experts out of it.

    The other experts' weights and rows of the router are kept, so that tokens for which no added
    expert is among the k keep their routes, and those that chose no removed one; of a softmax over
    all experts their experts, while the weights change.

    Args:
        mixture: a pre-gated adapter whose router stands at the entrance.
        out: the directory to write; absent or empty.
        add: expert's name -> directory of a LoRA.
        remove: names of experts.
        base: the backbone, default the mixture's. Only what is added needs it.
        options: how the rows of added experts are trained.
        progress: show a progress bar.
        mixed_backbones: take LoRAs that were trained on another backbone too.

    Returns:
        What was made.

    Raises:
        AdapterError: something cannot be used, with every problem found; or `out` is taken.
    """
    out, notes = Path(out).absolute(), []
    old = load_adapter(mixture)
    _check(old, out, add, remove, options)
    config, found, backbone = old.config, None, None
    if add or base is not None:
        found, backbone = _backbone(old, base)
    kept = [name for name in config.expert_names if name not in remove]
    names = [*kept, *add]
    with tqdm(total=3, desc="read experts", disable=not progress) as bar:
        experts = _experts(old, kept)
        if add:
            said = {f"the mixture {old.path.name}": (config.base_model, os.path.realpath(found))}
            paths = {name: Path(path) for name, path in add.items()}
            experts += read_experts(paths, backbone, notes, mixed_backbones, said)
        if not any(experts):
            raise AdapterError(
                f"change of mixture {old.path}",
                [
                    f"lora_A and lora_B of {some(kept)}, which would stay, are all zeros: expected one "
                    "expert at least that changes something; keep another"
                ],
            )
        bank, rows = stack_experts(experts), read_rows(old)
        top_k = min(config.top_k, len(names))
        if top_k < config.top_k:
            notes.append(f"tokens use {top_k} of {len(names)} experts, where they used {config.top_k}")
        if config.router_weights == "softmax_topk":
            notes += [
                f"weights are of a softmax over all experts: {what}"
                for changed, what in (
                    (add, "those added take their share of all"),
                    (remove, "those removed leave their share to the others"),
                )
                if changed
            ]
        bar.update()
        trained = None
        if add:
            form = Form(
                top_k, config.router_input, config.router_context, config.context_scale,
                config.router_weights, "router.bias" in old.tensors, config.temperature,
                config.context_half_life,
            )  # fmt: skip
            kept_rows = {name: rows[name] for name in kept}
            trained = train_router(found, bank, names, form, kept_rows, options, progress)
        bar.update()
        bar.set_description("write and check")
        router = {t: torch.stack([rows[name][t] for name in kept]) for t in rows[kept[0]]}
        raw = config.to_json() | {
            "base_model_name_or_path": written_name(str(base or config.base_path(old.path)), found)
            if found else config.base_path(old.path),
            "num_experts": len(names), "top_k": top_k, "r": bank.ranks, "lora_alpha": bank.alphas,
            "use_rslora": bank.use_rslora, "expert_names": names,
            "target_modules": sorted({name.split(".")[-2] for name in bank.tensors}),
            "x_composed_from": {
                "mixture": old.path.name,
                "loras": {name: os.path.basename(os.path.abspath(p)) for name, p in add.items()},
                "removed": list(remove),
                "held_out": trained.to_json() if trained else None,
                "notes": notes,
            },
        }  # fmt: skip
        write_mixture(out, raw, bank.tensors | (trained.tensors if trained else router), backbone)
        bar.update()
    return Composed(out, trained=trained, notes=notes)


def _check(old: Adapter, out: Path, add, remove, options: ContextOptions | None) -> None:
    """Raises AdapterError for all that is wrong with the arguments."""
    config, problems = old.config, []
    if config.layer_wise or config.router_layer:
        problems.append(
            f"adapter {old.path}: its routers stand inside the layers, expected one at the entrance, "
            "as compose-experts makes it; compose anew"
        )
    if problem := output_problem(out):
        problems.append(f"output directory {out}: {problem}")
    has = list(config.expert_names)
    for name in remove:
        if name not in has:
            problems.append(f"it has no expert {show(name)} to remove; it has {some(has)}")
    if taken := [name for name in add if name in has]:
        problems.append(f"it has an expert {some(taken)} already; name the LoRA otherwise")
    if not add and not remove:
        problems.append("nothing is to change: name a LoRA to add, or an expert with --remove")
    if not set(has) - set(remove):
        problems.append("all of its experts are to be removed, expected one at least that stays")
    named = {*has, *add} - {*remove}
    if len(named) > MAX_EXPERTS:
        problems.append(f"{len(named)} experts, expected {MAX_EXPERTS} at most; remove some")
    for name, _ in options.labelled if options else ():
        if name not in named:
            problems.append(f"text of {show(name)}: no such expert; there are {some(sorted(named))}")
    if add and options is None:
        problems.append("to add an expert trains its row of the router, which needs text: --data")
    if problems:
        raise AdapterError(f"change of mixture {old.path}", problems)


def _backbone(old: Adapter, base: str | Path | None) -> tuple[Path, Backbone]:
    """Directory and shapes of the backbone; the mixture must be one of it."""
    found = require_backbone(str(base or old.config.base_path(old.path)), option="--base")
    backbone = Backbone.from_path(str(found))
    _, problems = check_adapter(old.path, backbone, values=False)  # they were read
    if not problems and (problem := origin_problem(old.config, str(found))):
        problems = [problem]
    if problems:
        raise AdapterError(f"adapter {old.path}", problems)
    return found, backbone


def _experts(old: Adapter, kept: Sequence[str]) -> list[dict[str, Part]]:
    """The experts that stay, each the LoRA that it is."""
    config, experts = old.config, [{} for _ in kept]
    places = [config.expert_names.index(name) for name in kept]
    with old.reader() as read:
        for linear in old.projections:
            a, b = (read(f"{linear}.lora_{side}") for side in "AB")
            for parts, e in zip(experts, places):
                if a[e].any() or b[e].any():  # else it leaves this linear alone
                    rank = config.ranks[e]
                    own = a[e, :rank].clone(), b[e, :, :rank].clone()
                    parts[linear] = Part(*own, config.alphas[e], config.use_rslora)
    return experts
