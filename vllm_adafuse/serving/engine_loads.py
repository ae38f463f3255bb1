"""Has an engine load and forget adapters for its front end.

A worker reads an adapter beside its steps (`serving/reads.py`), so the engine is asked until it
says that it has it. Then requests may name it: none waits in a step for a file, and whoever names
what cannot be read is told, not the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from vllm.logger import init_logger
from vllm_adafuse.serving.holds import Holds
from vllm_adafuse.serving.versions import AdapterRefused

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")
# Seconds between two questions, the first and the longest.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.032


class EngineLoads:
    """Of an engine that is called and answers.

    Args:
        core: vLLM's client of the engine's core.
        holds: who needs which adapter.
    """

    def __init__(self, core: Any, holds: Holds):
        self.core, self.holds = core, holds
        holds.forget = self.forget

    def load(self, stamped: Any) -> None:
        """Has the engine read an adapter, unless it has it.

        Args:
            stamped: a `LoRARequest` with its version, which somebody needs (`Holds`).

        Raises:
            AdapterRefused: the worker cannot serve it.
        """
        try:
            for pause in _pauses():
                if self.core.add_lora(stamped):
                    break
                time.sleep(pause)
        except Exception as e:
            self._refused(stamped.lora_int_id, e)
        self.holds.loaded(stamped.lora_int_id)

    def _refused(self, adapter: int, error: Exception) -> None:
        """Raises an engine's error; a worker's own refusal, which may cross processes as text, as
        the request's fault."""
        self.holds.gone(adapter)
        if (refusal := AdapterRefused.from_text(str(error))) is None:
            raise error
        raise refusal from error

    def forget(self, adapter: int) -> None:
        """Has the engine forget an adapter that no request has."""
        if adapter in self.holds.resident:
            self.holds.gone(adapter)
            self.core.remove_lora(adapter)


class AsyncEngineLoads(EngineLoads):
    """Of one that is awaited, on the running event loop."""

    def __init__(self, core: Any, holds: Holds):
        super().__init__(core, holds)
        self._loop = asyncio.get_running_loop()
        self._loads: dict[int, asyncio.Task] = {}
        self._removals: set[asyncio.Task] = set()

    async def load_beside(self, stamped: Any) -> None:
        """`load`; those who want the same adapter at once wait for one load of it."""
        adapter, self._loop = stamped.lora_int_id, asyncio.get_running_loop()
        if adapter not in self._loads:
            task = self._loads[adapter] = asyncio.create_task(self._ask(stamped))
            task.add_done_callback(lambda _: self._loads.pop(adapter))
        await asyncio.shield(self._loads[adapter])

    async def _ask(self, stamped: Any) -> None:
        try:
            for pause in _pauses():
                if await self.core.add_lora_async(stamped):
                    break
                await asyncio.sleep(pause)
        except Exception as e:
            self._refused(stamped.lora_int_id, e)
        self.holds.loaded(stamped.lora_int_id)

    def forget(self, adapter: int) -> None:
        """As above, soon, unless a request has it by then; from any thread."""
        if adapter in self.holds.resident and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._remove_soon, adapter)

    def _remove_soon(self, adapter: int) -> None:
        if adapter in self.holds.resident and not self.holds.in_use(adapter):
            self.holds.gone(adapter)
            task = self._loop.create_task(self._remove(adapter))
            self._removals.add(task)  # the loop itself keeps weak references
            task.add_done_callback(self._removals.discard)

    async def _remove(self, adapter: int) -> None:
        try:
            await self.core.remove_lora_async(adapter)
        except Exception as e:  # of an engine that has died or is shutting down
            logger.warning("AdaFuse: adapter %d could not be unloaded: %s", adapter, e)


def _pauses() -> Iterator[float]:
    pause = FIRST_PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_S)
