"""Adds what is known of adapters to vLLM's `/metrics`; `serving/metrics.py` says what.

Three places of vLLM are asked: where `/metrics` gets its registry, where an engine's own metrics
begin, and where the statistics of an ended request are made. Serving does not depend on them: where
one has moved, a warning says what lacks.

Read against vLLM 0.32.0 (v1/metrics/prometheus.py, v1/metrics/loggers.py,
v1/engine/output_processor.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm_adafuse.patches.on_import import when_imported

_MARK = "_adafuse_wrapped"


def apply() -> None:
    """Wraps the functions when their modules are imported."""
    when_imported("vllm.v1.metrics.prometheus", _add_to_registry)
    when_imported("vllm.v1.metrics.loggers", _follow_engines)
    when_imported("vllm.v1.engine.output_processor", _count_requests)


def _wrap(owner: Any, name: str, lacks: str, make: Callable) -> None:
    original = getattr(owner, name, None)
    if getattr(original, _MARK, False):
        return
    if not callable(original):
        from vllm.logger import init_logger

        init_logger("vllm.adafuse").warning(
            "AdaFuse: vLLM's %s has no %s, so /metrics lacks %s", owner.__name__, name, lacks
        )
        return
    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, _MARK, True)
    setattr(owner, name, wrapper)


def _add_to_registry() -> None:
    import vllm.v1.metrics.prometheus as seam

    def make(original):
        def get_prometheus_registry():
            from vllm_adafuse.serving.metrics import COLLECTOR

            registry = original()
            if not getattr(registry, _MARK, False):
                registry.register(COLLECTOR)
                setattr(registry, _MARK, True)
            return registry

        return get_prometheus_registry

    _wrap(seam, "get_prometheus_registry", "the pool's and the adapters'", make)


def _follow_engines() -> None:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    def make(original):
        def __init__(self, vllm_config, *args, **kwargs):
            from vllm_adafuse.serving.metrics import COLLECTOR

            original(self, vllm_config, *args, **kwargs)
            COLLECTOR.follow(vllm_config)

        return __init__

    _wrap(PrometheusStatLogger, "__init__", "the pool's", make)


def _count_requests() -> None:
    from vllm.v1.engine.output_processor import OutputProcessor

    def make(original):
        def _update_stats_from_finished(self, req_state, finish_reason, iteration_stats):
            original(self, req_state, finish_reason, iteration_stats)
            if iteration_stats is None:
                return
            from vllm_adafuse.serving.metrics import COLLECTOR

            COLLECTOR.count(
                req_state.lora_name, req_state.prompt_len, req_state.stats.num_generation_tokens,
                str(finish_reason),
            )  # fmt: skip
            prompt, answer = req_state.prompt_token_ids, req_state.detokenizer
            if req_state.prompt_embeds is not None:  # ids of a part of it would tell wrong routes
                return
            if prompt is not None and answer is not None:  # else an answer without words
                stamped = getattr(req_state, "stamped_lora", None)  # of serving/holds.py
                COLLECTOR.count_experts(
                    stamped or req_state.lora_request, prompt, answer.output_token_ids
                )

        return _update_stats_from_finished

    _wrap(OutputProcessor, "_update_stats_from_finished", "tokens of adapters", make)
