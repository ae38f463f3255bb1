"""Reads adapters beside a worker's steps, and copies them to its device beside them."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from vllm.logger import init_logger
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.serving.hosted import Hosted, Loader
from vllm_adafuse.serving.page_step import PageStep
from vllm_adafuse.serving.pool import Place

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")
# Files of so many adapters are read at once: one may lie on a slow disk.
THREADS = 4


class Reads:
    """Adapters that are being read, by their ids.

    Args:
        loader: of the model.
        device: of the model; pinned memory is asked for on it.
    """

    def __init__(self, loader: Loader, device: torch.device):
        self._loader, self._device = loader, device
        self._threads = ThreadPoolExecutor(THREADS, "adafuse-read", self._begin)
        self._reads: dict[int, tuple[str, Future[Hosted]]] = {}

    def _begin(self) -> None:
        if self._device.type == "cuda":  # or memory would be pinned by way of the first device
            torch.cuda.set_device(self._device)

    def start(self, adapter: int, path: str) -> Future[Hosted]:
        """Reads an adapter, unless that is under way; its error is always an `AdapterError`."""
        known = self._reads.get(adapter)
        if known is None or known[0] != path:
            self._reads[adapter] = path, self._threads.submit(self._read, path)
        return self._reads[adapter][1]

    def forget(self, adapter: int) -> None:
        """Whoever wants the adapter from now on has it read anew."""
        self._reads.pop(adapter, None)

    def _read(self, path: str) -> Hosted:
        try:
            return self._loader.read(path)
        except AdapterError:
            raise
        # Other ranks must hear of any error, or would wait for this one.
        except Exception as e:
            logger.exception("AdaFuse: adapter %s could not be read", path)
            raise AdapterError(
                f"adapter {path}", [f"could not be read ({e!r}); the worker's log says where"]
            ) from e


class Uploads:
    """Copies adapters onto their pages, on a GPU on a stream of its own.

    Args:
        loader: of the model.
        step: its buffers.
        device: of the model.
    """

    def __init__(self, loader: Loader, step: PageStep, device: torch.device):
        self._loader, self._step = loader, step
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ends: dict[int, torch.cuda.Event] = {}

    def rehearse(self) -> None:
        """Has the device meet all that a load needs of it, before anybody waits for a step."""
        if self._stream is None:
            return
        self._loader.rehearse_stamp()
        with torch.cuda.stream(self._stream):
            self._loader.rehearse_write()

    def start(self, adapter: int, hosted: Hosted, place: Place) -> None:
        """Copies an adapter to where no later step reads before `finish`."""
        if self._stream is None:
            return self._loader.write(adapter, hosted, place, self._step)
        # Steps that were launched may read what lay there before.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._loader.write(adapter, hosted, place, self._step)
            self._ends[adapter] = torch.cuda.Event()
            self._ends[adapter].record()

    def finish(self, adapter: int) -> None:
        """What is launched from now on finds the adapter on its pages."""
        if (end := self._ends.pop(adapter, None)) is not None:
            torch.cuda.current_stream().wait_event(end)
