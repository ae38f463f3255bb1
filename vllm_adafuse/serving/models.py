"""AdaFuse<Architecture>: vLLM's own decoder classes with routes, banks and wrapped linears.

The classes are made on first use by `__getattr__` (vLLM asks for them by name), so that
importing this module imports no model.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm_adafuse.format.architectures import ARCHITECTURES, PREFIX, Architecture
from vllm_adafuse.format.config import CONTENT_KEY
from vllm_adafuse.serving import layer_wise, projections, vllm_api
from vllm_adafuse.serving.attach import refuse_context, refuse_micro_batches
from vllm_adafuse.serving.bank import ExpertBank, place_banks
from vllm_adafuse.serving.content import Content, open_checked
from vllm_adafuse.serving.expert_tables import Tables
from vllm_adafuse.serving.ops import make_known
from vllm_adafuse.serving.past import PastRouter
from vllm_adafuse.serving.projections import NormPlace, norms_behind
from vllm_adafuse.serving.requests import requests_of
from vllm_adafuse.serving.routes import ROUTES, Route, Router, SharedRotary
from vllm_adafuse.serving.scratch import place_of
from vllm_adafuse.serving.warm_up import warm_up
from vllm_adafuse.serving.wrap import linears
from vllm_adafuse.serving.wrap.hooks import (
    after_loading,
    pass_routes_on,
    route_at,
    take_routes,
)
from vllm_adafuse.serving.wrap.vllm_lora import backbones_embedding, without_lora

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")


class AdaFuseMixin:
    """Put before a vLLM `…ForCausalLM` class by `make_class`."""

    architecture: Architecture

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        refuse_micro_batches(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        hf_config = vllm_config.model_config.hf_config
        self.adafuse_adapter = open_checked(hf_config.adafuse)
        self.adafuse_content = Content(self.adafuse_adapter, hf_config.adafuse[CONTENT_KEY])
        self.adafuse_tables = Tables(place_of(vllm_config))
        adapter_config = self.adafuse_adapter.config
        self.adafuse_rows = vllm_api.max_tokens(vllm_config)
        self.adafuse_cold = current_platform.is_cuda_alike()
        # The last module, so that it runs when all others are loaded.
        loading = after_loading(self._load_adapter)
        if adapter_config.layer_wise:
            self.adafuse_banks = layer_wise.wrap_layers(
                self, self.adafuse_adapter, self.packed_modules_mapping,
                self.adafuse_rows, vllm_config.model_config.dtype,
                vllm_config.lora_config is None,
            )  # fmt: skip
            for bank in self.adafuse_banks:
                make_known(bank, vllm_config)
            self.adafuse_loading = loading
            return
        route = Route(self.adafuse_rows, adapter_config.top_k, adapter_config.num_experts)
        dtype, alone = vllm_config.model_config.dtype, vllm_config.lora_config is None
        behind = norms_behind(self.model, vllm_config, self.architecture.residual_norms)
        rotary = SharedRotary(self.adafuse_rows, self.architecture.rotary_follows)
        self.adafuse_rotary = rotary
        self.adafuse_banks = self._wrap_projections(route, dtype, alone, behind)
        for bank in self.adafuse_banks:
            make_known(bank, vllm_config)
        pass_routes_on(self, ROUTES, adapter_config.top_k)
        stamps = get_pp_group().is_first_rank and not adapter_config.router_layer
        sizes = hf_config.hidden_size, hf_config.vocab_size if stamps else 0, hf_config.rms_norm_eps
        if adapter_config.router_context:
            refuse_context(adapter_config, f"adapter {self.adafuse_adapter.path}", vllm_config)
            self.adafuse_requests = requests_of(vllm_config, backbones_embedding(self))
            self.adafuse_router = PastRouter(adapter_config, route, *sizes, self.adafuse_requests)
        else:
            self.adafuse_router = Router(adapter_config, route, *sizes)
        if adapter_config.router_layer and self._has_router:
            route_at(self.model.layers[adapter_config.router_layer], self.adafuse_router)
        self.adafuse_loading = loading

    def _wrap_projections(
        self, route: Route, dtype: torch.dtype, alone: bool, behind: dict[LinearBase, NormPlace]
    ) -> list[ExpertBank]:
        config = self.adafuse_adapter.config
        adapted, packed = set(self.adafuse_adapter.projections), self.packed_modules_mapping
        found = list(projections.adapted_linears(self, adapted, packed))
        fused = [alone and projections.can_fuse(layer) for layer, _, _ in found]
        linears.release_weights(layer for (layer, _, _), fuse in zip(found, fused) if fuse)
        banks = [
            ExpertBank(layer, linears, config.num_experts, config.rank, route, index, fuse)
            for index, ((layer, _, linears), fuse) in enumerate(zip(found, fused))
        ]
        place_banks(banks, dtype)
        for (layer, block, _), bank, fuse in zip(found, banks, fused):
            linears.wrap_linear(layer, block, bank, fuse, behind.get(layer), self.adafuse_rotary)
        for layer, block, _ in found:
            linears.keep_in_place(layer, block)
        for bank in banks:
            bank.settle()
        # A pipeline stage may have no adapted layer, but still passes routes on.
        sizes = [(1, 1, 1), *(bank.workspace_sizes() for bank in banks)]
        route.reserve(max(1, len(banks)), sizes)
        return banks

    @property
    def _has_router(self) -> bool:
        """Whether this pipeline stage decides the routes of the model."""
        if self.adafuse_adapter.config.layer_wise:
            return False
        layer = self.adafuse_adapter.config.router_layer
        return self.model.start_layer <= layer < self.model.end_layer

    @torch.no_grad()
    def _load_adapter(self) -> None:
        """Everything that is loaded once vLLM has loaded the backbone."""
        adapter = self.adafuse_adapter
        self.adafuse_content.load(self._read_values)
        self._make_routes()
        if adapter.config.layer_wise:
            layer_wise.log_loaded(adapter, self.adafuse_banks)
            return
        config = adapter.config
        logger.info(
            "AdaFuse: %d experts, top-%d, ranks %s, modules %s in %d projections; "
            "%d layers write the KV cache themselves; "
            "expert banks %d bytes, passports %d bytes on this device",
            config.num_experts,
            config.top_k,
            "/".join(map(str, sorted(set(config.ranks)))),
            ",".join(config.target_modules),
            len(adapter.projections),
            sum(bank.cache is not None for bank in self.adafuse_banks),
            sum(bank.nbytes for bank in self.adafuse_banks),
            self.adafuse_router.passport_bytes,
        )

    def _read_values(self) -> None:
        adapter = self.adafuse_adapter
        with adapter.reader() as read:
            for bank in self.adafuse_banks:
                bank.load(read)
            if self._has_router:
                self.adafuse_router.load(read, "router.bias" in adapter.tensors)

    def _make_routes(self) -> None:
        """Whatever of the routes hangs on the backbone's weights."""
        if self._has_router:
            norm = self.model.layers[self.adafuse_adapter.config.router_layer].input_layernorm
            with without_lora(self):
                for _ in self.adafuse_router.stamp(
                    self.embed_input_ids, norm, self.architecture.norm_offset
                ):
                    pass
            if self.adafuse_router.by_id:
                config, columns = self.adafuse_adapter.config, self.adafuse_router.columns
                self.adafuse_tables.leave(self.adafuse_content.start, config, columns)
            vllm_api.release_workspaces()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str] | None:
        """vLLM's own; some trainers call it on a running engine, with a few tensors at a time."""
        loaded = super().load_weights(weights)
        # Where vLLM reloads, tensors are still on the meta device: `reload_adapter` comes later.
        if self.adafuse_content.loaded and self._has_router and (
            not self.adafuse_router.weight.is_meta
        ):
            layer = self.adafuse_adapter.config.router_layer
            read = "model.embed_tokens.", f"model.layers.{layer}.input_layernorm."
            if loaded is None or any(name.startswith(read) for name in loaded):
                self.reload_adapter()
        return loaded

    @torch.no_grad()
    def reload_adapter(self) -> None:
        """Lets a running model follow new weights: makes its routes of them, and reads the adapter
        again if its files hold other values than before.

        Called after all that vLLM has for loading weights (patches/reload.py). Code that writes
        parameters by itself must call it.

        Raises:
            AdapterError: the adapter on disk cannot take the place of the one that is served,
                whose values stay.
        """
        try:
            again = self.adafuse_content.load_changed(self._read_values)
        finally:
            self._make_routes()
        logger.info(
            "AdaFuse: weights were loaded anew; routes follow them; adapter %s was %s, content %s",
            self.adafuse_adapter.path,
            "read again: its values have changed" if again else "not read again: it is unchanged",
            self.adafuse_content.hash,
        )

    def route_any(self, tokens: int, ids: torch.Tensor | None, embeds: torch.Tensor | None) -> None:
        """Gives so many tokens routes, as a step of such ids or embeddings does, for `warm_up`."""
        if self.adafuse_adapter.config.layer_wise:
            return
        router = self.adafuse_router
        if router.by_id and embeds is not None:
            router(None, embeds.new_zeros(tokens, embeds.shape[1]))
        elif router.by_id and ids is not None:
            router(ids.new_zeros(tokens), None)
        else:
            router.route.spread(tokens)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.adafuse_cold and not torch.compiler.is_compiling():
            self.adafuse_cold = False
            given = input_ids, inputs_embeds
            warm_up(self.model, self.adafuse_rows, lambda tokens: self.route_any(tokens, *given))
        if self.adafuse_adapter.config.layer_wise:  # decides in its layers
            return super().forward(
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )
        self.adafuse_rotary(positions)
        router = self.adafuse_router
        at_layer = router.config.router_layer
        if intermediate_tensors is not None:
            received, intermediate_tensors = take_routes(intermediate_tensors, ROUTES)
            # Before the layer at which the router stands, nothing is decided yet.
            if at_layer < self.model.start_layer:
                router.receive(*received)
        elif at_layer == 0:
            router(input_ids, inputs_embeds)
        if (step := getattr(self, "adafuse_step", None)) is not None:
            step.take_from(router.route, positions.shape[-1])
        out = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        if isinstance(out, IntermediateTensors):
            rows = positions.shape[-1]
            own = router.route.expert_ids[:rows], router.route.weights[:rows]
            out.tensors.update(zip(ROUTES, own))
        return out


def make_class(architecture: Architecture) -> type:
    """The AdaFuse class of one line of the table."""
    module = importlib.import_module(f"vllm.model_executor.models.{architecture.module}")
    stock = getattr(module, architecture.name)
    body = {"architecture": architecture, "__module__": __name__, "__doc__": stock.__doc__}
    return type(architecture.adafuse_name, (AdaFuseMixin, stock), body)


def __getattr__(name: str) -> type:
    architecture = ARCHITECTURES.get(name.removeprefix(PREFIX))
    if architecture is None or architecture.adafuse_name != name:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return globals().setdefault(name, make_class(architecture))
