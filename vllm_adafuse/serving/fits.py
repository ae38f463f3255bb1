"""Whether a mixture may be chosen per request on an engine, as far as configs say: for the front
end, which asks first, and for the worker."""

from __future__ import annotations

import functools

from vllm.config import VllmConfig
from vllm_adafuse.format.architectures import ARCHITECTURES, PREFIX, Architecture
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import AdapterConfig
from vllm_adafuse.format.origin import backbone_hash, origin_problem
from vllm_adafuse.format.places import find_local_backbone
from vllm_adafuse.serving.adapters import OpenedAdapter
from vllm_adafuse.serving.attach import refuse_context, say_origin
from vllm_adafuse.serving.options import option


class Fits:
    """What adapters of an engine are checked against.

    Args:
        vllm_config: of the engine.

    Attributes:
        architecture: of the backbone; None for a class outside the table, of whose modules vLLM's
            own model alone knows the names.
    """

    def __init__(self, vllm_config: VllmConfig):
        self._config, self._model = vllm_config, vllm_config.model_config
        names = getattr(self._model.hf_config, "architectures", None) or [""]
        name = str(names[0]).removeprefix(PREFIX)
        self.architecture: Architecture | None = ARCHITECTURES.get(name)
        self._class, self._hash_of = name, functools.cache(backbone_hash)

    @functools.cached_property
    def backbone(self) -> Backbone | None:
        """What names and shapes must fit; None where it is not known."""
        if self.architecture is None:
            return None
        return Backbone.from_hf_config(self._model.hf_config, self._model.model)

    @property
    def pipelined(self) -> bool:
        """Whether the model's layers are spread over several stages."""
        return self._config.parallel_config.pipeline_parallel_size > 1

    def problems(self, opened: OpenedAdapter, warn: bool) -> list[str]:
        """Why a mixture cannot be served by request here.

        Args:
            opened: the adapter; a plain LoRA has none of these problems.
            warn: log that it was made on another backbone, where that is no error.

        Raises:
            AdapterError: it was, and the option `backbone` is "refuse"; or its router sees the past,
                which the engine's options keep it from.
        """
        config = opened.config
        if config is None:
            return []
        refuse_context(config, f"adapter {opened.path}", self._config)
        self._check_origin(opened, config, warn)
        reason = self._reason(config)
        if not reason:
            return []
        return [
            f"{reason}, cannot be chosen per request yet; serve it alone: "
            "--hf-overrides '{\"adafuse_adapter\": DIR}' without --enable-lora"
        ]

    def _reason(self, config: AdapterConfig) -> str:
        if self.architecture is None:
            return f"a mixture on {self._class}, whose embedding is not known"
        if config.layer_wise:
            return "`routing` layer_wise, a router in every linear or block"
        if config.router_layer:
            return f"`router.layer` {config.router_layer}, a router behind the entrance"
        if self._model.enable_prompt_embeds:
            return "a mixture with --enable-prompt-embeds"
        return "a mixture with pipeline parallelism" if self.pipelined else ""

    def _check_origin(self, opened: OpenedAdapter, config: AdapterConfig, warn: bool) -> None:
        how = option(self._config.additional_config, "backbone")
        if self._config.load_config.load_format == "dummy" or not (warn or how == "refuse"):
            return
        place = find_local_backbone(self._model.model, self._model.revision)
        problem = origin_problem(config, str(place or self._model.model), self._hash_of)
        say_origin(str(opened.path), problem, how)
