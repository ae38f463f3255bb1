"""Functions of ours that vLLM's modules call: when all is loaded, before a layer, in
the place of the KV cache's update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.sequence import IntermediateTensors
from vllm_adafuse.serving import vllm_api
from vllm_adafuse.serving.kv_cache import LayerCache, can_write
from vllm_adafuse.serving.routes import Router


class AfterLoading(QuantizeMethodBase):
    """Runs a function when vLLM has loaded the backbone's weights, by whatever loader.

    Every loader, the dummy one too, ends by calling `process_weights_after_loading` of each
    module's `quant_method`, in module order: the module that holds this comes last.
    """

    supports_pre_processed_weights = True
    requires_device_loading = False

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def create_weights(self, layer: torch.nn.Module, *args, **kwargs) -> None:
        raise NotImplementedError("AfterLoading holds no weights")

    def apply(self, layer: torch.nn.Module, *args, **kwargs) -> torch.Tensor:
        raise NotImplementedError("AfterLoading computes nothing")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.function()


def after_loading(function: Callable[[], None]) -> torch.nn.Module:
    """A module that has a function run when all modules before it are loaded."""
    module = torch.nn.Module()
    module.quant_method = AfterLoading(function)
    return module


def also_after_reloading(model: torch.nn.Module, function: Callable[[], None]) -> None:
    """Has a function run, behind the model's own, when weights were loaded anew, as
    patches/reload.py tells."""
    own = getattr(model, "reload_adapter", None)  # of a mixture that is everybody's default
    model.reload_adapter = lambda: (own and own(), function())


def route_at(layer: torch.nn.Module, router: Router) -> None:
    """Routes every step as it enters a decoder layer.

    Raises:
        RuntimeError: the layer does not take what those of the tested versions of vLLM do.
    """
    vllm_api.check_layer(layer)
    layer.adafuse_router = router
    layer.register_forward_pre_hook(_route_at)


def _route_at(layer: torch.nn.Module, args: tuple) -> None:
    # Read from the layer, not from a closure: vLLM's compiled artefacts keep no closures.
    _, hidden, residual = args[: len(vllm_api.LAYER_TAKES)]
    layer.adafuse_router.enter(hidden, residual)


def pass_routes_on(model: torch.nn.Module, names: tuple[str, str], columns: int) -> None:
    """Has a pipeline stage expect routes, [T, columns] ids and weights under these names, beside the
    hidden states that it is sent."""
    stock_factory = model.make_empty_intermediate_tensors

    def make_empty_intermediate_tensors(
        batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        tensors = stock_factory(batch_size, dtype, device)
        for name, kind in zip(names, (torch.int32, torch.float32)):
            tensors[name] = torch.zeros(batch_size, columns, dtype=kind, device=device)
        return tensors

    model.make_empty_intermediate_tensors = make_empty_intermediate_tensors


def take_routes(
    intermediate_tensors: IntermediateTensors, names: tuple[str, str]
) -> tuple[tuple[torch.Tensor, torch.Tensor], IntermediateTensors]:
    """The routes that another stage has sent under these names, and what else it sent."""
    tensors = dict(intermediate_tensors.tensors)
    ids, weights = (tensors.pop(name) for name in names)
    return (ids, weights), IntermediateTensors(tensors)


def take_cache(attention: torch.nn.Module | None) -> LayerCache | None:
    """Lets the projection of q, k and v write its keys and values for this layer where it can.

    They come from the projection as the layer wants them.
    """
    if not can_write(attention):
        return None
    cache = LayerCache(attention)
    attention.impl.do_kv_cache_update = cache.update
    return cache
