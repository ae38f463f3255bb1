"""How the streaming kernel cuts a product: tuned for a device and a shape, or a sane default.

`vllm-adafuse tune` finds cuts and leaves them in the user's cache directory, one JSON file for each
kind of device. A cut changes the speed of a product, and the last bits of its result.
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
import triton
from vllm_adafuse.kernels.shrink import MAX_SLICES

logger = logging.getLogger("vllm.adafuse")

MAX_SPLIT = 4
VERSION = 2


@dataclass(frozen=True)
class Tiles:
    """How a product is cut.

    Attributes:
        rows: of W in a tile, a power of two.
        cols: elements of `in` in a step of the loop, a power of two.
        split: programs that share a tile, each with a slice of `in`.
        warps: of a program.
        stages: steps in flight.
        shrink_cols: elements of `in` in a step of the shrink, a power of two.
        slices: programs that share the shrink of one expert, each with a slice of `in`.
    """

    rows: int = 64
    cols: int = 128
    split: int = 1
    warps: int = 4
    stages: int = 3
    shrink_cols: int = 256
    slices: int = 1

    def __post_init__(self):
        for name in ("rows", "cols", "warps", "shrink_cols"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"Tiles: {name} is {value}, expected a power of two")
        if not 1 <= self.split <= MAX_SPLIT:
            raise ValueError(f"Tiles: split is {self.split}, expected 1 to {MAX_SPLIT}")
        if not 1 <= self.slices <= MAX_SLICES:
            raise ValueError(f"Tiles: slices is {self.slices}, expected 1 to {MAX_SLICES}")

    @classmethod
    def choose(cls, tokens: int, size_in: int, rows: int, activation: str, itemsize: int) -> Tiles:
        """A sane cut for any device: some 190 programs, each with deep loads.

        Found on an H200 at the shapes of Llama-2-7B; docs/kernel-notes.md has the figures.
        """
        few, cols = tokens <= 16, 128 if itemsize == 2 else 64
        height, most = (32, 1) if activation and few else (64, 1 if activation else 3)
        while height > 16 and triton.cdiv(rows, height) * most < 120:
            height //= 2
        if activation:
            return cls(height, cols if few else cols // 2, 1, 4, 3 if few else 4)
        programs = triton.cdiv(rows, height)
        split = min(most, triton.cdiv(160, programs))
        slices = 1 if split == 1 else 2 if few else 3
        return cls(height, cols, split, 4, 4, 512 if few and split > 1 else 256, slices)


def shape_key(size_in: int, rows: int, activation: str, itemsize: int) -> str:
    """"4096x11008 silu 2": the shape of a product in a file of cuts."""
    return f"{size_in}x{rows} {activation or '-'} {itemsize}"


def cuts_file(device: str) -> Path:
    """Where the cuts of a kind of device are kept: $XDG_CACHE_HOME or ~/.cache, vllm-adafuse/."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")
    return Path(cache) / "vllm-adafuse" / f"tiles-{name}.json"


def save_cuts(device: str, cuts: dict[str, dict[int, Tiles]], how: dict[str, Any]) -> Path:
    """Adds cuts to the file of a device, and says in it how they were found.

    Args:
        device: its name, as torch gives it.
        cuts: shape key -> tokens -> cut.
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
            key: {str(tokens): asdict(cut) for tokens, cut in sorted(by_tokens.items())}
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


def _read(path: Path) -> dict[str, dict[int, Tiles]]:
    """The cuts of a file; none, with a warning, if it cannot be used."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"its version is {content['version']}, expected {VERSION}")
        return {
            key: {int(tokens): Tiles(**cut) for tokens, cut in by_tokens.items()}
            for key, by_tokens in content["cuts"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        logger.warning("%s is not used: %s; make it again with vllm-adafuse tune", path, e)
        return {}


@functools.cache
def _cuts_of(device: str) -> dict[str, dict[int, Tiles]]:
    return _read(cuts_file(device))


@functools.cache
def find_cut(
    device: str, tokens: int, size_in: int, rows: int, activation: str, itemsize: int
) -> Tiles:
    """The tuned cut of the nearest number of tokens, or `Tiles.choose`."""
    tuned = _cuts_of(device).get(shape_key(size_in, rows, activation, itemsize))
    if not tuned:
        return Tiles.choose(tokens, size_in, rows, activation, itemsize)
    return tuned[min(tuned, key=lambda t: (abs(math.log2(t / tokens)), t))]


def find_tiles(
    tokens: int, size_in: int, rows: int, activation: str, itemsize: int, device: torch.device
) -> Tiles:
    """The cut of a product on a device.

    Args:
        tokens: of the step; all numbers up to the same power of two are cut alike.
        size_in: elements of `in`.
        rows: of W; of gate alone where an activation follows.
        activation: "", "silu" or "gelu_tanh".
        itemsize: bytes of an element.
        device: where it runs.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    tokens = triton.next_power_of_2(tokens)
    return find_cut(name, tokens, size_in, rows, activation, itemsize)
