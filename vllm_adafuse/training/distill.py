"""Distilling a layer-wise mixture into a pre-gated one: the experts stay, one router learns.

The teacher's next-token distributions are the target: the loss is KL(teacher || student), mean
over tokens. Nothing but texts is needed, no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import kl_div, log_softmax
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.text import show
from vllm_adafuse.training.align import (
    by_token,
    fit_router,
    router_gates,
    router_inputs,
    student_of,
)
from vllm_adafuse.training.health import WAY_OUT, NotFinite
from vllm_adafuse.training.model import AdaFuseModel

SAMPLE_TOKENS = 1 << 16  # on which experts are aligned and the router is started


@dataclass(frozen=True)
class DistillOptions:
    """How to distil; checked at construction.

    Attributes:
        steps: optimizer steps on the KL.
        lr: peak learning rate of the router.
        expert_lr: of the experts; 0 keeps them as they are.
        warmup: share of the steps with a rising rate; then it falls to 0 by a cosine.
        length, batch_size: of training on files: tokens of a block, and blocks per step.
        held_out: share of files' lines to judge by, above 0: without it no loss can be stated.
    """

    steps: int = 500
    lr: float = 2e-3
    expert_lr: float = 0.0
    warmup: float = 0.05
    length: int = 512
    batch_size: int = 8
    held_out: float = 0.05

    def __post_init__(self):
        problems = [
            f"`{name}` is {show(getattr(self, name))}, expected {low}"
            for name, low, good in (
                ("steps", "0 or more", self.steps >= 0),
                ("lr", "a number above 0", self.lr > 0),
                ("expert_lr", "0 or a positive number", self.expert_lr >= 0),
                ("warmup", "a share from 0 to below 1", 0 <= self.warmup < 1),
                ("held_out", "above 0 and below 1: without it no loss can be stated",
                 0 < self.held_out < 1),
            )
            if not good
        ]
        if problems:
            raise AdapterError("distilling options", problems)


def kl_of(teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of logits [..., V] in nats, mean over positions."""
    teacher = log_softmax(teacher_logits.float().flatten(0, -2), -1)
    student = log_softmax(student_logits.float().flatten(0, -2), -1)
    return kl_div(student, teacher, log_target=True, reduction="batchmean")


@torch.no_grad()
def mean_kl(teacher: Any, model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """KL(teacher || model) on held-out text, in nats per token that has loss.

    Args:
        teacher, model: called as Hugging Face causal LMs.
        batches: input_ids [batch, length] and, where not every token counts, labels
            (-100: it does not).
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        counts = batch.get("labels", ids).to(model.device)[:, 1:] != -100
        wanted, found = (m(input_ids=ids).logits[:, :-1][counts] for m in (teacher, model))
        if len(wanted):  # the mean of nothing is NaN
            total += kl_of(wanted, found).item() * len(wanted)
        count += len(wanted)
    model.train(was_training)
    return total / max(1, count)


@torch.no_grad()
def make_student(
    path: str, teacher: Any, backbone: Any, batches: Sequence[torch.Tensor], **changes: Any
) -> AdaFuseModel:
    """The student before distilling: experts renumbered, its router started by imitation.

    Args:
        path: the teacher's adapter directory.
        teacher: the model of it, in eval mode.
        backbone: a model of its own for the student.
        batches: of input_ids [batch, length], as many as SAMPLE_TOKENS need are looked at.
        **changes: options of `MixtureConfig` for the student (top_k, router_layer, …).
    """
    seen: list[dict[str, torch.Tensor]] = []
    kept: list[torch.Tensor] = []
    count = 0
    for ids in batches:
        teacher(input_ids=ids.to(teacher.device))
        seen.append({name: g.cpu() for name, g in router_gates(teacher).items()})
        kept.append(ids)
        count += ids.numel()
        if count >= SAMPLE_TOKENS:
            break
    gates = {name: torch.cat([g[name] for g in seen]) for name in seen[0]}
    if not changes.get("router_layer", 0):
        gates = by_token(gates, torch.cat([ids.flatten().cpu() for ids in kept]))
    student, target = student_of(path, backbone, gates, **changes)
    inputs = router_inputs(student, kept)
    with torch.enable_grad():
        fit_router(student, inputs, target)
    return student


def distill(
    teacher: Any,
    student: AdaFuseModel,
    batches: Iterable[torch.Tensor],
    options: DistillOptions | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Trains the student's router, and its experts if asked, on the teacher's distributions.

    Args:
        teacher: in eval mode.
        student: see `make_student`.
        batches: of input_ids, int64 [batch, length]; taken again from the start when they end.
        options: default `DistillOptions()`.
        on_step: called after each step with its number and KL.

    Returns:
        The KL of every step.

    Raises:
        NotFinite: a step's KL or gradients are NaN or infinite; it is not taken.
        AdapterError: there are no texts.
    """
    options = options or DistillOptions()
    params = student.parameter_groups(options.expert_lr, options.lr)
    routers = {id(p) for p in params[-1]["params"]}
    for parameter in student.trainable():
        if not options.expert_lr and id(parameter) not in routers:
            parameter.requires_grad_(False)
    params = [g | {"params": [p for p in g["params"] if p.requires_grad]} for g in params]
    optimizer = torch.optim.AdamW([g for g in params if g["params"]], weight_decay=0.0)

    def rate(step: int) -> float:
        warm = options.warmup * options.steps
        if step < warm:
            return (step + 1) / (warm + 1)
        done = (step - warm) / max(1.0, options.steps - warm)
        return 0.5 * (1 + torch.cos(torch.tensor(done * torch.pi)).item())

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    student.train()
    history: list[float] = []
    while len(history) < options.steps:
        before = len(history)
        for ids in batches:
            if len(history) == options.steps:
                break
            ids = ids.to(student.device)
            student.set_progress(len(history) / options.steps)
            with torch.no_grad():
                wanted = teacher(input_ids=ids).logits
            loss = kl_of(wanted, student(input_ids=ids).logits)
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(student.trainable(), 1.0)
            if not (loss + norm).isfinite().item():
                raise NotFinite(
                    f"the batch of step {len(history) + 1}",
                    [f"its KL from the teacher is {loss.item():.4g}, its gradients' norm "
                     f"{norm.item():.4g}; {WAY_OUT}"],
                    [ids],
                )  # fmt: skip
            optimizer.step()
            schedule.step()
            history.append(loss.item())
            if on_step:
                on_step(len(history), history[-1])
        if len(history) == before:
            raise AdapterError("distilling data", ["there are no texts"])
    student.requires_grad_(True)
    student.backbone.requires_grad_(False)
    return history
