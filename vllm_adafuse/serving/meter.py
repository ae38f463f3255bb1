"""What a worker counts of the adapters that requests choose, left where `/metrics` finds it.

The worker is another process than the server that answers `/metrics`. It writes a small file when an
adapter comes or goes, and never in a step in which none does; the server reads it when it is
scraped (`serving/metrics.py`). What experts mixtures give to tokens lies beside it (`expert_tables.py`).
"""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_adafuse.serving.adapters import split_path
from vllm_adafuse.serving.expert_tables import Tables
from vllm_adafuse.serving.scratch import Beside, lacks, place_of, private


@dataclass
class Counts:
    """What is written.

    Attributes:
        pages, pages_used: of the pool.
        loads, load_seconds: adapters read from their files, and how long that took, waits for the
            files and for other ranks included.
        failures: adapters that could not be read.
        uploads: adapters copied to the device.
        evictions: adapters that made room there for others.
        adapters: lora_int_id -> name, kind, content hash and pages of what is in host memory.
    """

    pages: int = 0
    pages_used: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    failures: int = 0
    uploads: int = 0
    evictions: int = 0
    adapters: dict[int, dict[str, Any]] = field(default_factory=dict)


class Meter:
    """The counts of one worker. Those of the first rank stand for all: they do the same.

    Args:
        vllm_config: of the engine.
        pages: of the pool.
    """

    def __init__(self, vllm_config: Any, pages: int):
        self.counts, self._began = Counts(pages=pages), {}
        place = place_of(vllm_config)
        self.file, self.tables = place and place.with_suffix(".json"), Tables(place)
        self._writer = Beside("adafuse-tables", "experts of an adapter")
        self.write()

    def begin(self, adapter: int) -> None:
        """An adapter is being read; may be said again until it is."""
        self._began.setdefault(adapter, time.monotonic())

    def loaded(self, request: Any, hosted: Any) -> None:
        """It is in host memory."""
        self.counts.loads += 1
        self.counts.load_seconds += time.monotonic() - self._began.pop(request.lora_int_id)
        self.counts.adapters[request.lora_int_id] = {
            "name": request.lora_name, "kind": hosted.kind, "pages": hosted.size.pages,
            "content": split_path(request.lora_path)[1] or "",
        }  # fmt: skip
        self.write()

    def leave_table(self, content: str, hosted: Any) -> Future:
        """What an adapter's router says of token ids is known, or is another. Of many experts that is
        too much to write between two steps: it is done when the result is there; at once of an adapter
        that has no table, for which nobody is to ask again."""
        if hosted.passports is None:
            done: Future = Future()
            done.set_result(None)
            return done
        return self._writer.submit(self.tables.leave, content, hosted.config, hosted.passports)

    def stamped(self, adapter: int, hosted: Any) -> None:
        """`leave_table` of an adapter that is in host memory."""
        self.leave_table(self.counts.adapters[adapter]["content"], hosted)

    def failed(self, adapter: int) -> None:
        """It could not be read."""
        self._began.pop(adapter, None)
        self.counts.failures += 1
        self.write()

    def moved(self, used: int, uploads: int = 0, evictions: int = 0) -> None:
        """Adapters came to the device or went; `used` pages are taken now."""
        self.counts.pages_used = used
        self.counts.uploads += uploads
        self.counts.evictions += evictions
        self.write()

    def forgot(self, adapter: int) -> None:
        """An adapter is no longer in host memory, or on its way there."""
        self._began.pop(adapter, None)
        gone = self.counts.adapters.pop(adapter, None)
        if gone is not None:
            self.write()
            if gone["content"] not in {one["content"] for one in self.counts.adapters.values()}:
                self._writer.submit(self.tables.forget, gone["content"])

    def write(self) -> None:
        """Replaces the file. Where there is no place for it the metrics lack, and serving goes on."""
        if self.file is None:
            return
        try:
            private(self.file.parent)
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(asdict(self.counts)), encoding="utf-8")
            part.replace(self.file)
        except OSError as e:
            lacks("the pool's", e)
            self.file = None
