"""Files that a stranger wrote, opened and read where they can do no harm.

Every JSON file of an adapter, of another library's adapter and of a backbone comes through
`read_json`, every safetensors file through `vllm_adafuse.format.tensor_file`. Both refuse what is
no regular file, and take no more memory than their limits say.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import Any

from vllm_adafuse.errors import AdapterError
from vllm_adafuse.text import clip, show, some

# The largest configs that people have are some ten KiB, the largest indices of dense models some
# hundred.
MAX_CONFIG_BYTES, MAX_INDEX_BYTES = 1 << 20, 4 << 20
MAX_DEPTH = 64  # of objects and lists in each other
MAX_DIGITS = 1000  # of an integer; Python turns no more than 4300 into a number


class FileProblem(ValueError):
    """What is wrong with a file, as one sentence that names it."""


class LongInteger(str):
    """An integer of more than MAX_DIGITS digits, as it stands in the file."""


def where(path: str | Path) -> str:
    """A path to put into a message: printable, and short."""
    return clip("".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path)), 400)


def reason(e: Exception) -> str:
    """An exception's cause in a few words."""
    return clip(getattr(e, "strerror", None) or str(e), 200)


def open_regular(file: Path, missing: str = "missing") -> BufferedReader:
    """Opens a file to read, if it is one: a pipe or a device could block, or never end.

    Args:
        file: its path; links are followed.
        missing: what to say after its name where there is none.

    Raises:
        FileProblem: it is no regular file, or cannot be read.
    """
    try:
        # Asked before it is opened: opening a device may do something. Asked again afterwards:
        # another file may have taken its place.
        _refuse_irregular(file, os.stat(file).st_mode)
        opened = open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
        try:
            _refuse_irregular(file, os.fstat(opened.fileno()).st_mode)
        except FileProblem:
            opened.close()
            raise
        return opened
    except FileNotFoundError:
        raise FileProblem(f"{where(file)}: {missing}") from None
    except FileProblem:
        raise
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        raise FileProblem(
            f"{where(file)}: cannot be read ({reason(e)}), expected a readable file; check its "
            "permissions and links"
        ) from e


