"""Serves LoRA requests from pages: `--enable-lora` takes mixtures and plain LoRAs side by side.

Both of vLLM's model runners make their LoRA manager by `LoRAModelRunnerMixin.load_lora_model` when
the weights are loaded; ours is made there. `--additional-config '{"adafuse": {"lora": "vllm"}}'`
leaves vLLM's in its place.

Read against vLLM 0.26.0 and 0.32.0 (v1/worker/lora_model_runner_mixin.py).
"""

from __future__ import annotations

import functools
import inspect

from vllm_adafuse.patches.on_import import when_imported
from vllm_adafuse.serving import vllm_api

_SEAM = "vllm.v1.worker.lora_model_runner_mixin"
_MARK = "_adafuse_wrapped"
_TAKES = ["self", "model", "vllm_config", "device"]


def apply() -> None:
    """Wraps `LoRAModelRunnerMixin.load_lora_model` as soon as a worker imports it."""
    when_imported(_SEAM, wrap)


def wrap() -> None:
    """Wraps it now.

    Raises:
        RuntimeError: the seam has moved in this vLLM.
    """
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    original = getattr(LoRAModelRunnerMixin, "load_lora_model", None)
    if getattr(original, _MARK, False):
        return
    if original is None or list(inspect.signature(original).parameters) != _TAKES:
        raise vllm_api.moved(
            "vLLM no longer makes its LoRA manager by "
            f"LoRAModelRunnerMixin.load_lora_model({', '.join(_TAKES[1:])}), so mixtures could "
            "not be chosen per request"
        )

    @functools.wraps(original)
    def load_lora_model(self, model, vllm_config, device):
        from vllm_adafuse.serving.manager import AdapterManager
        from vllm_adafuse.serving.wrap.vllm_lora import draft_without_lora

        if vllm_api.lora_option(vllm_config) == "vllm":
            return original(self, model, vllm_config, device)
        vllm_api.check_supports_lora(model)
        self.lora_manager = AdapterManager(vllm_config, device)
        vllm_api.capture_one_kind_of_lora(self)
        vllm_api.keep_adapters_on_reload(self)
        vllm_api.name_steps_by_request(self, self.lora_manager.name_step)
        if vllm_api.shares_lora(vllm_config):
            draft_without_lora(self)
        return self.lora_manager.create_lora_manager(model, vllm_config)

    setattr(load_lora_model, _MARK, True)
    LoRAModelRunnerMixin.load_lora_model = load_lora_model
