"""The linear methods and activations of projections that are routed inside their layers."""

from __future__ import annotations

import torch
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import Adapter
from vllm_adafuse.kernels.layerwise.ffn_down import ffn_down
from vllm_adafuse.kernels.layerwise.ffn_mix import ffn_mix
from vllm_adafuse.kernels.layerwise.low_product import low_product
from vllm_adafuse.serving.layer_bank import LayerBank
from vllm_adafuse.serving.projections import Place, activation_of
from vllm_adafuse.serving.wrap import bank_of
from vllm_adafuse.serving.wrap.blocks import take_activation
from vllm_adafuse.serving.wrap.linears import (
    AdaFuseLinearMethod,
    FusedLinearMethod,
    join,
    take_plain_input,
)


class FfnUpMethod(AdaFuseLinearMethod):
    """gate_up of an MLP that is mixed at its output: W x, and beside it s of the chosen experts."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        bank: LayerBank = bank_of(layer)
        y = self.inner.apply(layer, x, bias)
        if not bank.slices.names:  # it only decides for the down projection
            return bank.add(x, y)
        return torch.cat([y, bank.route(x).flatten(1)], -1)


class FfnActivation(torch.nn.Module):
    """Stands where the MLP's activation stood: see `ffn_mix`.

    Args:
        bank: of gate_up.
        activation: its name.
        slots: activations of their own that the down projection's experts read; 0 for none.
    """

    def __init__(self, bank: LayerBank, activation: str, slots: int):
        super().__init__()
        self.bank, self.activation, self.slots = bank, activation, slots

    def forward(self, gemm_out: torch.Tensor) -> torch.Tensor:
        bank = self.bank
        x = ffn_mix(
            gemm_out, bank.shared_gates.gates, bank.lora_b, bank.slices.adapted,
            bank.slices.widths[0], self.slots, self.activation,
        )  # fmt: skip
        return x if self.slots else x[0]


class FfnDownMethod(AdaFuseLinearMethod):
    """The down projection behind a `FfnActivation`: of the mixture, and deltas of each expert's
    own activation."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        bank: LayerBank = bank_of(layer)
        y = self.inner.apply(layer, x[0], bias)
        lora_a_out = low_product(x.flatten(0, 1), bank.rows)
        ffn_down(
            y, lora_a_out, bank.shared_gates.gates, bank.scales, bank.shared_gates.active,
            bank.lora_b, bank.always, bank.gate.shared,
        )  # fmt: skip
        return y


def wrap_layer(place: Place, bank: LayerBank, fuse: bool, adapter: Adapter) -> None:
    """Gives a projection its bank and method.

    Args:
        place: which projection.
        bank: its experts and routers.
        fuse: it is computed together with them.
        adapter: it is of.

    Raises:
        AdapterError: its MLP is to be mixed at its output, but has an activation of another kind.
    """
    layer, block = place.layer, place.owner
    layer.adafuse_bank = bank
    if fuse:
        join(layer, bank)
        bank.epilogue = take_activation(layer, block)
        layer.quant_method = FusedLinearMethod(layer.quant_method, bank.epilogue)
    elif place.whole_ffn and place.decides:
        slots = bank.top_k if f"{place.block_name}.down_proj" in adapter.projections else 0
        if not (activation := activation_of(block)):
            raise AdapterError(
                f"adapter {adapter.path}",
                [
                    f"`mix` is ffn_output, but the activation of {place.block_name} is "
                    f"{type(block.act_fn).__name__}, expected SiLU or tanh-GELU of gate and up"
                ],
            )
        block.act_fn = FfnActivation(bank, activation, slots)
        layer.quant_method = FfnUpMethod(layer.quant_method)
    elif place.whole_ffn and any(bank.with_experts):
        layer.quant_method = FfnDownMethod(layer.quant_method)
    else:
        layer.quant_method = AdaFuseLinearMethod(layer.quant_method)
    take_plain_input(layer)
