"""The ops that stand in a model where it is compiled: `(x, gates, layer)`.

A projection's tensors do not change from step to step, so torch need not be handed them: an op
finds its bank by the layer's name in vLLM's forward context, as vLLM's own attention does, so that
models in one process do not meet. `gates` is handed over for its order alone: the op that writes it
writes all else that a step's projections read, and runs before them. `layer` is the name as vLLM
hands names to ops, see `named`; nothing else tells the layers of one kind apart, so that vLLM
compiles them once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm_adafuse.kernels import page_projection as of_pages
from vllm_adafuse.kernels import projection as of_experts
from vllm_adafuse.kernels import projection_norm as of_experts_norm
from vllm_adafuse.kernels.kv_slots import KVSlots
from vllm_adafuse.kernels.layerwise.linear import layer_linear
from vllm_adafuse.kernels.layerwise.route import route_layer
from vllm_adafuse.kernels.layerwise.sgmm import layer_sgmm
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.sgmm import sgmm
from vllm_adafuse.serving import vllm_api

if TYPE_CHECKING:
    from vllm_adafuse.serving.bank import ExpertBank
    from vllm_adafuse.serving.layer_bank import LayerBank

_NAME, NAME_TYPE = vllm_api.layer_name_class()

# The last bank of each name, for parts of a model that are run by hand, outside of a forward.
_latest: WeakValueDictionary[str, ExpertBank | LayerBank] = WeakValueDictionary()


def named(layer_name: str) -> Any:
    """A layer's name as ops take it."""
    return _NAME(layer_name)


def make_known(bank: ExpertBank | LayerBank, vllm_config: VllmConfig | None = None) -> None:
    """Lets ops find a bank by its `layer_name` in forwards of an engine.

    Raises:
        ValueError: the engine has another layer of this name.
    """
    _latest[bank.layer_name] = bank
    if vllm_config is not None:
        known = vllm_config.compilation_config.static_forward_context
        if known.get(bank.layer_name, bank) is not bank:
            raise ValueError(f"vllm-adafuse: two layers are called {bank.layer_name}")
        known[bank.layer_name] = bank


def find(layer: Any) -> Any:
    """The bank of a layer, `named`, in the forward that runs.

    Raises:
        RuntimeError: there is none.
    """
    layer_name = layer if isinstance(layer, str) else layer.value
    if is_forward_context_available():
        bank = get_forward_context().no_compile_layers.get(layer_name)
    else:
        bank = _latest.get(layer_name)
    if bank is None:
        raise RuntimeError(
            f"vllm-adafuse: no layer {layer_name} is known to this forward; run the model in the "
            "engine that loaded it"
        )
    return bank


def _projection(
    x: torch.Tensor, gates: torch.Tensor, layer: Any, width: int, stride: int
) -> torch.Tensor:
    bank = find(layer)
    return of_experts.projection(x, bank.projection, bank.step, _kv_slots(bank, x))


def _kv_slots(bank: ExpertBank, x: torch.Tensor) -> KVSlots | None:
    """In every forward: to claim resets what the last one wrote."""
    return bank.cache.claim(x.shape[0], x.dtype) if bank.cache else None


def _projection_fake(
    x: torch.Tensor, gates: torch.Tensor, layer: Any, width: int, stride: int
) -> torch.Tensor:
    return x.new_empty_strided((x.shape[0], width), (stride, 1))


