"""What stands in a block for a norm, a rotary embedding or an activation that its projections
compute: FusedNorm ends the projection before it, so that one op has deltas, residual and norm."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm_adafuse.kernels.operands import Norm
from vllm_adafuse.serving import vllm_api
from vllm_adafuse.serving.bank import ExpertBank
from vllm_adafuse.serving.projections import NormPlace, activation_of, can_turn
from vllm_adafuse.serving.routes import SharedRotary


class FusedNorm(torch.nn.Module):
    """Takes the place of a decoder's RMSNorm that adds a residual.

    Args:
        norm: whose weight it keeps, under the same name.
        bank: of the projection before it, which hands its input on.
    """

    def __init__(self, norm: RMSNorm, bank: ExpertBank):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self.bank = bank
        bank.norm_of = self.as_norm

    def as_norm(self) -> Norm:
        """As kernels take it."""
        return Norm(self.weight, self.variance_epsilon)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed hidden states and the new residual [T, H].

        x: [T, in], what the projection got; residual: [T, H].
        """
        return self.bank.linear_norm(x, residual)


def put_norm(place: NormPlace, bank: ExpertBank) -> None:
    """Puts a `FusedNorm` in the place of a norm, under the same name."""
    norm = place.norm
    fused = FusedNorm(norm, bank)
    setattr(place.owner, place.name, fused)
    vllm_api.load_in_place_of(fused, norm)


class Turned(torch.nn.Module):
    """Stands where an attention block had its rotary embedding: queries and keys come turned."""

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return query, key


def take_rotary(layer: LinearBase, block: torch.nn.Module, rotary: SharedRotary) -> bool:
    """Takes the rotary embedding out of an attention block, if this projection can do it."""
    if not can_turn(layer, block) or not rotary.adopt(block.rotary_emb):
        return False
    block.rotary_emb = Turned()
    return True


def take_activation(layer: LinearBase, block: torch.nn.Module) -> str:
    """Takes the activation of an MLP out of it, where the kernels know it; "" otherwise."""
    name = activation_of(block)
    if getattr(block, "gate_up_proj", None) is not layer or not name:
        return ""
    block.act_fn = torch.nn.Identity()
    return name
