"""What a mutant is; those there are stand in catalogue.py, serving.py and production.py."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault and who sees it.

    Attributes:
        name: by which it is told.
        file: relative to the root.
        old: text that stands in the file exactly once.
        new: what stands there instead.
        test: the test, or several separated by spaces, as pytest is given them; one must fail.
        why: what would go wrong.
        gpu: the test needs a GPU; skipped, and not counted, where there is none.
    """

    name: str
    file: str
    old: str
    new: str
    test: str
    why: str
    gpu: bool = False
