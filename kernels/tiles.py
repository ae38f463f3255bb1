"""How products of few tokens are cut: tuned for a device and a shape, or a sane default.

`vllm-adafuse tune` finds cuts and leaves them in the user's cache directory, one JSON file for each
kind of device; those of the devices that we had come with the package, in `cuts/`. A cut changes
the speed of a product, and the last bits of its result.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from vllm_adafuse.kernels.shrink import MAX_SLICES
from vllm_adafuse.kernels.whole import cdiv, power_of_2

logger = logging.getLogger("vllm.adafuse")

MAX_SPLIT = 4
VERSION = 4
# Up to so many tokens W can be streamed, and tiled.
MAX_STREAM_TOKENS = 32
MAX_TILE_TOKENS = 128
# Rows of W, or pairs of them, with which whole tiles are programs enough. To add up slices of `in`
# within the kernel costs more than it gains.
_MIN_ROWS = 3072
# Tiles that keep a large GPU busy.
_MIN_TILES = 90
# Up to so many tokens W is streamed in every case.
FEW_TOKENS = 16


@dataclass(frozen=True)
class Tiles:
    """How a product is cut.

    Attributes:
        rows: of W in a tile, a power of two; with `tma` or one and a half of one.
        cols: elements of `in` in a step of the loop, a power of two.
        split: programs that share a tile, each with a slice of `in`.
        warps: of a program.
        stages: steps in flight.
        shrink_cols: elements of `in` in a step of the shrink, a power of two.
        slices: programs that share the shrink of one expert, each with a slice of `in`.
        tma: whole tiles through the tensor memory accelerator (tile_linear), not streamed
            (stream_linear).
    """

    rows: int = 64
    cols: int = 128
    split: int = 1
    warps: int = 4
    stages: int = 3
    shrink_cols: int = 256
    slices: int = 1
    tma: bool = False

    def __post_init__(self):
        first, second = self.pieces
        if second != 0 and not (self.tma and 2 * second == first):
            more = " or one and a half of one" if self.tma else ""
            raise ValueError(f"Tiles: rows is {self.rows}, expected a power of two{more}")
        for name in ("cols", "warps", "shrink_cols"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"Tiles: {name} is {value}, expected a power of two")
        if not 1 <= self.split <= MAX_SPLIT:
            raise ValueError(f"Tiles: split is {self.split}, expected 1 to {MAX_SPLIT}")
        if not 1 <= self.slices <= MAX_SLICES:
            raise ValueError(f"Tiles: slices is {self.slices}, expected 1 to {MAX_SLICES}")

    @property
    def pieces(self) -> tuple[int, int]:
        """Rows of the two pieces of a tile, powers of two; 0 for the second where one is all."""
        first = 1 << max(self.rows, 1).bit_length() - 1
        return first, self.rows - first

    def takes(self, tokens: int, tma: bool) -> bool:
        """Whether it serves so many tokens, with the accelerator or without."""
        return tokens <= (MAX_TILE_TOKENS if self.tma else MAX_STREAM_TOKENS) and self.tma <= tma

    @classmethod
    def choose(
        cls, tokens: int, size_in: int, rows: int, follows: str, itemsize: int, tma: bool = False
    ) -> Tiles | None:
        """A sane cut for any device; None: the vendor's product is the better one.

        Found on an H200 at the shapes of Llama-2-7B and 13B and Mistral-7B; docs/kernel-notes.md
        has the figures. See `find_tiles` for the arguments.
        """
        cut = None
        if tma and FEW_TOKENS < tokens <= MAX_TILE_TOKENS:
            cut = cls._tiled(tokens, size_in, rows, follows, itemsize)
        if tokens > MAX_STREAM_TOKENS:
            return cut
        streams_better = itemsize > 2 or (follows == "norm" and size_in <= 8192)
        if cut and not streams_better:
            return cut
        return cls._streamed(tokens, rows, follows, itemsize, tma)

    @classmethod
    def _tiled(
        cls, tokens: int, size_in: int, rows: int, follows: str, itemsize: int
    ) -> Tiles | None:
        if follows == "norm":
            if tokens > 64:
                return None
            if itemsize > 2:
                return cls(32, 32, min(MAX_SPLIT, max(1, cdiv(128, cdiv(rows, 32)))), tma=True)
            if size_in <= 8192:
                return cls(64, 128, 1, 4, 5, slices=2, tma=True)
            split = min(MAX_SPLIT, max(1, 112 // cdiv(rows, 96)))
            return cls(96, 128, split, 4, 5, slices=4, tma=True)
        pairs = bool(follows)
        if rows < (_MIN_ROWS if pairs else 2 * _MIN_ROWS) or (tokens > 64 and not pairs):
            return None
        if itemsize > 2:
            return cls(32, 32, 1, 4, 3, tma=True)
        if follows in ("", "rotary"):
            if cdiv(rows, 64) < _MIN_TILES:
                return cls(32, 128, 1, 4, 5 if tokens <= 64 else 4, slices=2, tma=True)
            if tokens <= 64:
                return cls(64, 128, 1, 4, 4, slices=2, tma=True)
            return cls(64, 64, 1, 8, 6, slices=2, tma=True)
        # One tile to a processor, of 132, some of which have the shrink: a second round costs as
        # much as the first.
        one_round = cdiv(rows, 96) <= 116
        if tokens <= 64:
            cut = (96, 128, 1, 4, 3) if one_round else (64, 64, 1, 4, 4)
        else:
            tall = not one_round and cdiv(rows, 128) <= 116
            cut = (128, 64, 1, 8, 4) if tall else (96, 64, 1, 8, 5)
        return cls(*cut, slices=2, tma=True)

    @classmethod
    def _streamed(
        cls, tokens: int, rows: int, follows: str, itemsize: int, roomy: bool
    ) -> Tiles:
        # Hopper's processors have room for 110 kB; others must do with less.
        few, pairs = tokens <= FEW_TOKENS, follows not in ("", "norm")
        cols, most = 128 if itemsize == 2 else 64, 1 if pairs else 3
        height = 64 if roomy or not pairs or not few else 32
        while height > 16 and cdiv(rows, height) * most < _MIN_TILES:
            height //= 2
        if follows == "rotary" and few and roomy:
            return cls(min(height, 32), cols, 1, 4, 6 if cdiv(rows, 32) <= 132 else 4)
        if follows == "rotary":
            return cls(height, cols // 2, 1, 4, 6 if roomy else 4)
        if pairs:
            return cls(height, cols if few else cols // 2, 1, 4, 3 if few else 4)
        # Programs that fill a second round of 132 processors by a fifth alone wait for that fifth.
        tiles = cdiv(rows, height)
        split = min(most, cdiv(190, tiles))
        if tokens <= 4 and follows == "norm" and split > 1 and roomy and 2 * tiles <= 132:
            return cls(height, cols, 2, 4, 6, 512, 2)
        slices = 1 if split == 1 else 2 if few else 3
        stages = 3 if few and follows == "norm" else 4
        return cls(height, cols, split, 4, stages, 512 if few and split > 1 else 256, slices)


def shape_key(size_in: int, rows: int, follows: str, itemsize: int) -> str:
    """"4096x11008 silu 2": the shape of a product in a file of cuts."""
    return f"{size_in}x{rows} {follows or '-'} {itemsize}"


def cuts_file(device: str) -> Path:
    """Where the cuts of a kind of device are kept: $XDG_CACHE_HOME or ~/.cache, vllm-adafuse/."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vllm-adafuse" / f"tiles-{_file_name(device)}.json"


