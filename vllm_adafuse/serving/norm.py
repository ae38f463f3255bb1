"""RMSNorms that compute the projection before them: so one op has deltas, residual and norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm_adafuse.kernels.operands import Norm
from vllm_adafuse.serving.bank import ExpertBank


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


@dataclass(frozen=True)
class NormPlace:
    """Where a model keeps a norm."""

    owner: torch.nn.Module
    name: str

    @property
    def norm(self) -> torch.nn.Module:
        return getattr(self.owner, self.name)

    def put(self, bank: ExpertBank) -> None:
        setattr(self.owner, self.name, FusedNorm(self.norm, bank))


def norms_behind(
    model: torch.nn.Module, vllm_config: VllmConfig, residual_norms: bool
) -> dict[LinearBase, NormPlace]:
    """The projections of this pipeline stage whose output only the next norm reads, and that norm.

    Args:
        model: the decoder, `.model` of a vLLM class.
        vllm_config: of the engine.
        residual_norms: the family adds o_proj's and down_proj's outputs to the residual in the
            norm that follows them, and uses them for nothing else.
    """
    # Draft models read the states between layers.
    if not residual_norms or vllm_config.speculative_config is not None:
        return {}
    places, start, end = {}, model.start_layer, model.end_layer
    for index in range(start, end):
        layer = model.layers[index]
        places[layer.self_attn.o_proj] = NormPlace(layer, "post_attention_layernorm")
        if index + 1 < end:
            places[layer.mlp.down_proj] = NormPlace(model.layers[index + 1], "input_layernorm")
        elif get_pp_group().is_last_rank:
            places[layer.mlp.down_proj] = NormPlace(model, "norm")
    return {layer: place for layer, place in places.items() if _fits(layer, place.norm)}


def _fits(layer: LinearBase, norm: torch.nn.Module) -> bool:
    """Nothing stands between the product and the norm: no bias, no sum over other ranks."""
    plain = type(norm) is RMSNorm and norm.has_weight and norm.variance_size_override is None
    return plain and isinstance(layer, RowParallelLinear) and layer.tp_size == 1 and (
        getattr(layer, "bias", None) is None
    )
