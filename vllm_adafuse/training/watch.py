"""What a mixture does while `transformers.Trainer` trains it, in Trainer's own logs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm_adafuse.format.files import open_weights
from vllm_adafuse.training.health import check_gradients, check_weights

if TYPE_CHECKING:
    from transformers import Trainer
    from vllm_adafuse.training.model import AdaFuseModel


def expert_shares(model: AdaFuseModel) -> dict[str, float]:
    """Each expert's share of the routed slots since the last log, and the losses of its routers.

    Returns:
        "usage/<expert>" -> share, 1 / E each in perfect balance (the mean over routers, where
        there are several); "balance_loss" and "router_z_loss" of the last step.
    """
    if model.usage is None:
        return {}
    shares = (model.usage / model.usage_steps).mean(0).tolist()
    names = model.mixture.expert_names or [f"expert_{e}" for e in range(len(shares))]
    shown = {f"usage/{name}": round(share, 4) for name, share in zip(names, shares)}
    if model.last_losses:
        shown["balance_loss"] = round(model.last_losses["balance"].item(), 4)
        shown["router_z_loss"] = round(model.last_losses["z"].item(), 4)
    temperature = model.all_routers[0].temperature
    if model.mixture.temperature_start is not None:
        shown["temperature"] = round(temperature, 4)
    return shown


def make_callback(model: AdaFuseModel) -> Any:
    """A TrainerCallback that moves the temperature, adds `expert_shares` to every log and lets
    others read checkpoints."""
    from transformers import TrainerCallback

    class ExpertWatch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            model.step = state.global_step + 1
            model.set_progress(state.global_step / max(1, state.max_steps))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs is None or "loss" not in logs:  # evaluation, or the summary at the end
                return
            shares = expert_shares(model)
            logs.update(shares)
            state.log_history[-1].update(shares)
            model.reset_usage()

        def on_save(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                made = Path(args.output_dir, f"checkpoint-{state.global_step}")
                open_weights(made, "trainer_state.json")

    return ExpertWatch()


def make_guard(model: AdaFuseModel) -> Any:
    """A TrainerCallback that takes no step and saves no checkpoint that is not finite.

    It must come after the callback of Trainer that decides whether a step is saved.
    """
    from transformers import TrainerCallback

    class Guard(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if not args.fp16:  # its scaler skips steps that overflow
                check_gradients(model)

        def on_step_end(self, args, state, control, **kwargs):
            if control.should_save:
                check_weights(model)

        on_epoch_end = on_step_end

    return Guard()


def watch(trainer: Trainer, model: AdaFuseModel | None = None) -> Trainer:
    """Adds expert usage, router losses and temperature annealing to a Trainer.

    It also stops the run before a step or a checkpoint that is not finite (`NotFinite`).

    The callback that logs goes before all others, so that TensorBoard and every other reporter log
    what it adds.

    Args:
        trainer: a stock Trainer.
        model: its model, if that is wrapped.

    Returns:
        The trainer: `watch(Trainer(...)).train()`.
    """
    model = model or trainer.model
    trainer.callback_handler.callbacks.insert(0, make_callback(model))
    trainer.callback_handler.callbacks.append(make_guard(model))
    return trainer


@torch.no_grad()
def count_experts(model: AdaFuseModel, batches) -> torch.Tensor:
    """Expert usage on texts, in eval mode.

    Args:
        model: the mixture.
        batches: of input_ids, int64 [batch, length].

    Returns:
        float64 [R, E] on the CPU: each expert's share of the slots that every router filled.
    """
    was_training = model.training
    model.eval()
    counts = None
    for ids in batches:
        model(input_ids=ids.to(model.device))
        experts = model.mixture.num_experts
        chosen = torch.cat([r.chosen.flatten(0, -3) for r in model.all_routers], 1)  # [T, R, k]
        here = torch.stack([torch.bincount(c.flatten(), minlength=experts)
                            for c in chosen.unbind(1)])  # fmt: skip
        counts = here if counts is None else counts + here
    model.train(was_training)
    return (counts / counts.sum(-1, keepdim=True)).double().cpu()
