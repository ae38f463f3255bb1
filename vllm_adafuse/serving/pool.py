"""Which adapters lie in the pool of pages, and where: bookkeeping on the host, no tensors.

A page holds 16 ranks of every adapted projection. The adapters of a step must lie in the pool all
at once; those used least recently make room. Every rank of tensor parallelism decides the same,
since all see the same requests in the same order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vllm_adafuse.kernels.configs import PAGE_RANKS

# Columns of passports that are reserved: so many for each adapter of a step, within these limits.
COLUMNS_PER_ADAPTER, MIN_COLUMNS, MAX_COLUMNS = 4, 8, 256


@dataclass(frozen=True)
class Size:
    """What an adapter takes: pages, columns of passports (k of a mixture, 0 of a LoRA), and 1 of
    vLLM's own slots if it has a rest (`plain_loras.py`)."""

    pages: int
    columns: int = 0
    rests: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(
            self.pages + other.pages, self.columns + other.columns, self.rests + other.rests
        )

    def within(self, other: Size) -> bool:
        return (
            self.pages <= other.pages
            and self.columns <= other.columns
            and self.rests <= other.rests
        )


@dataclass(frozen=True)
class Place:
    """Where an adapter lies: its pages, in the order of its experts, and its columns. In which slot
    its rest lies, vLLM knows."""

    pages: tuple[int, ...]
    columns: tuple[int, ...] = ()
    rests: int = 0

    @property
    def size(self) -> Size:
        return Size(len(self.pages), len(self.columns), self.rests)

    @property
    def slot(self) -> int:
        """The number by which the step's tokens name it: no other adapter has that page."""
        return self.pages[0]


def pages_of_rank(rank: int) -> int:
    """Pages of an expert of so many ranks."""
    return -(-rank // PAGE_RANKS)


def pool_size(max_loras: int, max_lora_rank: int) -> Size:
    """What vLLM's --max-loras and --max-lora-rank ask for: each adapter's in whole pages."""
    columns = min(MAX_COLUMNS, max(MIN_COLUMNS, COLUMNS_PER_ADAPTER * max_loras))
    return Size(max_loras * pages_of_rank(max_lora_rank), columns)


def total(sizes: Iterable[Size]) -> Size:
    """What adapters take together."""
    return sum(sizes, Size(0))


def misfits(size: Size, max_loras: int, max_lora_rank: int) -> list[str]:
    """Why an adapter cannot lie in the pool even alone, each with the way out; empty if it can.
    Beside others it waits for room, see `serving/waiting.py`.

    Args:
        size: of the adapter.
        max_loras: vLLM's option; with `max_lora_rank` it says how large the pool is.
        max_lora_rank: likewise.
    """
    have, problems = pool_size(max_loras, max_lora_rank), []
    if size.pages > have.pages:
        problems.append(
            f"takes {size.pages} pages of {PAGE_RANKS} ranks, and the pool has {have.pages}: raise "
            f"--max-lora-rank or --max-loras until their product, of ranks in whole pages, is "
            f"{size.pages * PAGE_RANKS} or more (it is {have.pages * PAGE_RANKS})"
        )
    if size.columns > have.columns:
        way = f"raise --max-loras to {-(-size.columns // COLUMNS_PER_ADAPTER)} or more"
        if size.columns > MAX_COLUMNS:
            way = f"an adapter of a request can have {MAX_COLUMNS}; serve it by hf_overrides"
        problems.append(
            f"takes {size.columns} columns of passports (its experts per token, or with "
            f"`router.context` all of its experts), and {have.columns} are reserved: {way}"
        )
    return problems


class Pool:
    """Places of adapters, by their ids.

    Args:
        size: what there is.

    Attributes:
        placed: id -> place, the one used least recently first.
        pinned: ids that are the last to make room.
    """

    def __init__(self, size: Size):
        self.size = size
        self.placed: OrderedDict[int, Place] = OrderedDict()
        self.pinned: set[int] = set()

    @property
    def taken(self) -> Size:
        return total(place.size for place in self.placed.values())

    def hold(self, wanted: Mapping[int, Size]) -> list[int]:
        """Gives all of these adapters places; others make room where they must.

        Args:
            wanted: id -> size; together within the pool.

        Returns:
            The ids that were not there before: their pages are to be written.

        Raises:
            ValueError: together they are larger than the pool; nothing has changed then.
        """
        needed = total(wanted.values())
        if not needed.within(self.size):
            raise ValueError(f"{needed} does not fit into {self.size}")
        new = [i for i in wanted if i not in self.placed]
        for adapter in wanted:
            if adapter in self.placed:
                self.placed.move_to_end(adapter)
        for adapter in new:
            while (place := self._find(wanted[adapter])) is None:
                self.release(self._victim(wanted))
            self.placed[adapter] = place
        return new

    def release(self, adapter: int) -> bool:
        """Takes an adapter's place away; returns whether it had one."""
        return self.placed.pop(adapter, None) is not None

    def _victim(self, wanted: Mapping[int, Size]) -> int:
        others = [i for i in self.placed if i not in wanted]
        return next((i for i in others if i not in self.pinned), others[0])

    def _find(self, size: Size) -> Place | None:
        places = self.placed.values()
        pages = _free(self.size.pages, [p for place in places for p in place.pages])
        columns = _free(self.size.columns, [c for place in places for c in place.columns])
        if not size.within(Size(len(pages), len(columns), self.size.rests - self.taken.rests)):
            return None
        return Place(
            tuple(pages[: size.pages]), tuple(columns[: size.columns]), size.rests
        )


def _free(count: int, used: list[int]) -> list[int]:
    """Which of so many are not used, in rising order."""
    taken = set(used)
    return [i for i in range(count) if i not in taken]
