"""Files of JSON objects, one a line, over several, or a list; errors name the line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.reading import FileProblem, open_regular, parse_json
from vllm_adafuse.text import show, some

# What a file that is no text begins with, and what to do.
MAGIC = {
    b"\x1f\x8b": "is compressed by gzip; unpack it first: gunzip FILE",
    b"PK\x03\x04": "is a zip archive; unpack it first: unzip FILE",
    b"BZh": "is compressed by bzip2; unpack it first: bunzip2 FILE",
    b"\xfd7zXZ\x00": "is compressed by xz; unpack it first: unxz FILE",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it first: unzstd FILE",
    b"PAR1": "is in Parquet; write it as jsonl first, as by pandas.DataFrame.to_json(lines=True)",
    b"ARROW1": "is in Arrow; write it as jsonl first, as by datasets.Dataset.to_json",
    codecs.BOM_UTF32_LE: "is in UTF-32; save it as UTF-8: iconv -f UTF-32 -t UTF-8 FILE",
    codecs.BOM_UTF32_BE: "is in UTF-32; save it as UTF-8: iconv -f UTF-32 -t UTF-8 FILE",
    codecs.BOM_UTF16_LE: "is in UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE",
    codecs.BOM_UTF16_BE: "is in UTF-16; save it as UTF-8: iconv -f UTF-16 -t UTF-8 FILE",
}
SHAPES = (
    '{"text": …}, {"messages": [{"role": …, "content": …}, …]} or '
    '{"prompt": …, "completion": …} (Alpaca\'s and ShareGPT\'s keys are understood too)'
)
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Bad(ValueError):
    """What is wrong with a line."""


def read_objects(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | Bad]]:
    """The objects of a file with the lines on which they begin; empty lines are skipped.

    One object a line (jsonl); or, where the first line is no value by itself, objects or lists of
    objects over any number of lines.

    Args:
        path: a regular file in UTF-8, with a byte order mark or none, lines ended in any way.

    Yields:
        line number from 1; the object, or what is wrong there.

    Raises:
        AdapterError: the file is not there, or no text.
    """
    content = _content(Path(path))
    lines = re.split(rb"\r\n|\n|\r", content)
    numbered = [(number, line) for number, line in enumerate(lines, 1)
                if line.removeprefix(codecs.BOM_UTF8).strip()]  # fmt: skip
    if numbered and _over_lines(numbered[0][1], content):
        yield from _stream(content)
        return
    for number, line in numbered:
        try:
            yield number, _object(_decode(line.removeprefix(codecs.BOM_UTF8)))
        except Bad as e:
            yield number, e


def _content(path: Path) -> bytes:
    def refused(said: str) -> AdapterError:
        return AdapterError("training data", [f"{path}: {said.replace('FILE', path.name)}"])

    if path.is_dir():
        held = sorted(p.name for p in path.iterdir() if p.suffix in (".jsonl", ".json"))
        holds = f"; it holds {some(held)}" if held else ""
        raise refused(f"is a directory, expected a jsonl file{holds}; name files")
    try:
        with open_regular(path, "cannot be read (no such file)") as file:
            content = file.read()
    except FileProblem as e:
        raise AdapterError("training data", [str(e)]) from e
    except OSError as e:
        raise refused(f"cannot be read ({e.strerror})") from e
    for magic, said in MAGIC.items():
        if content.startswith(magic):
            raise refused(said)
    if b"\0" in content[:1000]:
        raise refused("holds zero bytes: it is no text, or in UTF-16; expected jsonl in UTF-8")
    return content


def _over_lines(first: bytes, content: bytes) -> bool:
    """Whether a file's first value is a list, or does not end on its line."""
    first = first.removeprefix(codecs.BOM_UTF8).strip()
    if first.startswith(b"["):
        return True
    if not first.startswith(b"{"):
        return False
    try:
        json.loads(first)
        return False
    except (ValueError, RecursionError):
        pass
    try:
        text = content.decode("utf-8", errors="replace")
        json.JSONDecoder().raw_decode(text, _SPACE.match(text).end())
        return True
    except (ValueError, RecursionError):
        return False


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as e:
        raise Bad(f"is not UTF-8 ({e.reason} at byte {e.start}); save the file as UTF-8") from e


def _stream(content: bytes) -> Iterator[tuple[int, dict[str, Any] | Bad]]:
    """The objects of a text that is a sequence of values; a list stands for its items."""
    try:
        text = _decode(content)
    except Bad as e:
        if not isinstance(e.__cause__, UnicodeDecodeError):
            raise
        yield 1 + content.count(b"\n", 0, e.__cause__.start), e
        return
    at, line, counted, inside, decoder = 0, 1, 0, False, json.JSONDecoder()
    while (at := _SPACE.match(text, at).end()) < len(text):
        line, counted = line + text.count("\n", counted, at), at
        if text[at] == "[" and not inside:
            inside, at = True, at + 1
        elif text[at] in "],":
            inside, at = inside and text[at] == ",", at + 1
        else:
            try:
                end = decoder.raw_decode(text, at)[1]
            except (ValueError, RecursionError) as e:
                yield line, Bad(f"is not JSON ({_reason(e)}); nothing is read from here on")
                return
            try:
                yield line, _object(text[at:end])
            except Bad as e:
                yield line, e
            at = end
    if inside:
        yield 1 + text.count("\n"), Bad("the file ends within a list; is it cut off?")


def _object(text: str) -> dict[str, Any]:
    repeated: dict[str, None] = {}
    try:
        value = parse_json(text, repeated)
    except (ValueError, RecursionError) as e:
        raise Bad(f"is not JSON ({_reason(e)}); expected one object per line, {SHAPES}") from e
    if not isinstance(value, dict):
        raise Bad(f"holds {show(value)}, expected an object")
    if repeated:
        raise Bad(f"has `{some(list(repeated))}` twice in one object; keep one")
    if found := _half(value):
        raise Bad(
            f"holds half a surrogate pair ({found}), which is no character: a text was cut within "
            "an emoji or the like; mend that text, or leave the line out"
        )
    return value


def _reason(e: Exception) -> str:
    if isinstance(e, RecursionError):
        return "nested too deep"
    return f"{e.msg} at character {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)


def _half(value: Any) -> str | None:
    """The first lone surrogate in any text of a value, written as in JSON."""
    values = [value]
    while values:
        one = values.pop()
        if isinstance(one, dict):
            values += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            values += one
        elif isinstance(one, str) and not one.isascii() and (found := _SURROGATE.search(one)):
            return f"\\u{ord(found[0]):04x}"
    return None
