"""Where a worker leaves files for the server that answers `/metrics`, in the temporary directory; and
threads for what either does beside its work."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.util import Finalize
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from vllm.logger import init_logger

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")
# Between something to do and what `Soon` does of it.
SECONDS = 1.0


def directory_of(vllm_config: Any) -> Path:
    """Of an engine: all its processes have its instance's id."""
    whose = f"{os.getuid()}-{str(vllm_config.instance_id).partition('_dp')[0]}"
    return Path(tempfile.gettempdir()) / f"vllm-adafuse-{whose}"


def place_of(vllm_config: Any) -> Path | None:
    """Of a worker, a path without suffix in that directory; removed when its process ends by itself.

    Returns:
        None: what the first rank leaves stands for this one too.
    """
    parallel = vllm_config.parallel_config
    if parallel.rank != 0:
        return None
    # vLLM runs engines of a dense model that share data as instances of their own.
    engine = str(vllm_config.instance_id).partition("_dp")[2] or parallel.data_parallel_rank
    return _removed_at_end(directory_of(vllm_config) / str(engine))


@functools.cache
def _removed_at_end(place: Path) -> Path:
    # Workers are processes of multiprocessing, in which nothing of atexit is run.
    Finalize(None, _remove, (place,), exitpriority=0)
    return place


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    with contextlib.suppress(OSError):  # other engines need the directory, or it is gone
        place.with_suffix(".json").unlink(missing_ok=True)
        place.parent.rmdir()


class Beside:
    """A thread that does what nobody is to wait for, one after the other. What goes wrong is said, and
    serving goes on.

    Args:
        name: of the thread.
        missing: what `/metrics` may lack then.
    """

    def __init__(self, name: str, missing: str):
        self._thread, self._missing = ThreadPoolExecutor(1, name), missing

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """Calls a function there, behind all that was submitted before."""
        done = self._thread.submit(function, *arguments)
        done.add_done_callback(self._tell)
        return done

    def _tell(self, done: Future) -> None:
        if (error := done.exception()) is not None:
            _tell(self._missing, error)


class Soon:
    """A thread that calls a function some time after there is something to do for it, so that much is
    done at a time. Errors as of `Beside`. It ends with its process, whatever is left to do.

    Args:
        name, missing: as of `Beside`.
        function: does all that there is to do.
    """

    def __init__(self, name: str, missing: str, function: Callable[[], None]):
        self._name, self._missing, self._function = name, missing, function
        self._due, self._hurry, self._lock = Event(), Event(), Lock()
        self._thread: Thread | None = None

    def due(self, at_once: bool = False) -> None:
        """There is something to do, within `SECONDS` or at once. Costs next to nothing, and never fails."""
        if at_once:
            self._hurry.set()
        if not self._due.is_set():
            self._due.set()
            self._begin()

    def _begin(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # as after a fork
                self._thread = Thread(target=self._run, name=self._name, daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as e:  # as many threads as there may be
                    _tell(self._missing, e)

    def _run(self) -> None:
        while True:
            self._due.wait()
            self._hurry.wait(SECONDS)
            # Before the call: what comes during it is for the next.
            self._hurry.clear()
            self._due.clear()
            try:
                self._function()
            except Exception as e:  # noqa: BLE001
                _tell(self._missing, e)


def _tell(missing: str, error: BaseException) -> None:
    logger.error("AdaFuse: /metrics may lack %s: %r", missing, error)


def private(folder: Path) -> None:
    """Makes a directory for this user alone.

    Raises:
        OSError: it cannot be made, or another user has it.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")


def lacks(what: str, error: OSError) -> None:
    """Warns that a file could not be left; serving goes on."""
    logger.warning(
        "AdaFuse: /metrics lacks %s: %s; set TMPDIR to a folder that can be written", what, error
    )