def _refuse_irregular(file: Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
    raise FileProblem(
        f"{where(file)}: is {kind}, expected a regular file; replace it with the file"
    )


def read_bytes(file: Path, most: int, missing: str = "missing") -> bytes:
    """A regular file of at most `most` bytes.

    Raises:
        FileProblem: it is no such file.
    """
    with open_regular(file, missing) as opened:
        size = os.fstat(opened.fileno()).st_size
        try:
            # What the system calls a file of 0 bytes may go on and on (/proc).
            content = opened.read(most + 1) if size <= most else b""
        except OSError as e:
            raise FileProblem(f"{where(file)}: cannot be read ({reason(e)})") from e
    if max(size, len(content)) > most:
        raise FileProblem(
            f"{where(file)}: is {max(size, len(content))} bytes long, expected at most {most}; is "
            "this another file under that name?"
        )
    return content


def read_json(
    file: Path, most: int = MAX_CONFIG_BYTES, missing: str = "missing"
) -> tuple[Any, list[str]]:
    """The value of a JSON file, and what is odd in it: keys twice, numbers that are none.

    Numbers stay as Python reads them (NaN and Inf too), but for integers of more than MAX_DIGITS
    digits, which become `LongInteger`.

    Args:
        file: its path.
        most: its largest size in bytes.
        missing: what to say after its name where there is none.

    Returns:
        The value; one sentence for each oddity. A caller that lets one pass must know why.

    Raises:
        FileProblem: there is no such file, or it is not JSON.
    """
    content = read_bytes(file, most, missing)
    repeated: dict[str, None] = {}
    try:
        text = content.decode("utf-8")
        value = parse_json(text, repeated)
    except RecursionError:
        raise FileProblem(_too_deep(file, text)) from None
    except ValueError as e:
        raise FileProblem(
            f"{where(file)}: is not valid JSON ({reason(e)}), expected a UTF-8 JSON object; mend it"
        ) from e
    return value, [*_twice(file, repeated), *_odd(file, value)]


def read_object(file: Path, subject: str, most: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object of a JSON file that must be in order.

    Args:
        file: its path.
        subject: whose file it is, for the error ("backbone DIR").
        most: its largest size in bytes.

    Raises:
        AdapterError: there is none, or something in it is odd.
    """
    try:
        value, problems = read_json(file, most)
    except FileProblem as e:
        raise AdapterError(subject, [str(e)]) from e
    if not problems and not isinstance(value, dict):
        problems = [
            f"{where(file)}: holds a {type(value).__name__}, expected a JSON object; mend it"
        ]
    if problems:
        raise AdapterError(subject, problems)
    return value


def parse_json(text: str, repeated: dict[str, None]) -> Any:
    """`json.loads`, with the keys that stand twice in one object added to `repeated`."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(items)
        if len(made) < len(items):
            seen: set[str] = set()
            repeated.update({key: None for key, _ in items if key in seen or seen.add(key)})
        return made

    def integer(digits: str) -> int | LongInteger:
        return int(digits) if len(digits) <= MAX_DIGITS else LongInteger(digits)

    return json.loads(text, object_pairs_hook=pairs, parse_int=integer)


def _twice(file: Path, repeated: dict[str, None]) -> list[str]:
    if not repeated:
        return []
    return [f"{file.name}: key `{some(list(repeated))}` stands there twice; keep one"]


def _odd(file: Path, value: Any) -> list[str]:
    """Numbers that are none, integers beyond any use, and values that are nested without end."""
    problems = []
    for keys, found in islice(_oddities(value), 10):
        if isinstance(found, LongInteger):
            text = f"an integer of {len(found)} digits, expected at most {MAX_DIGITS}"
        elif isinstance(found, float):
            text = f"{show(found)}, expected a finite number"
        elif isinstance(found, str):
            text = f"{show(found)}, expected text: it holds half a character"
        else:
            text = f"nested more than {MAX_DEPTH} levels deep"
        problems.append(f"{file.name}: `{_path(keys)}` is {text}; correct it or leave it out")
    return problems


def _oddities(value: Any) -> Iterator[tuple[list, Any]]:
    """(keys that lead there, value) of what is odd, without recursion."""
    keys, levels = [None], [iter([(None, value)])]
    while levels:
        for key, found in levels[-1]:
            keys[-1] = key
            if isinstance(key, str) and not _is_text(key):
                yield keys[1:], key
            if isinstance(found, (dict, list)) and len(levels) <= MAX_DEPTH:
                inside: Iterable = found.items() if isinstance(found, dict) else enumerate(found)
                levels.append(iter(inside))
                keys.append(None)
                break
            if (
                isinstance(found, (dict, list, LongInteger))
                or (isinstance(found, float) and not math.isfinite(found))
                or (isinstance(found, str) and not _is_text(found))
            ):
                yield keys[1:], found
        else:
            levels.pop()
            keys.pop()


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair: no file could hold it
        return False
    return True


def _path(keys: list) -> str:
    return show(".".join(map(str, keys[:4])) + (" …" if len(keys) > 4 else ""))[1:-1]


def _too_deep(file: Path, text: str) -> str:
    """Names the key under which a text is nested too deep for the parser."""
    depth, last = 0, ""
    for match in re.finditer(r'"((?:[^"\\]|\\.)*)"\s*(:?)|[\[\]{}]', text):
        if match[0] in "[{":
            depth += 1
        elif match[0] in "]}":
            depth -= 1
        elif depth == 1 and match[2]:
            last = match[1]
        if depth > MAX_DEPTH:
            break
    key = f"`{show(last)[1:-1]}` is " if last else ""
    return (
        f"{where(file)}: is not valid JSON ({key}nested more than {MAX_DEPTH} levels deep), "
        "expected a UTF-8 JSON object; mend it"
    )
