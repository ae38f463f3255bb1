"""The linear methods that add the experts' deltas to a projection's own output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.platforms import current_platform
from vllm_adafuse.kernels.device.epilogues import is_gate_up
from vllm_adafuse.serving import vllm_api
from vllm_adafuse.serving.bank import ExpertBank
from vllm_adafuse.serving.layer_bank import LayerBank
from vllm_adafuse.serving.page_bank import PageBank
from vllm_adafuse.serving.projections import NormPlace
from vllm_adafuse.serving.routes import SharedRotary
from vllm_adafuse.serving.wrap import bank_of
from vllm_adafuse.serving.wrap.blocks import put_norm, take_activation, take_rotary
from vllm_adafuse.serving.wrap.hooks import take_cache


class AdaFuseLinearMethod(LinearMethodBase):
    """Wraps a projection's linear method, whatever it is (unquantised, fp8, AWQ, …).

    y = inner.apply(x) + Σ_j weight_j B_{e_j} (A_{e_j} x). It stands inside the layer, before any
    all-reduce or gather, so the deltas of a sharded projection need no collective of their own.
    """

    epilogue = ""  # what follows the projection and is done here too

    def __init__(self, inner: LinearMethodBase):
        self.inner = inner
        # Class attributes of the base hide `__getattr__`, and vLLM reads these of the method.
        for name, value in vllm_api.loading_traits(inner).items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not yet set, while unpickling
            raise AttributeError(name)
        return getattr(self.inner, name)

    def create_weights(self, layer: torch.nn.Module, *args, **kwargs) -> None:
        self.inner.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return layer.adafuse_bank.add(x, self.inner.apply(layer, x, bias))


class PagesOverMixture(AdaFuseLinearMethod):
    """Adds the deltas of requests' own adapters beside a mixture that is everybody's default: of
    each token one of the two has weights."""

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return layer.adafuse_pages.add(x, self.inner.apply(layer, x, bias))


class FusedLinearMethod(AdaFuseLinearMethod):
    """Computes an unquantised projection together with its deltas.

    Args:
        inner: vLLM's unquantised method, which still makes and loads the weight.
        epilogue: what follows the projection and is done here too, "" for nothing.
        before_norm: a `FusedNorm` follows, which computes the projection; it hands its input on.
    """

    def __init__(self, inner: UnquantizedLinearMethod, epilogue: str, before_norm: bool = False):
        super().__init__(inner)
        self.epilogue, self.before_norm = epilogue, before_norm

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.before_norm:
            return x
        return layer.adafuse_bank.linear(x, bias)


def release_weights(layers: Iterable[LinearBase]) -> None:
    """Gives back the memory of weights that are still to be loaded, before fused weights take it.

    All at once: one by one, the hole that a weight leaves is too small for its fused weight, and
    the allocator would keep a hole of every shape.
    """
    for layer in layers:
        layer.weight.data = layer.weight.data.new_empty(0)
    if current_platform.is_cuda_alike():
        torch.cuda.empty_cache()


def join(layer: LinearBase, bank: ExpertBank | LayerBank) -> None:
    """Makes a linear's weight [out, in], loaded or still to be, the first rows of its fused
    weight."""
    layer.weight.data = bank.weight


def take_plain_input(layer: LinearBase) -> None:
    """Has a linear be given its input as it is: vLLM may hand an fp8 one a quantised input."""
    layer.requires_unquantized_input = True


def keep_in_place(layer: LinearBase, block: torch.nn.Module) -> None:
    """Lets gate_up's activation stay in the memory of its product, where down_proj reads it by our
    op: others, such as those of quantised weights, may count on rows without gaps.

    When all projections of the block are wrapped.
    """
    method, reader = layer.quant_method, getattr(block, "down_proj", None)
    if isinstance(method, FusedLinearMethod) and is_gate_up(method.epilogue):
        by_us = isinstance(getattr(reader, "quant_method", None), FusedLinearMethod)
        layer.adafuse_bank.in_place = by_us


def wrap_linear(
    layer: LinearBase,
    block: torch.nn.Module,
    bank: ExpertBank,
    fuse: bool,
    behind: NormPlace | None,
    rotary: SharedRotary,
) -> None:
    """Gives a projection its expert bank.

    Args:
        layer: the projection.
        block: the module that it belongs to (attention or MLP).
        bank: its experts.
        fuse: the projection is computed together with them, see `can_fuse`; not if something
            else, such as vLLM's own LoRA, also adds to its output.
        behind: the norm that may end a fused projection.
        rotary: of the model.
    """
    layer.adafuse_bank = bank
    if fuse:
        turned = take_rotary(layer, block, rotary)
        epilogue = "rotary" if turned else take_activation(layer, block)
        join(layer, bank)
        bank.rotary, bank.epilogue = rotary, epilogue
        if turned:
            bank.cache = take_cache(getattr(block, "attn", None))
        if behind is not None:
            put_norm(behind, bank)
            bank.before_norm, bank.epilogue = True, "norm"
        layer.quant_method = FusedLinearMethod(layer.quant_method, epilogue, behind is not None)
    else:
        layer.quant_method = AdaFuseLinearMethod(layer.quant_method)
    take_plain_input(layer)


def wrap_pages(
    layer: LinearBase,
    block: torch.nn.Module,
    bank: PageBank,
    behind: NormPlace | None,
    rotary: SharedRotary,
) -> None:
    """Has a loaded linear add its pages' deltas, beside those of a default mixture if there is one;
    see `wrap_linear`. One of a fused bank gives up its own weight."""
    if bank_of(layer) is not None:
        layer.adafuse_pages = bank
        layer.quant_method = PagesOverMixture(layer.quant_method)
        return
    if bank.is_fused:
        bank.weight.copy_(layer.weight)
    wrap_linear(layer, block, bank, bank.is_fused, behind, rotary)
    if bank.is_fused and current_platform.is_cuda_alike():
        torch.cuda.empty_cache()  # or the holes that weights leave would stay, one for each
