"""Whether a mixture may be chosen per request on an engine, as far as configs say: for the front
end, which asks first, and for the worker."""

from __future__ import annotations

import functools

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.architectures import ARCHITECTURES, PREFIX, Architecture
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import SECTION, AdapterConfig
from vllm_adafuse.format.origin import backbone_hash, origin_problem
from vllm_adafuse.format.places import find_local_backbone
from vllm_adafuse.serving import vllm_api
from vllm_adafuse.serving.adapters import OpenedAdapter
from vllm_adafuse.serving.attach import refuse_context, say_origin
from vllm_adafuse.serving.options import option
from vllm_adafuse.serving.plain_loras import BOTH_LORA, VLLM_LORA
from vllm_adafuse.text import some


class Fits:
    """What adapters of an engine are checked against.

    Args:
        vllm_config: of the engine.

    Attributes:
        architecture: of the backbone; None for a class outside the table, of whose modules vLLM's
            own model alone knows the names.
        rest: whether adapters may have a rest, see `plain_loras.py`.
    """

    def __init__(self, vllm_config: VllmConfig):
        self._config, self._model = vllm_config, vllm_config.model_config
        names = getattr(self._model.hf_config, "architectures", None) or [""]
        name = str(names[0]).removeprefix(PREFIX)
        self.architecture: Architecture | None = ARCHITECTURES.get(name)
        self._class, self._hash_of = name, functools.cache(backbone_hash)
        self.rest = vllm_api.shares_lora(vllm_config)

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
        """Why a mixture, or the rest of a plain LoRA, cannot be served by request here.

        Args:
            opened: the adapter.
            warn: log that it was made on another backbone, where that is no error.

        Raises:
            AdapterError: it was, and the option `backbone` is "refuse"; or its router sees the past,
                which the engine's options keep it from.
        """
        config = opened.config
        if config is None:
            return self._rest_problems(opened)
        refuse_context(config, f"adapter {opened.path}", self._config)
        self._check_origin(opened, config, warn)
        reason = self._reason(config)
        if not reason:
            return []
        return [
            f"{reason}, cannot be chosen per request yet; serve it alone: "
            "--hf-overrides '{\"adafuse_adapter\": DIR}' without --enable-lora"
        ]

    def _rest_problems(self, opened: OpenedAdapter) -> list[str]:
        most = self._config.lora_config.max_lora_rank if opened.rest else 0
        over = [name for name, module in opened.rest.items() if module.ranks[0] > most]
        ranks = [opened.rest[name].ranks[0] for name in over]
        if not over:
            return []
        return [
            f"{some(over)}: rank {max(ranks)}, and --max-lora-rank is {most}, which is all that "
            f"vLLM's slots for these modules have: set it to {max(ranks)} or more"
        ]

    def _reason(self, config: AdapterConfig) -> str:
        if self.architecture is None:
            return f"a mixture on {self._class}, whose embedding is not known"
        if config.layer_wise:
            return "`routing` layer_wise, a router in every linear or block"
        if config.router_layer:
            return f"`router.layer` {config.router_layer}, a router behind the entrance"
        return ""

    def _check_origin(self, opened: OpenedAdapter, config: AdapterConfig, warn: bool) -> None:
        how = option(self._config.additional_config, "backbone")
        if self._config.load_config.load_format == "dummy" or not (warn or how == "refuse"):
            return
        place = find_local_backbone(self._model.model, self._model.revision)
        problem = origin_problem(config, str(place or self._model.model), self._hash_of)
        say_origin(str(opened.path), problem, how)


def check_engine(vllm_config: VllmConfig) -> None:
    """Raises AdapterError where vLLM's own LoRA cannot stand beside ours: stages of a pipeline hold
    some of the modules each."""
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise AdapterError(
            BOTH_LORA,
            [
                "vLLM's own LoRA does not stand beside ours with pipeline parallelism; leave one "
                f"of them out, or let vLLM serve all adapters ({VLLM_LORA})"
            ],
        )


def in_fp8(vllm_config: VllmConfig) -> bool:
    """Whether the pool's experts are in fp8: the option `lora_dtype`.

    Raises:
        AdapterError: they are to be, and cannot.
    """
    if option(vllm_config.additional_config, "lora_dtype") != "fp8":
        return False
    model, problems = vllm_config.model_config, []
    if not vllm_api.serves_lora(vllm_config):
        problems.append(
            "it is for adapters that requests choose from a pool of ours: serve with --enable-lora, "
            "without `adafuse.lora` \"vllm\", or leave it out"
        )
    if isinstance(getattr(model.hf_config, SECTION, None), dict):
        problems.append(
            "an adapter that is everybody's stays in the model's dtype: name it by --lora-modules and "
            "in requests (without --hf-overrides), or leave the option out"
        )
    if model.dtype not in (torch.bfloat16, torch.float32):
        name = str(model.dtype).removeprefix("torch.")
        problems.append(
            f"the model is in {name}, whose range is too small for what stands between A and B then: "
            "--dtype bfloat16, or leave it out"
        )
    if not (current_platform.is_cpu() or _reads_fp8()):
        problems.append(
            "kernels read such experts on NVIDIA GPUs of compute capability 8.9 and later (Ada, Hopper), "
            "and plain torch does on a CPU: leave it out here"
        )
    if problems:
        raise AdapterError('--additional-config: `adafuse.lora_dtype` "fp8"', problems)
    return True


def _reads_fp8() -> bool:
    return current_platform.is_cuda() and current_platform.has_device_capability(89)
