"""N LoRAs and a router as one adapter."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm_adafuse.convert.source import read_json
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.experts.context import (
    ContextOptions,
    ContextRouter,
    Form,
    rows_from,
    train_router,
)
from vllm_adafuse.experts.loras import read_experts, stack_experts
from vllm_adafuse.experts.picture import check_suffix, write_report
from vllm_adafuse.experts.router import PENALTIES, Features, fit_router, uniform_router
from vllm_adafuse.experts.samples import read_samples
from vllm_adafuse.experts.separability import Separability, measure
from vllm_adafuse.format.backbone import Backbone, require_safetensors
from vllm_adafuse.format.config import (
    BASE_HASH,
    CONFIG_FILE,
    MAX_EXPERTS,
    ROUTER_INPUTS,
    parse_config,
)
from vllm_adafuse.format.context_keys import context_json
from vllm_adafuse.format.origin import known_hash
from vllm_adafuse.format.places import (
    output_problem,
    require_backbone,
    revision_notes,
    written_name,
)
from vllm_adafuse.format.pretrained import load_tokenizer
from vllm_adafuse.text import show, visible

ROUTERS = ("fit", "uniform")
# A token often leaves the domain open: its likely experts together do better than one or two.
TOP_K = 4
# With the past it does not.
CONTEXT_TOP_K = 2


@dataclass(frozen=True)
class RouterOptions:
    """How the router comes to be.

    Attributes:
        router: "fit" to samples, or "uniform": every expert with weight 1 / N for every token.
        top_k: experts per token; None: `TOP_K`, or all if there are fewer (all of them with a
            uniform router).
        router_input: what the router reads, as in the format.
        held_out: share of every sample's end that is not fitted.
        context: how a router that sees the past is trained, instead of fitting one; or None.

    Raises:
        ValueError: a value that none of these can have.
    """

    router: str = "fit"
    top_k: int | None = None
    router_input: str = "first_norm"
    held_out: float = 0.2
    context: ContextOptions | None = None

    def __post_init__(self):
        if self.router not in ROUTERS:
            raise ValueError(f"router is {self.router!r}, expected one of {ROUTERS}")
        if self.router_input not in ROUTER_INPUTS:
            raise ValueError(f"router_input is {self.router_input!r}, expected {ROUTER_INPUTS}")
        if not 0.05 <= self.held_out <= 0.5:
            raise ValueError(f"held_out is {self.held_out}, expected a share from 0.05 to 0.5")

    def k_of(self, experts: int) -> int:
        """k for a number of experts.

        Raises:
            ValueError: `top_k` does not go with it.
        """
        if self.router == "uniform" or experts == 1:
            if self.top_k not in (None, experts):
                raise ValueError(
                    f"top_k is {self.top_k}, expected {experts}: with equal logits the first k "
                    "experts would serve every token"
                )
            return experts
        if self.top_k is not None and not 1 <= self.top_k <= experts:
            raise ValueError(f"top_k is {self.top_k}, expected 1 to {experts}, the number of LoRAs")
        return self.top_k or min(CONTEXT_TOP_K if self.context else TOP_K, experts)


@dataclass
class Composed:
    """The result.

    Attributes:
        path: the adapter's directory.
        separability: on held-out text; None without samples.
        telling: texts of `separability.telling`.
        trained: the router that sees the past; None without one.
        notes: what was assumed, one sentence each.
    """

    path: Path
    separability: Separability | None = None
    telling: list[list[str]] = field(default_factory=list)
    trained: ContextRouter | None = None
    notes: list[str] = field(default_factory=list)


def compose_experts(
    loras: dict[str, str | Path],
    out: str | Path,
    base: str | Path | None = None,
    samples: dict[str, Sequence[str | Path]] | None = None,
    options: RouterOptions = RouterOptions(),  # noqa: B008 - frozen
    report: str | Path | None = None,
    progress: bool = False,
    mixed_backbones: bool = False,
) -> Composed:
    """Makes a pre-gated adapter whose experts are plain PEFT LoRAs.

    Args:
        loras: expert's name -> directory of a LoRA, in the experts' order.
        out: the directory to write; absent or empty.
        base: the backbone, default the first LoRA's. Fitting reads its embedding and tokenizer.
        samples: expert's name -> text files of its domain; all or none.
        options: how the router comes to be.
        report: a picture of the separability, .html or .png.
        progress: show a progress bar.
        mixed_backbones: take LoRAs that were trained on different backbones too.

    Returns:
        What was made, and how well the router tells the domains apart.

    Raises:
        AdapterError: a LoRA, a sample, the backbone or the options cannot be used, with every
            problem found; or `out` is taken.
    """
    from tqdm import tqdm

    out, samples = Path(out).absolute(), samples or {}
    top_k = _check_arguments(loras, out, samples, options, report)
    names, notes = tuple(loras), []
    base_name, found_base, backbone = _backbone(loras, base, notes)
    fitted = options.router == "fit" and len(names) > 1
    if samples or options.context:
        require_safetensors(str(found_base), "compose-experts")
    with tqdm(total=3 + len(PENALTIES) + 1, desc="read text", disable=not progress) as bar:
        if samples:
            by_name = read_samples(
                {name: [Path(p) for p in samples[name]] for name in names}, found_base,
                backbone.vocab_size, options.held_out,
            )  # fmt: skip
            texts = [by_name[name] for name in names]
        bar.set_description("read LoRAs")
        paths = {name: Path(path) for name, path in loras.items()}
        bank = stack_experts(read_experts(paths, backbone, notes, mixed_backbones))
        if bank.folded:
            notes.append(
                f"{len(bank.folded)} linears have scales of their own in a LoRA: the ratio is "
                "multiplied into B, in float32"
            )
        bar.update()
        router, separability, telling = uniform_router(len(names), backbone.hidden_size), None, []
        trained = None
        if options.context:
            form = Form(
                top_k, options.router_input, context_scale=options.context.scale,
                context_half_life=options.context.half_life,
            )  # fmt: skip
            path, kept = options.context.router_from, {}
            if path is not None:
                kept = rows_from(path, names, form, backbone)
            trained = train_router(
                found_base, bank, names, form, kept, options.context, progress
            )
        if samples:
            bar.set_description("fit router")
            features = Features(found_base, backbone, options.router_input)
            bar.update()
            if fitted:
                router = fit_router(texts, features, bar.update)
            separability = measure(names, texts, router, features, top_k)
            telling = _texts(separability.telling, found_base)
        bar.set_description("write and check")
        raw = {
            "peft_type": "ADAFUSE",
            "format_version": 1,
            "base_model_name_or_path": base_name,
            "num_experts": len(names),
            "top_k": top_k,
            "r": bank.ranks,
            "lora_alpha": bank.alphas,
            "use_rslora": bank.use_rslora,
            "target_modules": sorted({n.split(".")[-2] for n in bank.tensors}),
            "router.input": options.router_input,
            "expert_names": list(names),
            "x_composed_from": {
                "loras": {name: os.path.basename(os.path.abspath(p)) for name, p in loras.items()},
                "router": "context" if trained else "fit" if fitted else "uniform",
                "penalty": router.penalty,
                "separability": separability.to_json() if separability else None,
                "held_out": trained.to_json() if trained else None,
                "notes": notes,
            },
        }
        raw |= {BASE_HASH: base_hash} if (base_hash := known_hash(str(found_base))) else {}
        tensors = bank.tensors | {"router.weight": router.weight, "router.bias": router.bias}
        if trained:
            raw |= {"format_version": 2} | context_json(
                "mean", options.context.scale, options.context.half_life
            )
            tensors = bank.tensors | trained.tensors
        write_mixture(out, raw, tensors, backbone)
        if report is not None:
            write_report(Path(report), separability, telling)
        bar.update(bar.total - bar.n)
    return Composed(out, separability, telling, trained, notes)


def _check_arguments(loras, out: Path, samples, options: RouterOptions, report) -> int:
    """All that can be wrong with the arguments; returns k."""
    problems, top_k = [], 1
    if not loras:
        problems.append("no LoRA was given; name at least one as NAME=DIRECTORY")
    if len(loras) > MAX_EXPERTS:
        problems.append(f"{len(loras)} LoRAs, expected {MAX_EXPERTS} at most, as many as a mixture has")
    if problem := output_problem(out):
        problems.append(f"output directory {out}: {problem}")
    for name in samples.keys() - loras.keys():
        problems.append(
            f"samples of {show(name)[1:-1]}: no such expert; there are {', '.join(loras)}"
        )
    missing = [name for name in loras if name not in samples and not options.context]
    if options.context and len(loras) == 1:
        problems.append("one LoRA needs no router; leave out --router-context")
    for name, _ in options.context.labelled if options.context else ():
        if name not in loras:
            problems.append(
                f"samples of {show(name)[1:-1]}: no such expert; there are {', '.join(loras)}"
            )
    if missing and (samples or (options.router == "fit" and len(loras) > 1)):
        problems.append(
            f"no samples of {', '.join(missing)}: the router is fitted to text of every domain; "
            "add --samples NAME=FILE for each, or take --router uniform"
        )
    if samples and options.router == "uniform":
        problems.append("samples say nothing to a uniform router; leave out one of the two")
    if report is not None:
        if not samples:
            problems.append("a report needs samples: there is nothing to measure without text")
        try:
            check_suffix(Path(report))
        except AdapterError as e:
            problems += e.problems
    try:
        top_k = options.k_of(len(loras)) if loras else 1
    except ValueError as e:
        problems.append(str(e))
    if problems:
        raise AdapterError("mixture of LoRAs", problems)
    return top_k


def _backbone(loras, base, notes: list[str]) -> tuple[str, Path, Backbone]:
    """Name to write, directory, shapes."""
    if base is not None:
        found = require_backbone(str(base), option="--base")
        return written_name(str(base), found), found, Backbone.from_path(str(found))
    first = Path(next(iter(loras.values())))
    config = read_json(first / CONFIG_FILE)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise AdapterError(
            f"LoRA {first}",
            [
                f"{CONFIG_FILE}: `base_model_name_or_path` is {show(name)}, expected the "
                "backbone; name it with --base"
            ],
        )
    revision = revision if isinstance(revision, str) else None
    found = require_backbone(name, first, revision, option="--base")
    written = written_name(name, found)
    notes += revision_notes(config, written, found)
    return written, found, Backbone.from_path(str(found))


def _texts(telling: list[list[int]], base: Path) -> list[list[str]]:
    tokenizer = load_tokenizer(base)
    return [[visible(tokenizer.decode([token])) for token in ids] for ids in telling]


def write_mixture(
    out: Path, raw: dict[str, Any], tensors: dict[str, torch.Tensor], backbone: Backbone | None
) -> None:
    """Writes an adapter, and leaves none that a check would refuse.

    Args:
        out: its directory.
        raw: its config.
        tensors: by name.
        backbone: to check against, where it is known.

    Raises:
        AdapterError: with every problem found.
    """
    from vllm_adafuse.format.adapter import load_adapter
    from vllm_adafuse.format.random_adapter import write_adapter

    config, problems = parse_config(raw)
    if problems:
        raise AdapterError("mixture of LoRAs", problems)
    extra = {key: value for key, value in raw.items() if key.startswith("x_")}
    try:
        write_adapter(out, config, tensors, extra)
        load_adapter(out, backbone)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