def _projection_norm(
    x: torch.Tensor, residual: torch.Tensor, gates: torch.Tensor, layer: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    bank = find(layer)
    return of_experts_norm.projection_norm(x, residual, bank.projection, bank.step)


def _projection_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, gates: torch.Tensor, layer: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(residual), torch.empty_like(residual)


def _deltas(y: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, layer: Any) -> None:
    bank = find(layer)
    sgmm(y, x, bank.projection, bank.step)


def _deltas_fake(y: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, layer: Any) -> None:
    return None


def _page_projection(
    x: torch.Tensor, gates: torch.Tensor, layer: Any, width: int, stride: int
) -> torch.Tensor:
    bank = find(layer)
    operands = x, bank.projection, bank.step, bank.route.adapts
    return of_pages.page_projection(*operands, _kv_slots(bank, x))


def _page_projection_norm(
    x: torch.Tensor, residual: torch.Tensor, gates: torch.Tensor, layer: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    bank = find(layer)
    return of_pages.page_projection_norm(x, residual, bank.projection, bank.step, bank.route.adapts)


def _page_deltas(y: torch.Tensor, x: torch.Tensor, gates: torch.Tensor, layer: Any) -> None:
    bank = find(layer)
    if bank.route.adapts:  # else the step runs what vLLM runs
        sgmm(y, x, bank.projection, bank.step)


def _layer_projection(
    x: torch.Tensor, gates: torch.Tensor, layer: Any, width: int, stride: int
) -> torch.Tensor:
    bank = find(layer)
    return layer_linear(x, bank.projection, bank.step)


def _layer_deltas(
    y: torch.Tensor,
    lora_a_out: torch.Tensor,
    logits: torch.Tensor | None,
    gates: torch.Tensor,
    layer: Any,
) -> None:
    bank = find(layer)
    layer_sgmm(y, lora_a_out, logits, bank.projection, bank.step)


def _layer_deltas_fake(*arguments) -> None:
    return None


def _layer_route(
    x: torch.Tensor,
    lora_a_out: torch.Tensor,
    logits: torch.Tensor | None,
    gates: torch.Tensor,
    layer: Any,
    linears: int,
    ranks: int,
) -> torch.Tensor:
    bank = find(layer)
    return route_layer(lora_a_out, logits, bank.projection, bank.step, x.dtype)


def _layer_route_fake(
    x: torch.Tensor,
    lora_a_out: torch.Tensor,
    logits: torch.Tensor | None,
    gates: torch.Tensor,
    layer: Any,
    linears: int,
    ranks: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], linears, ranks)


_NAMED = f"(Tensor x, Tensor gates, {NAME_TYPE} layer, int width, int stride) -> Tensor"
_ADDED = f"(Tensor(a!) y, Tensor x, Tensor gates, {NAME_TYPE} layer) -> ()"
_NORMED = f"(Tensor x, Tensor residual, Tensor gates, {NAME_TYPE} layer) -> (Tensor, Tensor)"

# What else a step's launches write, the workspace and the KV cache, no other op of the graph reads.
# `projection`: [T, in] -> [T, width], rows `stride` elements apart: out, or out / 2 after gate_up's
# activation, see `kernels.projection`.
projection = register_op(f"projection{_NAMED}", _projection, _projection_fake)
# `projection_norm`: and the norm behind it, see `kernels.projection_norm`; residual is [T, H].
projection_norm = register_op(
    f"projection_norm{_NORMED}", _projection_norm, _projection_norm_fake
)
# `deltas`: added to y [T, out] in place, over a projection of any kind, see `sgmm`.
deltas = register_op(f"deltas{_ADDED}", _deltas, _deltas_fake)
# The same over pages, in steps that have adapters; whether one has says a flag on the host, read
# when the op runs: a compiled model serves both kinds, a CUDA graph holds that of its capture.
page_projection = register_op(f"page_projection{_NAMED}", _page_projection, _projection_fake)
page_projection_norm = register_op(
    f"page_projection_norm{_NORMED}", _page_projection_norm, _projection_norm_fake
)
page_deltas = register_op(f"page_deltas{_ADDED}", _page_deltas, _deltas_fake)

# Layer-wise. Gates change too, and are read by later ops of the block. Those come later by the data
# that they read, so torch need not know: it would copy the buffers in every piece of a graph. The
# routers' logits, sums over ranks where ranks hold parts of `in`, come from outside but for
# `layer_projection`: see `layer_linear`, `layer_sgmm`, `route_layer`.
_DECIDED = f"Tensor low, Tensor? logits, Tensor gates, {NAME_TYPE} layer"
layer_projection = register_op(f"layer_projection{_NAMED}", _layer_projection, _projection_fake)
layer_deltas = register_op(
    f"layer_deltas(Tensor(a!) y, {_DECIDED}) -> ()", _layer_deltas, _layer_deltas_fake
)
layer_route = register_op(
    f"layer_route(Tensor x, {_DECIDED}, int linears, int ranks) -> Tensor",
    _layer_route,
    _layer_route_fake,
)
