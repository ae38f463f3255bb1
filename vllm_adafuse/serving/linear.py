"""The linear method that adds the experts' deltas to a projection's own output."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase

from vllm_adafuse.serving.bank import ExpertBank


class AdaFuseLinearMethod(LinearMethodBase):
    """Wraps a projection's linear method, whatever it is (unquantised, fp8, AWQ, …).

    y = inner.apply(x) + Σ_j weight_j B_{e_j} (A_{e_j} x). It stands inside the layer, before any
    all-reduce or gather, so the deltas of a sharded projection need no collective of their own.
    """

    def __init__(self, inner: LinearMethodBase):
        self.inner = inner
        # Class attributes of the base hide `__getattr__`, and vLLM reads these of the method.
        for name in (
            "uses_meta_device",
            "supports_pre_processed_weights",
            "requires_device_loading",
        ):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

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
        return layer.adafuse_bank(x, self.inner.apply(layer, x, bias))


def wrap_linear(layer: LinearBase, bank: ExpertBank) -> None:
    """Gives a projection its expert bank."""
    layer.adafuse_bank = bank
    layer.quant_method = AdaFuseLinearMethod(layer.quant_method)
    # Newer vLLM may hand an fp8 projection an input that is quantised already.
    layer.requires_unquantized_input = True
