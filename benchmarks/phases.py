"""What a benchmark's time goes to: a line for each phase, as it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def told(name: str, seconds: float) -> None:
    """Prints the line of a phase."""
    print(f"phase    {name:24} {seconds:7.1f} s", flush=True)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """This block is a phase, also if it fails; those of several threads may overlap."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        told(name, time.perf_counter() - begin)


def imported() -> None:
    """What this process did until now, of which most is to import, was a phase."""
    told("imports", time.time() - psutil.Process().create_time())
