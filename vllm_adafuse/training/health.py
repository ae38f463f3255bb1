"""Stops a training at the first loss, gradient or weight that is NaN or infinite.

One such step makes every weight NaN, and the checkpoints after it push the good ones out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from vllm_adafuse.errors import AdapterError

if TYPE_CHECKING:
    from vllm_adafuse.training.model import AdaFuseModel

WAY_OUT = (
    "look at these texts; if nothing is wrong with them, lower the learning rate, and try the "
    "backbone in float32"
)


class NotFinite(AdapterError):
    """A step that must not be taken.

    Attributes:
        batches: input_ids, int64 [batch, length] each, of what this process computed last.
    """

    def __init__(self, subject: str, problems: list[str], batches: Sequence[torch.Tensor] = ()):
        super().__init__(subject, problems)
        self.batches = list(batches)

    def __reduce__(self):
        return type(self), (self.subject, self.problems)


def check_loss(model: AdaFuseModel, loss: torch.Tensor) -> None:
    """Refuses a loss that is NaN or infinite, in every process if it is so in one.

    Args:
        model: after a forward in training mode.
        loss: float scalar of this process.

    Raises:
        NotFinite: it is.
    """
    bad = ~loss.detach().isfinite()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        anywhere = bad.float()
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
    else:
        anywhere = bad
    if not anywhere.item():
        return
    if bad.item():
        said = f"its loss is {loss.item()}"
    else:
        said = "the loss of another process's part of it is not finite"
    raise NotFinite(f"the batch of {_moment(model)}", [f"{said}; {WAY_OUT}"], model.recent)


def check_gradients(model: AdaFuseModel) -> None:
    """Refuses gradients that are not finite; to be called before the optimizer's step.

    Raises:
        NotFinite: one is not.
    """
    gradients = [p.grad for p in model.trainable() if p.grad is not None]
    if gradients and not torch.nn.utils.get_total_norm(gradients).isfinite().item():
        raise NotFinite(
            f"the batch of {_moment(model)}",
            [f"its loss is finite and its gradients are not; {WAY_OUT}"],
            model.recent,
        )


def check_weights(model: AdaFuseModel) -> None:
    """Refuses weights that are not finite; to be called before they are saved.

    Raises:
        NotFinite: one is not.
    """
    weights = model.trainable()
    if not torch.nn.utils.get_total_norm(weights, float("inf")).isfinite().item():
        raise NotFinite(
            f"the weights after {_moment(model)}",
            ["not all are finite; they are not saved. Lower the learning rate"],
            model.recent,
        )


def _moment(model: AdaFuseModel) -> str:
    if model.step is None:
        return f"forward pass {model.forwards} in training mode"
    return f"step {model.step}"
