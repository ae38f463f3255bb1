"""Which waiting requests a step may not take in, as their adapters have no room in the pool beside
those that run.

vLLM's scheduler counts adapters (`max_loras`), all as if of one size. Here a large one, or a new
version beside the old one, waits until what it needs is free: when the last requests of others have
ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from vllm_adafuse.serving import vllm_api
from vllm_adafuse.serving.adapters import size_in_path
from vllm_adafuse.serving.pool import Size, pool_size, total

# A request that others with adapters have overtaken for so long lets no more of them pass.
PATIENCE_S = 5.0


class Waiting:
    """Requests of one scheduler that wait for pages.

    Args:
        max_loras: vLLM's option; with `max_lora_rank` it says how large the pool is.
        max_lora_rank: likewise.
        now: the time in seconds.
    """

    def __init__(self, max_loras: int, max_lora_rank: int, now=time.monotonic):
        self.max_loras, self.size = max_loras, pool_size(max_loras, max_lora_rank)
        self._now = now
        self._since: dict[str, float] = {}

    def hold_back(self, running: Iterable[Any], waiting: Iterable[Any]) -> list[Any]:
        """The requests, in their order, that a step may not take in.

        Args:
            running: vLLM's requests that run.
            waiting: those that do not, first come first.
        """
        taken = {id_: size for request in running for id_, size in _adapter_of(request)}
        held, blocked = [], False
        for request in waiting:
            for adapter, size in _adapter_of(request):
                if not blocked and self._fits(taken, adapter, size):
                    taken[adapter] = size
                    continue
                held.append(request)
                since = self._since.get(request.request_id, self._now())
                blocked = blocked or self._now() - since > PATIENCE_S
                self._since[request.request_id] = since
        if self._since:
            names = {request.request_id for request in held}
            self._since = {name: t for name, t in self._since.items() if name in names}
        return held

    def _fits(self, taken: dict[int, Size], adapter: int, size: Size) -> bool:
        if not taken or adapter in taken:
            return True
        together = total(taken.values()) + size
        return len(taken) < self.max_loras and together.within(self.size)


def _adapter_of(request: Any) -> list[tuple[int, Size]]:
    """Id and size of a request's adapter; of the base's none."""
    lora = request.lora_request
    return [(lora.lora_int_id, size_in_path(lora.lora_path))] if lora is not None else []


def take_out(scheduler: Any, waiting: Waiting) -> list[tuple[Any, list[Any]]]:
    """Takes requests that are to wait out of a scheduler's queues: for `put_back`."""
    queues = vllm_api.waiting_queues(scheduler)
    if not queues:
        return []
    held = waiting.hold_back(scheduler.running, [r for queue in queues for r in queue])
    if not held:
        return []
    names, taken = {request.request_id for request in held}, []
    for queue in queues:
        if own := [request for request in queue if request.request_id in names]:
            queue.remove_requests(own)
            taken.append((queue, own))
    return taken


def put_back(taken: list[tuple[Any, list[Any]]]) -> None:
    """Puts them back, in their order, before those that came in between."""
    for queue, requests in taken:
        for request in reversed(requests):
            queue.prepend_request(request)
