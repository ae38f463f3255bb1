"""The values of an adapter's tensors, read once and piece by piece: finite, zero past a rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from vllm_adafuse.format.config import WEIGHTS_FILE, AdapterConfig
from vllm_adafuse.format.layout import past_ranks
from vllm_adafuse.format.reading import FileProblem
from vllm_adafuse.format.tensor_file import TORCH_DTYPES, Entry, TensorFile
from vllm_adafuse.text import show, some


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch from starting OpenMP's threads: vLLM may fork this process afterwards, and a
    child that inherits OpenMP without its threads hangs at its first parallel loop."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf. A sum tells it in a twentieth of the time that it takes to
    look at each, unless finite values overflow it."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return bool(values.sum(dtype=wide).isfinite()) or bool(values.isfinite().all())


@one_thread()
def check_values(
    weights: TensorFile, names: Iterable[str], config: AdapterConfig | None
) -> list[str]:
    """Problems of values: NaN, Inf, and what is not zero past its expert's rank.

    Args:
        weights: the file.
        names: tensors of it in a float dtype whose shapes are right.
        config: of the adapter; None where it is broken, and no rank is known.
    """
    problems = []
    try:
        for name in sorted(names):
            entry = weights.entries[name]
            bad, first = _count_bad(weights, entry)
            if bad:
                problems.append(
                    f"{WEIGHTS_FILE}: tensor {some([name])} has {bad} values that are NaN or Inf, "
                    f"the first at {_place(first, entry.shape)}, expected finite numbers; train or "
                    "save it again"
                )
            for e, r in _past_ranks(weights, name, entry, config) if config else ():
                problems.append(
                    f"{WEIGHTS_FILE}: tensor {name} is not zero past rank {r} of expert {e} "
                    f"({show(config.expert_names[e])[1:-1]}), expected zeros; set r to its real "
                    "rank or clear it"
                )
    except FileProblem as e:
        problems.append(str(e))
    return problems


def _count_bad(weights: TensorFile, entry: Entry) -> tuple[int, int]:
    """How many values are not finite; the index of the first."""
    count, first, seen = 0, 0, 0
    for piece in weights.pieces(entry.start, entry.end, TORCH_DTYPES[entry.dtype]):
        if not all_finite(piece):
            finite = piece.isfinite()
            if not count:
                first = seen + int((~finite).nonzero()[0])
            count += int((~finite).sum())
        seen += len(piece)
    return count, first


def _place(index: int, shape: tuple[int, ...]) -> list[int]:
    """A flat index as one for each dimension."""
    place = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        place.append(at)
    return place[::-1]


def _past_ranks(
    weights: TensorFile, name: str, entry: Entry, config: AdapterConfig
) -> Iterator[tuple[int, int]]:
    """Experts with values past their rank, and that rank."""
    dtype = TORCH_DTYPES[entry.dtype]
    size = math.prod(entry.shape[1:]) * dtype.itemsize
    for expert, rank, side in past_ranks(name, entry.shape, config):
        start = entry.start + expert * size
        if side == "A":  # [rank, in]: rows at the end
            skip = rank * entry.shape[2] * dtype.itemsize
            pieces = weights.pieces(start + skip, start + size, dtype)
            past = any(bool(piece.any()) for piece in pieces)
        else:  # [out, rank]: the end of each row
            width = entry.shape[2]
            pieces = weights.pieces(start, start + size, dtype, width)
            past = any(bool(piece.view(-1, width)[:, rank:].any()) for piece in pieces)
        if past:
            yield expert, rank
