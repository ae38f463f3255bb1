"""What `/metrics` says of adapters.

Tokens and requests are counted here, in the front end, when requests have ended, those of experts by
tables that a worker left (`serving/expert_tables.py`); what only a worker knows is read from its file
when somebody scrapes (`serving/meter.py`). No step waits for either.

What ends is only noted. Many requests together cost much less than one after the other: they are
counted when this process is scraped, and else within a second, by a thread beside.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import struct
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.util import Finalize
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
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
from vllm_adafuse.serving.scratch import Beside, Soon, directory_of

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
# Experts times tokens of a request that are counted while an event loop waits, some milliseconds, and
# those of requests that no longer wait for others; of everybody's default the experts are taken to be so
# many.
AT_ONCE, MANY, PINNED_EXPERTS = 1 << 16, 1 << 18, 8


class Upto(Counter):
    """One that tells of all requests that ended before it is asked, in whatever order a registry asks."""

    def collect(self) -> Iterable[Metric]:
        COLLECTOR.flush()
        return super().collect()


@functools.cache
def tokens_counter() -> Counter:
    """Made in the process that counts, once vLLM has set up prometheus_client."""
    return Upto(
        "adafuse_tokens", "Tokens of ended requests; adapter is empty for the bare backbone",
        ["adapter", "kind"],
    )  # fmt: skip


@functools.cache
def experts_counter() -> Counter:
    """See `tokens_counter`."""
    return Upto(
        "adafuse_expert_tokens",
        "Tokens of ended requests that took an expert of a mixture; each counts for all of its experts",
        ["adapter", "expert"],
    )  # fmt: skip


@functools.cache
def requests_counter() -> Counter:
    """See `tokens_counter`."""
    return Upto("adafuse_requests", "Requests that ended, and why", ["adapter", "reason"])


@functools.cache
def refusals_counter() -> Counter:
    """See `tokens_counter`."""
    return Counter("adafuse_adapter_refusals", "Adapters that the front end refused", ["reason"])


@functools.lru_cache(maxsize=1 << 12)
def _labelled(counter: Callable[[], Counter], *labels: str) -> Any:
    """One of a counter's, which costs less than to ask for it by its labels."""
    return counter().labels(*labels)


@functools.lru_cache(maxsize=1 << 12)
def _columns_and_content(path: str) -> tuple[int, str | None]:
    """Of a stamped path: experts, and the content hash of a mixture."""
    columns = size_in_path(path).columns
    return columns, split_path(path)[1] if columns else None


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
        self.begun: dict[str, list[Any]] = {}  # adapter -> its experts' counters
        self._beside = Beside("adafuse-count", "experts of a request")
        self._soon = Soon("adafuse-ended", "requests that ended", lambda: self.flush())
        # Not counted yet: name, tokens of prompt and answer, reason; name, content hash, int64 ids.
        self._ended: deque[tuple[str, int, int, str]] = deque()
        self._tokens: deque[tuple[str, str, bytes]] = deque()
        self._waiting = 0  # experts times tokens of these
        self._lock = Lock()

    def follow(self, vllm_config: Any) -> None:
        """An engine has begun; its requests will be counted here."""
        if (folder := directory_of(vllm_config)) not in self.directories:
            self.directories.add(folder)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            # Both: the first is called before the folder goes, but in no process of multiprocessing.
            atexit.register(self.flush)
            Finalize(None, self.flush, exitpriority=0)
        # A registry that is being asked takes no new ones.
        tokens_counter(), experts_counter(), requests_counter()
        section = getattr(vllm_config.model_config.hf_config, SECTION, None)
        if isinstance(section, dict) and CONTENT_KEY in section:
            self.pinned[Path(section[ADAPTER_KEY]).name] = section[CONTENT_KEY]

    def count(self, adapter: str | None, prompt: int, generated: int, reason: str) -> None:
        """A request has ended, of so many tokens."""
        name = adapter or next(iter(self.pinned), "")
        self._ended.append((name, prompt, generated, reason))
        self._soon.due()

    def count_experts(
        self, lora_request: Any | None, prompt: Sequence[int], answer: Sequence[int] = ()
    ) -> None:
        """The same request, by the ids of its tokens."""
        if lora_request is None:
            name, content = next(iter(self.pinned.items()), ("", None))
            columns = PINNED_EXPERTS
        else:
            name = lora_request.lora_name
            columns, content = _columns_and_content(lora_request.lora_path)
        tokens = len(prompt) + len(answer)
        if content is None or not tokens:
            return
        try:
            # Neither list stays as it is for long. Of all ways to numbers the fastest by far.
            ids = struct.pack(f"{tokens}q", *prompt, *answer)
        except struct.error as e:
            return self._leaves_out(name, e)
        if columns * tokens > AT_ONCE:
            self._beside.submit(self._count_experts, name, content, [ids])
            return
        self._tokens.append((name, content, ids))
        self._waiting += columns * tokens
        self._soon.due(self._waiting > MANY)

    def flush(self) -> None:
        """Counts what has ended until now, but for requests of very many tokens, which are on their way."""
        with self._lock:
            self._waiting = 0
            tokens: dict[tuple[str, str], int] = defaultdict(int)
            requests: dict[tuple[str, str], int] = defaultdict(int)
            for name, prompt, generated, reason in _taken(self._ended):
                tokens[name, "prompt"] += prompt
                tokens[name, "generation"] += generated
                requests[name, reason] += 1
            for counter, grown in ((tokens_counter, tokens), (requests_counter, requests)):
                for labels, amount in grown.items():
                    _labelled(counter, *labels).inc(amount)
            batches: dict[tuple[str, str], list[bytes]] = defaultdict(list)
            for name, content, ids in _taken(self._tokens):
                batches[name, content].append(ids)
            for (name, content), batch in batches.items():
                self._count_experts(name, content, batch)

    def _leaves_out(self, name: str, error: Exception) -> None:
        logger.warning("AdaFuse: /metrics leaves out experts of %s: %s", name, error)

    def _count_experts(self, name: str, content: str, batch: list[bytes]) -> None:
        try:
            requests = [np.frombuffer(ids, np.int64) for ids in batch]
            counts = self.experts.count(self.directories, content, *requests)
        except (OSError, ValueError) as e:
            return self._leaves_out(name, e)
        if counts is None:
            return
        counters = self.begun.get(name, ())
        if len(counters) < len(counts):  # those that no token takes are to be seen, too
            counters = [experts_counter().labels(name, str(e)) for e in range(len(counts))]
            self.begun[name] = counters
        for counter, grown in zip(counters, counts.tolist()):
            if grown:
                counter.inc(grown)

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


def _taken(waiting: deque) -> Iterator[Any]:
    """What is there now; others may put more to it all the while."""
    return (waiting.popleft() for _ in range(len(waiting)))


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
