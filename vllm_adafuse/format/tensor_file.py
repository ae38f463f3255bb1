"""Safetensors files: the header checked down to the last byte, the values read piece by piece.

    8 bytes: length of the header, little endian
    the header: a JSON object, name -> {"dtype", "shape", "data_offsets": [begin, end]}
    the tensors, end to end

Nothing is mapped into memory: a page that was looked at would stay there until the file is closed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from vllm_adafuse.format.reading import FileProblem, open_regular, parse_json, reason, where
from vllm_adafuse.text import show, some

# 64 experts in all linears of 32 layers are 28 672 tensors, a header of 4 MB. Parsed it may take
# fifteen times its size.
MAX_HEADER_BYTES, MAX_TENSORS = 10 << 20, 40_000
# Elements of a tensor: of more, torch could not count the bytes.
MAX_ELEMENTS = 1 << 52
PIECE = 4 << 20
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor of a header.

    Attributes:
        dtype: as the file calls it ("BF16").
        shape: its dimensions.
        start, end: its bytes in the file, counted from the file's begin.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open safetensors file whose header is in order; a context manager.

    Attributes:
        file: its path.
        entries: name -> entry, in the file's order.
        size: of the file in bytes.
        header: the bytes in front of the tensors.

    Raises:
        FileProblem: it is no regular file, or no sound safetensors file.
    """

    def __init__(self, file: Path, missing: str = "missing"):
        self.file = Path(file)
        self._opened = open_regular(self.file, missing)
        try:
            self.size = os.fstat(self._opened.fileno()).st_size
            self.header = self._read_header()
            self.entries = self._check()
        except OSError as e:
            self.close()
            raise FileProblem(f"{where(self.file)}: cannot be read ({reason(e)})") from e
        except FileProblem:
            self.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; reading then fails."""
        self._opened.close()

    def read(self, name: str) -> torch.Tensor:
        """A tensor (CPU, the file's dtype and shape).

        Raises:
            FileProblem: it cannot be read, does not fit into memory, or torch lacks its dtype.
            KeyError: there is none of that name.
        """
        entry = self.entries[name]
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise FileProblem(
                f"{where(self.file)}: tensor {show(name)[1:-1]}: dtype {show(entry.dtype)[1:-1]}, "
                f"expected one of {', '.join(TORCH_DTYPES)}; convert it"
            )
        if (needed := entry.end - entry.start) > (memory := machine_memory()):
            raise FileProblem(
                f"{where(self.file)}: tensor {show(name)[1:-1]} is {needed} bytes long, more than "
                f"the {memory} bytes of this machine's memory"
            )
        data = torch.empty(needed, dtype=torch.uint8)
        self._read_into(entry.start, data)
        return data.view(dtype).view(entry.shape)

    def pieces(self, start: int, end: int, dtype: torch.dtype, row: int = 1) -> Iterator:
        """Elements of the file one after the other, in tensors of about PIECE bytes.

        Args:
            start, end: bytes in the file.
            dtype: of the elements.
            row: elements that are not parted.

        Yields:
            Flat tensors; the next overwrites the last.

        Raises:
            FileProblem: the file cannot be read.
        """
        row_bytes = row * dtype.itemsize
        step = max(1, PIECE // row_bytes) * row_bytes
        buffer = torch.empty(min(step, end - start), dtype=torch.uint8)
        for at in range(start, end, step):
            piece = buffer[: min(step, end - at)]
            self._read_into(at, piece)
            yield piece.view(dtype)

    def _read_into(self, start: int, data: torch.Tensor) -> None:
        """Fills a uint8 tensor with the bytes from `start` on."""
        view = memoryview(data.numpy())
        try:
            self._opened.seek(start)
            got = self._opened.readinto(view)
        except OSError as e:
            raise FileProblem(f"{where(self.file)}: cannot be read ({reason(e)})") from e
        if got != len(view):
            raise FileProblem(
                f"{where(self.file)}: changed while it was read (it has become shorter); wait "
                "until it is written, then try again"
            )

    def _unsound(self, what: str) -> FileProblem:
        return FileProblem(
            f"{where(self.file)}: is not a sound safetensors file ({what}); the file is truncated, "
            "damaged or of another kind: save or copy it again"
        )

    def _read_header(self) -> bytes:
        length = self._opened.read(8)
        size = int.from_bytes(length, "little")
        if len(length) < 8 or size > self.size - 8:
            raise self._unsound(
                f"it is {self.size} bytes long, and its header should be {size}"
                if len(length) == 8
                else f"it is {self.size} bytes long"
            )
        if size > MAX_HEADER_BYTES:
            raise self._unsound(f"its header is {size} bytes long, at most {MAX_HEADER_BYTES}")
        return length + self._opened.read(size)

    def _check(self) -> dict[str, Entry]:
        repeated: dict[str, None] = {}
        # Each tensor has one object, two lists and four keys.
        if any(
            self.header.count(sign) > most * MAX_TENSORS
            for sign, most in ((b"{", 1), (b"[", 2), (b":", 4))
        ):
            raise self._unsound(f"its header names more than {MAX_TENSORS} tensors")
        try:
            table = parse_json(self.header[8:].decode("utf-8"), repeated)
        except RecursionError:
            raise self._unsound("its header is nested too deep") from None
        except ValueError as e:
            raise self._unsound(f"its header is not JSON: {reason(e)}") from e
        if repeated:
            raise FileProblem(
                f"{where(self.file)}: its header names {some(list(repeated))} twice; one of them "
                "would be ignored: save it again"
            )
        if not isinstance(table, dict):
            raise self._unsound(f"its header holds a {type(table).__name__}")
        metadata = table.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._unsound(f"its __metadata__ is {show(metadata)}")
        begin = len(self.header)
        entries = {name: self._entry(name, value, begin) for name, value in table.items()}
        end = begin
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != end:
                raise self._unsound(
                    f"the bytes of tensor {show(name)[1:-1]} begin at {entry.start - begin}, "
                    f"expected {end - begin}"
                )
            end = entry.end
        if end != self.size:
            raise self._unsound(f"its tensors end at byte {end} of {self.size}")
        return entries

    def _bad(self, name: str, key: str, found: Any, expected: str) -> FileProblem:
        return self._unsound(
            f"`{key}` of tensor {show(name)[1:-1]} is {show(found)}, expected {expected}"
        )

    def _entry(self, name: str, value: Any, begin: int) -> Entry:
        if not isinstance(value, dict):
            raise self._unsound(f"tensor {show(name)[1:-1]} is {show(value)}, expected an object")
        dtype, shape, span = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(dtype, str) or not dtype or len(dtype) > 32:
            raise self._bad(name, "dtype", dtype, "a name such as F32 or BF16")
        if not isinstance(shape, list) or not all(map(_is_size, shape)) or len(shape) > 16:
            raise self._bad(name, "shape", shape, "a list of sizes")
        # Sizes beside a 0 count too: torch multiplies them for its strides.
        if math.prod(max(size, 1) for size in shape) > MAX_ELEMENTS:
            raise self._bad(name, "shape", shape, f"at most {MAX_ELEMENTS} elements")
        if not isinstance(span, list) or len(span) != 2 or not all(map(_is_size, span)):
            raise self._bad(name, "data_offsets", span, "two numbers of bytes")
        start, end = span
        known = TORCH_DTYPES.get(dtype)
        needed = end - start if known is None else math.prod(shape) * known.itemsize
        if end < start or end - start != needed:
            expected = f"{needed} bytes for {show(dtype)[1:-1]} of shape {show(shape)}"
            raise self._bad(name, "data_offsets", span, expected)
        return Entry(dtype, tuple(shape), begin + start, begin + end)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def machine_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or its control group's."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no group, or "max"
        return total
