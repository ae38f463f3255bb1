"""What strangers wrote, in messages and on a terminal: safe to print, and not too long."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import Any


def show(value: Any) -> str:
    """A value out of a file as short ASCII JSON: safe to print, whatever it holds."""
    try:
        # Not all of a long text or list, only to cut it off afterwards.
        text = json.dumps(value[:80] if isinstance(value, (str, list)) else value, default=str)
    except RecursionError:
        return "a deeply nested value"
    except ValueError:  # an integer of more digits than Python turns into text
        return "a huge number"
    return text if len(text) <= 80 else text[:77] + "..."


def clip(text: str, most: int) -> str:
    """A text of at most `most` characters: what is too long loses its middle."""
    if len(text) <= most:
        return text
    half = (most - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def clip_all(problems: list[str], most: int = 1000, lines: int = 25) -> list[str]:
    """Problems to print: none longer than `most`, and no more than `lines` of them."""
    short = [clip(problem, most) for problem in problems[:lines]]
    if len(problems) > lines:
        short.append(f"and {len(problems) - lines} more problems")
    return short


def some(names: Sequence[str]) -> str:
    """The first names of a list that may be long; "a, b, c and 12 more"."""
    listed = [show(name)[1:-1] for name in names[:3]]
    return ", ".join(listed) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def printable(text: str) -> str:
    """One line without control characters: names in an adapter are written by strangers."""
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c
        for c in text
    )


def visible(text: str, breaks: bool = False) -> str:
    """The text with its white space made visible.

    Args:
        text: a token's text.
        breaks: also break the line after each newline's sign.
    """
    newline = "↵\n" if breaks else "↵"
    signs = {" ": "·", "\n": newline, "\t": "→"}
    return "".join(signs.get(c) or printable(c) for c in text)
