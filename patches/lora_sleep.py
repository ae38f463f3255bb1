"""Refuses adapters of a sleeping engine: to stamp a mixture reads weights that are not there, and a
device that is asked for them ends the engine.

Read against vLLM 0.26.0 and 0.32.0 (v1/engine/core.py, v1/executor/abstract.py).
"""

from __future__ import annotations

from vllm_adafuse.patches.lora_requests import wrap
from vllm_adafuse.patches.on_import import when_imported


def apply() -> None:
    """Wraps `EngineCore.add_lora` when its module is imported."""
    when_imported("vllm.v1.engine.core", _refuse_asleep)


def _refuse_asleep() -> None:
    from vllm.v1.engine.core import EngineCore
    from vllm_adafuse.errors import AdapterError
    from vllm_adafuse.serving import vllm_api

    def make(original):
        def add_lora(self, lora_request):
            asleep = self.model_executor.is_sleeping and vllm_api.serves_lora(self.vllm_config)
            if asleep and lora_request.lora_int_id not in self.list_loras():
                raise AdapterError(
                    f"adapter {lora_request.lora_name}",
                    [f"{lora_request.path}: the engine sleeps, expected one that is awake; wake it "
                     "up, then load it"],
                )  # fmt: skip
            return original(self, lora_request)

        return add_lora

    wrap(EngineCore, "add_lora", ("self", "lora_request"), make)
