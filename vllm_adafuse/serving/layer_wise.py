"""Layer-wise routing in a served model: which projections get which bank, and how they are wrapped.

The decisions fall inside the layers, from their own inputs. Nothing travels between pipeline
stages, and there are no passports.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import Adapter
from vllm_adafuse.format.config import BLOCKS
from vllm_adafuse.kernels.ffn_down import ffn_down
from vllm_adafuse.kernels.ffn_mix import ffn_mix
from vllm_adafuse.kernels.low_product import low_product
from vllm_adafuse.serving import linear
from vllm_adafuse.serving.bank import place_banks
from vllm_adafuse.serving.layer_bank import Gates, LayerBank, Place, is_cut

logger = init_logger("vllm.adafuse")

# The projection of each block that reads what the block reads.
_FIRST = {"self_attn": "qkv_proj", "mlp": "gate_up_proj"}


class FfnUpMethod(linear.AdaFuseLinearMethod):
    """gate_up of an MLP that is mixed at its output: W x, and beside it s of the chosen experts."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        bank: LayerBank = layer.adafuse_bank
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

    def forward(self, both: torch.Tensor) -> torch.Tensor:
        bank = self.bank
        x = ffn_mix(
            both, bank.shared_gates.gates, bank.lora_b, bank.slices.parts,
            bank.slices.widths[0], self.slots, self.activation,
        )  # fmt: skip
        return x if self.slots else x[0]


class FfnDownMethod(linear.AdaFuseLinearMethod):
    """The down projection behind a `FfnActivation`: of the mixture, and deltas of each expert's
    own activation."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        bank: LayerBank = layer.adafuse_bank
        y = self.inner.apply(layer, x[0], bias)
        low = low_product(x.flatten(0, 1), bank.rows)
        ffn_down(
            y, low, bank.shared_gates.gates, bank.scales, bank.shared_gates.active,
            bank.lora_b, bank.always, bank.gate.shared,
        )  # fmt: skip
        return y


def places(model: torch.nn.Module, adapter: Adapter, packed: dict) -> Iterator[Place]:
    """This pipeline stage's projections that have experts, parts always on, or a block's router.

    Args:
        model: the decoder, `.model` of a vLLM class.
        adapter: the adapter.
        packed: vLLM's `packed_modules_mapping`.
    """
    config, adapted = adapter.config, {*adapter.projections, *adapter.always_on}
    for index in range(model.start_layer, model.end_layer):
        for block in BLOCKS:
            module = getattr(model.layers[index], block)
            routed = f"model.layers.{index}.{block}" in adapter.routers
            whole = config.mix == "ffn_output" and block == "mlp" and routed
            for leaf, layer in module.named_modules():
                if not isinstance(layer, LinearBase):
                    continue
                names = packed.get(leaf, [leaf])
                linears = tuple(f"model.layers.{index}.{block}.{name}" for name in names)
                first = leaf == _FIRST[block]
                if adapted.intersection(linears) or (routed and first):
                    yield Place(layer, linears, index, block, first, whole)


def wrap_layers(
    model: torch.nn.Module,
    adapter: Adapter,
    packed: dict,
    rows: int,
    dtype: torch.dtype,
    alone: bool,
) -> list[LayerBank]:
    """Gives the projections of a decoder their banks and methods.

    Args:
        model: the decoder, `.model` of a vLLM class.
        adapter: a layer-wise adapter.
        packed: vLLM's `packed_modules_mapping`.
        rows: the most tokens of a step.
        dtype: of the model.
        alone: nothing else, such as vLLM's own LoRA, adds to the projections' outputs.

    Raises:
        AdapterError: an MLP is to be mixed at its output, but has an activation of another kind,
            or vLLM's own LoRA would add to what stands between its projections.
    """
    found: dict[tuple[int, int], Gates] = {}

    def gates_of(routers: int, experts: int) -> Gates:
        if (routers, experts) not in found:
            found[routers, experts] = Gates(rows, routers, experts)
        return found[routers, experts]

    here = list(places(model, adapter, packed))
    if not alone and any(place.whole_ffn for place in here):
        raise AdapterError(
            "vLLM's options",
            [
                "--enable-lora adds LoRA to the output of gate_up_proj, but the adapter's `mix` is "
                f"ffn_output ({adapter.path}), which has no one output there; leave the option out"
            ],
        )
    fused = [alone and _can_fuse(place, adapter) for place in here]
    linear.release_weights(place.layer for place, fuse in zip(here, fused) if fuse)
    banks = [
        LayerBank(place, adapter, dtype, gates_of, fuse) for place, fuse in zip(here, fused)
    ]
    place_banks(banks, dtype)
    for place, bank, fuse in zip(here, banks, fused):
        layer, block = place.layer, getattr(model.layers[place.index], place.block)
        layer.adafuse_bank = bank
        if fuse:
            bank.join(layer.weight)
            bank.epilogue = linear.take_activation(layer, block)
            layer.quant_method = linear.FusedLinearMethod(layer.quant_method, bank.epilogue)
        elif place.whole_ffn and place.decides:
            slots = bank.top_k if f"{place.block_name}.down_proj" in adapter.projections else 0
            if not (activation := linear.activation_of(block)):
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
            layer.quant_method = linear.AdaFuseLinearMethod(layer.quant_method)
        # Newer vLLM may hand an fp8 projection an input that is quantised already.
        layer.requires_unquantized_input = True
    return banks


def _can_fuse(place: Place, adapter: Adapter) -> bool:
    """Whether a projection and its deltas are one product: no sum of logits over ranks and no
    mixture of whole MLPs stands between them."""
    adapted = {*adapter.projections, *adapter.always_on}.intersection(place.linears)
    sums = adapter.config.router_scope == "linear" and is_cut(place.layer)
    return bool(adapted) and linear.can_fuse(place.layer) and not place.whole_ffn and not sums


def log_loaded(adapter: Adapter, banks: list[LayerBank]) -> None:
    """Tells what a worker holds."""
    config = adapter.config
    logger.info(
        "AdaFuse: layer-wise routing per %s, up to %d experts, top-%d, mixed in %s; modules %s in "
        "%d projections; expert banks %d bytes on this device",
        config.router_scope,
        config.num_experts,
        config.top_k,
        "the MLP's output" if config.mix == "ffn_output" else "every linear",
        ",".join(config.target_modules),
        len(banks),
        sum(bank.nbytes for bank in banks),
    )
