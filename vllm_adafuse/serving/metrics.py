"""What `/metrics` says of adapters.

Tokens and requests are counted here, in the front end, when a request ends, those of experts by
tables that a worker left (`serving/expert_tables.py`); what only a worker knows is read from its file
when somebody scrapes (`serving/meter.py`). No step waits for either.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import Counter
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector
from vllm.logger import init_logger
from vllm_adafuse.format.config import ADAPTER_KEY, CONTENT_KEY, SECTION
from vllm_adafuse.serving.adapters import size_in_path, split_path
from vllm_adafuse.serving.expert_tables import Experts
from vllm_adafuse.serving.meter import Counts
from vllm_adafuse.serving.scratch import Beside, directory_of

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")
# Of Counts: metric, what it says.
GAUGES = {
    "pages": ("adafuse_pool_pages", "Pages of 16 ranks in the pool"),
    "pages_used": ("adafuse_pool_pages_used", "Pages of the pool that hold an adapter"),
}
COUNTERS = {
    "failures": ("adafuse_adapter_load_failures", "Adapters that a worker could not read"),
    "uploads": ("adafuse_adapter_uploads", "Adapters copied to the device"),
    "evictions": ("adafuse_adapter_evictions", "Adapters that made room on the device"),
}
INFO = "adafuse_adapter_info"
# Experts times tokens of a request that are counted while an event loop waits, some milliseconds; of
# everybody's default the experts are taken to be so many.
AT_ONCE, PINNED_EXPERTS = 1 << 16, 8


@functools.cache
def tokens_counter() -> Counter:
    """Made in the process that counts, once vLLM has set up prometheus_client."""
    return Counter(
        "adafuse_tokens", "Tokens of ended requests; adapter is empty for the bare backbone",
        ["adapter", "kind"],
    )  # fmt: skip


@functools.cache
def experts_counter() -> Counter:
    """See `tokens_counter`."""
    return Counter(
        "adafuse_expert_tokens",
        "Tokens of ended requests that took an expert of a mixture; each counts for all of its experts",
        ["adapter", "expert"],
    )  # fmt: skip


@functools.lru_cache(maxsize=1 << 12)
def expert_counter(adapter: str, expert: int) -> Any:
    """One of them, which costs a request less than to ask for it by its labels."""
    return experts_counter().labels(adapter, str(expert))


@functools.cache
def requests_counter() -> Counter:
    """See `tokens_counter`."""
    return Counter("adafuse_requests", "Requests that ended, and why", ["adapter", "reason"])


@functools.cache
def refusals_counter() -> Counter:
    """See `tokens_counter`."""
    return Counter("adafuse_adapter_refusals", "Adapters that the front end refused", ["reason"])


def counts_refusals(method: Callable) -> Callable:
    """Counts the ValueErrors of a function by the names of their classes, each once."""

    @functools.wraps(method)
    def counted(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except ValueError as e:
            if "is_counted" not in vars(e):  # by one that this function called
                refusals_counter().labels(type(e).__name__).inc()
                e.is_counted = True  # type: ignore[attr-defined]
            raise

    return counted


class AdapterCollector(Collector):
    """The metrics of the engines that this process serves."""

    def __init__(self) -> None:
        self.directories: set[Path] = set()
        self.pinned: dict[str, str] = {}  # name -> content hash of everybody's adapter
        self.experts = Experts()
        self._beside = Beside("adafuse-count", "experts of a request")
        self.begun: set[str] = set()  # adapters whose experts are counted

    def follow(self, vllm_config: Any) -> None:
        """An engine has begun; its requests will be counted here."""
        if (folder := directory_of(vllm_config)) not in self.directories:
            self.directories.add(folder)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        section = getattr(vllm_config.model_config.hf_config, SECTION, None)
        if isinstance(section, dict) and CONTENT_KEY in section:
            self.pinned[Path(section[ADAPTER_KEY]).name] = section[CONTENT_KEY]

    def count(self, adapter: str | None, prompt: int, generated: int, reason: str) -> None:
        """A request has ended, of so many tokens."""
        name = adapter or next(iter(self.pinned), "")
        tokens_counter().labels(name, "prompt").inc(prompt)
        tokens_counter().labels(name, "generation").inc(generated)
        requests_counter().labels(name, reason).inc()

    def count_experts(self, lora_request: Any | None, token_ids: list[int]) -> None:
        """The same request, by its tokens from the first on."""
        name, content = next(iter(self.pinned.items()), ("", None))
        columns = PINNED_EXPERTS
        if lora_request is not None:
            path = lora_request.lora_path
            name, columns = lora_request.lora_name, size_in_path(path).columns
            content = split_path(path)[1] if columns else None
        if content is None or not token_ids:
            return
        if columns * len(token_ids) <= AT_ONCE:
            return self._count_experts(name, content, token_ids)
        self._beside.submit(self._count_experts, name, content, token_ids)

    def _count_experts(self, name: str, content: str, token_ids: list[int]) -> None:
        try:
            counts = self.experts.count(self.directories, content, token_ids)
        except (OSError, ValueError) as e:
            logger.warning("AdaFuse: /metrics leaves out experts of %s: %s", name, e)
            return
        if counts is None:
            return
        if name not in self.begun:  # those that no token takes are to be seen, too
            self.begun.add(name)
            for expert in range(len(counts)):
                expert_counter(name, expert)
        for expert in counts.nonzero()[0].tolist():
            expert_counter(name, expert).inc(int(counts[expert]))

    def describe(self) -> list[Metric]:
        """Nothing: what there is shows when it is collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Reads the workers' files."""
        found = [pair for folder in sorted(self.directories) for pair in _read_all(folder)]
        info = GaugeMetricFamily(
            INFO, "Adapters that are loaded; 1", labels=["adapter", "kind", "content", "engine"]
        )
        for name, content in self.pinned.items():
            info.add_metric([name, "pinned", content, ""], 1)
        for engine, counts in found:
            for one in counts.adapters.values():
                info.add_metric([one["name"], one["kind"], one["content"], engine], 1)
        yield info
        if not found:
            return
        for key, (name, text) in GAUGES.items():
            yield _filled(GaugeMetricFamily(name, text, labels=["engine"]), key, found)
        for key, (name, text) in COUNTERS.items():
            yield _filled(CounterMetricFamily(name, text, labels=["engine"]), key, found)
        seconds = SummaryMetricFamily(
            "adafuse_adapter_load_seconds", "Reading adapters, with waits", labels=["engine"]
        )
        for engine, counts in found:
            seconds.add_metric([engine], counts.loads, counts.load_seconds)
        yield seconds


def _filled(family: Any, key: str, found: list[tuple[str, Counts]]) -> Metric:
    for engine, counts in found:
        family.add_metric([engine], getattr(counts, key))
    return family


def _read_all(folder: Path) -> Iterator[tuple[str, Counts]]:
    """(engine, counts) of each file; a scrape does not fail for one that is being taken away."""
    for file in sorted(folder.glob("*.json")):
        try:
            yield file.stem, Counts(**json.loads(file.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as e:
            logger.warning("AdaFuse: /metrics leaves out %s: %s", file, e)


COLLECTOR = AdapterCollector()
