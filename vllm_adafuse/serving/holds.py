"""What an engine has of a front end's adapters, and who still needs it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any


class Holds:
    """Counts who needs an adapter, by its id in the engine: the names and ids that stand for it
    now, and requests that have not ended. One that nobody needs any more is released.

    Attributes:
        release: is called with such an id, once, by whichever thread ended the need.
        resident: ids that the engine has on the host, as far as it has told.
    """

    def __init__(self):
        self.release: Callable[[int], None] = lambda adapter: None
        self.resident: set[int] = set()
        self._lock = RLock()
        self._needs: Counter[int] = Counter()

    def add(self, adapter: int) -> None:
        """Somebody needs it."""
        with self._lock:
            self._needs[adapter] += 1

    def drop(self, adapter: int, release: bool = True) -> bool:
        """Somebody no longer does; returns whether nobody does, and releases it then."""
        with self._lock:
            self._needs[adapter] -= 1
            if self._needs[adapter] > 0:
                return False
            del self._needs[adapter]
        if release:
            self.release(adapter)
        return True

    def needed(self, adapter: int) -> bool:
        """Whether anybody needs it."""
        with self._lock:
            return adapter in self._needs

    @contextmanager
    def held(self, adapter: int) -> Iterator[None]:
        """Somebody needs it meanwhile."""
        self.add(adapter)
        try:
            yield
        finally:
            self.drop(adapter)


class RequestStates(dict):
    """vLLM's table of a front end's requests, by their internal ids: each needs its adapter until
    it leaves the table. Outputs show the request's LoRA as the user gave it.

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
