"""Has requests wait whose adapters have no room in the pool beside those that run.

vLLM's scheduler lets `max_loras` adapters into a step, of whatever size; here those that would not
fit are out of its sight while it plans one (`serving/waiting.py`).

Read against vLLM 0.26.0 and 0.32.0 (v1/core/sched/scheduler.py).
"""

from __future__ import annotations

from vllm_adafuse.patches.lora_requests import wrap
from vllm_adafuse.patches.on_import import when_imported


def apply() -> None:
    """Wraps `Scheduler.schedule` when its module is imported."""
    when_imported("vllm.v1.core.sched.scheduler", _hold_back)


def _hold_back() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm_adafuse.serving import vllm_api
    from vllm_adafuse.serving.waiting import Waiting, put_back, take_out

    def waiting_of(scheduler):
        if not hasattr(scheduler, "adafuse_waiting"):
            config, waiting = scheduler.vllm_config, None
            if vllm_api.serves_lora(config):
                lora = config.lora_config
                waiting = Waiting(lora.max_loras, lora.max_lora_rank)
            scheduler.adafuse_waiting = waiting
        return scheduler.adafuse_waiting

    def make(original):
        def schedule(self, *args, **kwargs):
            if (waiting := waiting_of(self)) is None:
                return original(self, *args, **kwargs)
            taken = take_out(self, waiting)
            try:
                return original(self, *args, **kwargs)
            finally:
                put_back(taken)

        return schedule

    wrap(Scheduler, "schedule", ("self",), make)