def _file_name(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")


def packaged_file(device: str) -> Path:
    """The cuts of a kind of device that come with the package, where there are any."""
    return Path(__file__).parent / "cuts" / f"{_file_name(device)}.json"


Cuts = dict[str, dict[int, Tiles | None]]


def save_cuts(device: str, cuts: Cuts, how: dict[str, Any]) -> Path:
    """Adds cuts to the file of a device, and says in it how they were found.

    Args:
        device: its name, as torch gives it.
        cuts: shape key -> tokens -> cut, None for the vendor's product.
        how: command, versions, figures.
    """
    path = cuts_file(device)
    known = _read(path)
    for key, by_tokens in cuts.items():
        known[key] = known.get(key, {}) | by_tokens
    content = {
        "version": VERSION,
        "device": device,
        "how": how,
        "cuts": {
            key: {str(t): cut and asdict(cut) for t, cut in sorted(by_tokens.items())}
            for key, by_tokens in sorted(known.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)  # a server may be reading it
    _cuts_of.cache_clear()
    find_cut.cache_clear()
    return path


def _read(path: Path) -> Cuts:
    """The cuts of a file; none, with a warning, if it cannot be used."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"its version is {content['version']}, expected {VERSION}")
        return {
            key: {int(tokens): cut and Tiles(**cut) for tokens, cut in by_tokens.items()}
            for key, by_tokens in content["cuts"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        logger.warning("%s is not used: %s; make it again with vllm-adafuse tune", path, e)
        return {}


@functools.cache
def _cuts_of(device: str) -> Cuts:
    """The user's own, and for other shapes those of the package."""
    return _read(packaged_file(device)) | _read(cuts_file(device))


@functools.cache
def find_cut(
    device: str, tokens: int, size_in: int, rows: int, follows: str, itemsize: int, tma: bool
) -> Tiles | None:
    """The tuned cut of the nearest number of tokens, or `Tiles.choose`."""
    tuned = _cuts_of(device).get(shape_key(size_in, rows, follows, itemsize), {})
    fits = {
        t: cut
        for t, cut in tuned.items()
        if (cut.takes(tokens, tma) if cut else tokens > MAX_STREAM_TOKENS)
    }
    if not fits:
        return Tiles.choose(tokens, size_in, rows, follows, itemsize, tma)
    return fits[min(fits, key=lambda t: (abs(math.log2(t / tokens)), t))]


@functools.cache
def device_name(device: torch.device) -> str:
    """As torch gives it; "cpu" without a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def find_tiles(
    tokens: int, size_in: int, rows: int, follows: str, itemsize: int, device: torch.device,
    tma: bool = False,
) -> Tiles | None:  # fmt: skip
    """The cut of a product on a device; None: the vendor's product is the better one.

    Args:
        tokens: of the step; all numbers up to the same power of two are cut alike.
        size_in: elements of `in`.
        rows: of W; of one member where rows come in pairs (gate of gate_up, half heads of qkv).
        follows: "", "silu", "gelu_tanh", "rotary", or "norm", which adds up slices of `in`.
        itemsize: bytes of an element.
        device: where it runs.
        tma: the tensor memory accelerator can read all, see `tile_linear.can_tile`.
    """
    if tokens > MAX_TILE_TOKENS:
        return None
    name = device_name(device)
    return find_cut(name, power_of_2(tokens), size_in, rows, follows, itemsize, tma)
