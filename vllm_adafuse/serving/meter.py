"""What a worker counts of the adapters that requests choose, left where `/metrics` finds it.

The worker is another process than the server that answers `/metrics`. It writes a small file when an
adapter comes or goes, and never in a step in which none does; the server reads it when it is
scraped (`serving/metrics.py`).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm_adafuse.serving.adapters import split_path

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")


def directory_of(vllm_config: Any) -> Path:
    """Where the workers of an engine leave their files: all its processes have its instance's id."""
    whose = f"{os.getuid()}-{str(vllm_config.instance_id).partition('_dp')[0]}"
    return Path(tempfile.gettempdir()) / f"vllm-adafuse-{whose}"


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
        parallel = vllm_config.parallel_config
        self.counts, self._began = Counts(pages=pages), {}
        self.file: Path | None = None
        if parallel.rank == 0:
            # vLLM runs engines of a dense model that share data as instances of their own.
            engine = str(vllm_config.instance_id).partition("_dp")[2] or parallel.data_parallel_rank
            self.file = directory_of(vllm_config) / f"{engine}.json"
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
        """An adapter is no longer in host memory."""
        if self.counts.adapters.pop(adapter, None) is not None:
            self.write()

    def write(self) -> None:
        """Replaces the file. Where there is no place for it the metrics lack, and serving goes on."""
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(mode=0o700, exist_ok=True)
            if self.file.parent.stat().st_uid != os.getuid():
                raise PermissionError(f"{self.file.parent} belongs to another user")
            part = self.file.with_suffix(".part")
            part.write_text(json.dumps(asdict(self.counts)), encoding="utf-8")
            part.replace(self.file)
        except OSError as e:
            logger.warning(
                "AdaFuse: /metrics lacks the pool's: %s; set TMPDIR to a folder that can be written", e
            )
            self.file = None
