"""Which experts the tokens of an ended request took, for `/metrics`.

A mixture's routes follow from token ids: by its passports, or, where its router sees the past, by two
tables. The worker that made them leaves a copy beside what it counts (`meter.py`); the front end asks
it when requests have ended, and no step takes part. Routers inside the layers have no tables.

A file is `<engine>/<content hash>.<E>.<k>.<fading>.npy`: expert ids [k, V], or w and c [2, V, E] float32, see
`context_routes`; the terms of a token lie together. It is mapped, not read, and outlives its removal for who
has it mapped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from vllm_adafuse.format.config import AdapterConfig
from vllm_adafuse.kernels.context_routes import faded_counts, faded_sums, fading_of
from vllm_adafuse.serving.scratch import lacks, private

# Tables that stay for requests which end after their adapter has gone, and seconds for which any does:
# a front end counts a moment after a request's end.
KEPT, LINGERS = 16, 10.0
# Tables that a front end has mapped at a time.
MAPPED = 64
# Ids whose terms are turned at a time when a table is written.
STRETCH = 1 << 12


class Tables:
    """The files of one worker.

    Args:
        place: `scratch.place_of` the worker; None writes nothing.
    """

    def __init__(self, place: Path | None):
        self.place = place
        self._gone: dict[str, float] = {}  # content hash -> since when

    def leave(
        self, content: str, config: AdapterConfig | None, columns: Sequence[torch.Tensor] | None
    ) -> None:
        """Writes the table of an adapter, or replaces it.

        Args:
            content: hash of the adapter; of one without nothing is written.
            config: of a mixture.
            columns: of its router, see `Router.columns`.
        """
        self._gone.pop(content, None)
        if self.place is None or config is None or columns is None or not content:
            return
        experts, top_k, fading = config.num_experts, config.top_k, 0.0
        if config.router_context:
            turned = [t.cpu().view(torch.float32).numpy().T for t in columns]
            shape, fading = (2, *turned[0].shape), fading_of(config.context_half_life)
            # Not whole: of many experts they are large.
            parts = [t[i : i + STRETCH] for t in turned for i in range(0, len(t), STRETCH)]
        else:
            parts = [columns[0].cpu().numpy().astype(np.min_scalar_type(experts))]
            shape = parts[0].shape
        described = {"descr": parts[0].dtype.str, "fortran_order": False, "shape": shape}
        file = self.place / f"{content}.{experts}.{top_k}.{fading!r}.npy"
        try:
            private(self.place.parent)
            self.place.mkdir(exist_ok=True)
            part = file.with_suffix(".part")
            with part.open("wb") as out:
                np.lib.format.write_array_header_1_0(out, described)
                for one in parts:
                    out.write(np.ascontiguousarray(one).data)
            part.replace(file)
        except OSError as e:
            lacks("the experts'", e)
            # Nothing is kept of a place that may be full; and after new weights tables would tell of
            # old routes.
            shutil.rmtree(self.place, ignore_errors=True)
            self.place = None

    def forget(self, content: str) -> None:
        """An adapter has gone; its table stays for a while."""
        now = time.monotonic()
        self._gone.setdefault(content, now)
        for old, since in list(self._gone.items())[:-KEPT]:
            if now - since < LINGERS:
                break
            del self._gone[old]
            for file in self.place.glob(f"{old}.*.npy") if self.place else ():
                file.unlink(missing_ok=True)


class _Mapped(NamedTuple):
    """A table, and the file that it is of."""

    file: Path
    state: tuple[int, int]
    table: np.ndarray


class Experts:
    """Counts by the tables of the engines that a front end serves."""

    def __init__(self) -> None:
        self._mapped: dict[str, _Mapped] = {}  # content hash -> table, the one used last at the end
        self._lock = Lock()

    def count(
        self, folders: Iterable[Path], content: str, *requests: Sequence[int] | np.ndarray
    ) -> np.ndarray | None:
        """How many tokens of requests took each expert.

        Args:
            folders: `scratch.directory_of` the engines.
            content: hash of the requests' adapter.
            requests: ids of the tokens of each, from its first on.

        Returns:
            [E] int64, which add up to k for each token; None: nobody left a table of the adapter.
        """
        with self._lock:
            mapped = self._find(folders, content)
        if mapped is None:
            return None
        _, experts, top_k, fading = mapped.file.stem.split(".", 3)
        table = mapped.table
        if table.ndim == 2:
            chosen = table.take(np.concatenate(requests), 1, mode="clip")
            return np.bincount(chosen.ravel(), minlength=int(experts))
        counts = np.zeros(int(experts), np.int64)
        lengths = torch.arange(1, max(map(len, requests)) + 1)
        said = faded_counts(lengths, float(fading)).numpy()
        for ids in requests:  # each has a past of its own
            chosen = _by_past(table, np.asarray(ids), int(top_k), float(fading), said)
            counts += np.bincount(chosen.ravel(), minlength=len(counts))
        return counts

    def _find(self, folders: Iterable[Path], content: str) -> _Mapped | None:
        known = self._mapped.pop(content, None)
        others = (f for folder in sorted(folders) for f in folder.glob(f"*/{content}.*.npy"))
        for file in chain([known.file] if known else [], others):
            try:
                found = file.stat()
                state = found.st_ino, found.st_mtime_ns
                if known is None or known.state != state:
                    table = np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray)
                    known = _Mapped(file, state, table)
                break
            except FileNotFoundError:  # removed: of another engine, or as it was
                continue
        if known is not None:
            self._mapped[content] = known
            if len(self._mapped) > MAPPED:
                del self._mapped[next(iter(self._mapped))]
        return known


def _by_past(
    table: np.ndarray, ids: np.ndarray, top_k: int, fading: float, counts: np.ndarray
) -> np.ndarray:
    """As `context_routes` chooses: [T, k]. `counts`: `faded_counts` of 1, 2, …, at least T."""
    w, c = table.take(ids, 1, mode="clip")
    said = faded_sums(torch.from_numpy(c), fading).numpy()
    z = said / -counts[: len(ids), None] - w
    return np.argpartition(z, top_k - 1, axis=1)[:, :top_k]
