"""What an engine has of a front end's adapters, and who still needs it."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any


class Holds:
    """Counts who needs an adapter, by its id in the engine: names and ids of users that stand for it
    now, and requests that have not ended.

    What nobody needs is forgotten. Of the others the engine's host keeps as many as
    `--max-cpu-loras` says, and never fewer than requests need: only what no request has, and what
    can be read again, makes room.

    Args:
        max_cpu_loras: vLLM's option.
        can_be_read_again: whether an adapter's files are still those that were read.

    Attributes:
        forget: is called with ids that the engine is to forget, by whichever thread ended a need.
        resident: ids that the engine has on the host.
        pinned: those that never make room.
    """

    def __init__(self, max_cpu_loras: int, can_be_read_again: Callable[[int], bool]):
        self.forget: Callable[[int], None] = lambda adapter: None
        self.resident: set[int] = set()
        self.pinned: set[int] = set()
        self._most, self._can_be_read_again = max_cpu_loras, can_be_read_again
        self._lock, self._clock = RLock(), itertools.count()
        self._requests: Counter[int] = Counter()
        self._names: Counter[int] = Counter()
        self._used: dict[int, int] = {}

    def add(self, adapter: int) -> None:
        """A request needs it."""
        with self._lock:
            self._requests[adapter] += 1
            self._used[adapter] = next(self._clock)

    def drop(self, adapter: int) -> None:
        """A request no longer does."""
        self._drop(self._requests, adapter)

    def add_name(self, adapter: int) -> None:
        """A name stands for it."""
        with self._lock:
            self._names[adapter] += 1

    def drop_name(self, adapter: int, forget: bool = True) -> None:
        """A name no longer does; without `forget` the caller sees to the rest."""
        self._drop(self._names, adapter, forget)

    def _drop(self, counts: Counter[int], adapter: int, forget: bool = True) -> None:
        with self._lock:
            counts[adapter] -= 1
            if counts[adapter] <= 0:
                del counts[adapter]
        if forget and not self.needed(adapter):
            self.forget(adapter)
        elif counts is self._requests:
            self.make_room()

    def needed(self, adapter: int) -> bool:
        """Whether anybody needs it."""
        with self._lock:
            return adapter in self._requests or adapter in self._names

    def in_use(self, adapter: int) -> bool:
        """Whether a request needs it."""
        with self._lock:
            return adapter in self._requests

    def loaded(self, adapter: int) -> None:
        """The engine has it now; whoever wanted it may have gone meanwhile."""
        self.resident.add(adapter)
        if not self.needed(adapter):
            self.forget(adapter)
        self.make_room()

    def gone(self, adapter: int) -> None:
        """The engine no longer has it."""
        self.resident.discard(adapter)
        self.pinned.discard(adapter)
        self._used.pop(adapter, None)

    def make_room(self) -> None:
        """Has those used least recently forgotten that are too many and that nothing keeps."""
        if (over := len(self.resident) - self._most) <= 0:
            return
        idle = [i for i in self.resident - self.pinned if not self.in_use(i)]
        for adapter in sorted(idle, key=lambda i: self._used.get(i, -1)):
            if over and self._can_be_read_again(adapter):
                self.forget(adapter)
                over -= 1

    @contextmanager
    def held(self, adapter: int) -> Iterator[None]:
        """As a request's need, meanwhile."""
        self.add(adapter)
        try:
            yield
        finally:
            self.drop(adapter)


class RequestStates(dict):
    """vLLM's table of a front end's requests, by their internal ids: each needs its adapter until
    it leaves the table. Outputs show the request's LoRA as the user gave it; the state has it as the
    engine got it, too, in `stamped_lora`.

    Args:
        holds: of the engine.
        users_request: from a stamped `LoRARequest` to the user's.
        states: that there are.
    """

    def __init__(self, holds: Holds, users_request: Callable[[Any], Any], states: dict):
        super().__init__()
        self._holds, self._users_request = holds, users_request
        self._adapters: dict[str, int] = {}
        for name, state in states.items():
            self[name] = state

    def __setitem__(self, name: str, state: Any) -> None:
        self._drop(name)
        super().__setitem__(name, state)
        if state.lora_request is not None:
            self._adapters[name] = state.lora_request.lora_int_id
            self._holds.add(self._adapters[name])
            state.stamped_lora = state.lora_request
            state.lora_request = self._users_request(state.lora_request)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._drop(name)

    def pop(self, name: str, *default: Any) -> Any:
        """As of any dict."""
        state = super().pop(name, *default)
        self._drop(name)
        return state

    def clear(self) -> None:
        """As of any dict."""
        for name in list(self):
            del self[name]

    def _drop(self, name: str) -> None:
        if (adapter := self._adapters.pop(name, None)) is not None:
            self._holds.drop(adapter)
