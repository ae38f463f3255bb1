"""Tells our models when a running engine's weights have been written anew.

vLLM offers trainers several ways to do that: `reload_weights` from a checkpoint or an iterator,
sessions of a weight transfer engine, and tensors copied straight into parameters. The first two end
by `finalize_layerwise_reload` where weights come in a checkpoint's form; all of them are methods of
the worker. Both are wrapped: a model's `reload_adapter` runs after each. (`load_weights` called on
the model itself is seen by the model.)

Read against vLLM 0.26.0 and 0.32.0 (model_executor/model_loader/reload/layerwise.py,
v1/worker/gpu_worker.py, from which the workers of other platforms inherit).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from vllm_adafuse.patches.on_import import when_imported
from vllm_adafuse.serving import vllm_api

_SEAM = "vllm.v1.worker.gpu_worker"
_MARK = "_adafuse_wrapped"
_WORKER = ("reload_weights", "finish_weight_update")


def apply() -> None:
    """Wraps the end of vLLM's reloading as soon as a process imports its workers."""
    when_imported(_SEAM, wrap)


def wrap() -> None:
    """Wraps it now.

    Raises:
        RuntimeError: the seam has moved in this vLLM.
    """
    import vllm.model_executor.model_loader.reload.layerwise as layerwise
    from vllm.v1.worker.gpu_worker import Worker

    _wrap(layerwise, "finalize_layerwise_processing", _after_finalize)
    for name in _WORKER:
        _wrap(Worker, name, _after_worker)


def _wrap(owner: Any, name: str, after: Callable) -> None:
    original = getattr(owner, name, None)
    if original is None:
        raise vllm_api.moved(
            f"{owner.__name__} of this vLLM has no {name}, so weights loaded into a running engine "
            "would keep the routes of the old ones"
        )
    if not getattr(original, _MARK, False):
        wrapped = after(original)
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)


def _ours(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The models with routes of ours in what a runner holds, whatever it is wrapped in."""
    return (module for module in model.modules() if hasattr(module, "reload_adapter"))


def _after_finalize(original: Callable) -> Callable:
    @functools.wraps(original)
    def finalize(model: torch.nn.Module, *args, **kwargs):
        result = original(model, *args, **kwargs)
        for ours in _ours(model):
            ours.adafuse_stale = False
            ours.reload_adapter()
        return result

    return finalize


def _after_worker(original: Callable) -> Callable:
    @functools.wraps(original)
    def method(self, *args, **kwargs):
        served = list(_ours(self.get_model()))
        for ours in served:
            ours.adafuse_stale = True
        result = original(self, *args, **kwargs)
        for ours in served:
            if ours.adafuse_stale:  # tensors were copied in place: nothing was finalised
                ours.reload_adapter()
        return result

    return method
