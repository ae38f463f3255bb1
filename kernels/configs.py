"""How kernels are cut, and the files of configs that were tuned for a device.

`vllm-adafuse tune` finds configs of products of few tokens and leaves them in the user's cache
directory, one JSON file for each kind of device; those of the devices that we had come with the
package, in `configs/`. A config changes the speed of a product, and the last bits of its result. Which
one a step takes is for `dispatch` to say.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_adafuse.kernels.whole import power_of_2

logger = logging.getLogger("vllm.adafuse")

MAX_SPLIT_K = 4
# Programs that share the shrink of one expert, at most.
MAX_SHRINK_SPLIT_K = 8
VERSION = 5
# Keys of version 4, by which users have tuned files still, and what they are called now.
_VERSION_4 = {"split": "split_k", "slices": "shrink_split_k"}
# Ranks, of one expert or of several, that one product takes.
BLOCK_ER = 128
# Experts of which `Step.active` has bits; with more its word says that all are there. Of more a program
# of `spread_routes` takes some after the other, too: the gates of all would not stay in its registers.
MAX_BITS = 64
# Ranks of a page: the least that tensor cores take.
PAGE_RANKS = 16
# Rows that Hopper's tensor cores take at least: of tokens, in whole tiles.
MIN_TILE_TOKENS = 64
# Bytes of shared memory for a program: two of them fit a Hopper processor, one any current one's;
# and those that a program of whole tiles may take, which has a Hopper processor for itself.
MAX_SHARED, MAX_TILE_SHARED = 100 << 10, 220 << 10


@dataclass(frozen=True)
class GemmConfig:
    """How a product is cut.

    Attributes:
        rows: of W in a tile, a power of two; with `tma` or one and a half of one.
        cols: elements of `in` in a step of the loop, a power of two.
        split_k: programs that share a tile, each with a slice of `in`.
        warps: of a program.
        stages: steps in flight.
        shrink_cols: elements of `in` in a step of the shrink, a power of two.
        shrink_split_k: programs that share the shrink of one expert, each with a slice of `in`.
        tma: whole tiles through the tensor memory accelerator (tma_gemm), not streamed
            (decode_gemm).
    """

    rows: int = 64
    cols: int = 128
    split_k: int = 1
    warps: int = 4
    stages: int = 3
    shrink_cols: int = 256
    shrink_split_k: int = 1
    tma: bool = False

    def __post_init__(self):
        first, second = self.pieces
        if second != 0 and not (self.tma and 2 * second == first):
            more = " or one and a half of one" if self.tma else ""
            raise ValueError(f"GemmConfig: rows is {self.rows}, expected a power of two{more}")
        for name in ("cols", "warps", "shrink_cols"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"GemmConfig: {name} is {value}, expected a power of two")
        if not 1 <= self.split_k <= MAX_SPLIT_K:
            raise ValueError(f"GemmConfig: split_k is {self.split_k}, expected 1 to {MAX_SPLIT_K}")
        if not 1 <= self.shrink_split_k <= MAX_SHRINK_SPLIT_K:
            found = f"shrink_split_k is {self.shrink_split_k}"
            raise ValueError(f"GemmConfig: {found}, expected 1 to {MAX_SHRINK_SPLIT_K}")

    def with_room(self, programs: int, shrink_tiles: int) -> GemmConfig:
        """With no more programs for so many tiles of the shrink than there is room for beside the
        other tiles; unchanged where there is none anyway."""
        most = max(1, programs // shrink_tiles)
        if programs <= 0 or most >= self.shrink_split_k:
            return self
        return replace(self, shrink_split_k=most)

    @property
    def pieces(self) -> tuple[int, int]:
        """Rows of the two pieces of a tile, powers of two; 0 for the second where one is all."""
        first = 1 << max(self.rows, 1).bit_length() - 1
        return first, self.rows - first


@dataclass(frozen=True)
class ExpandConfig:
    """How an expand is cut.

    Attributes:
        tokens, columns: of a tile.
        loop: tiles of a program, side by side; what it knows of its tokens serves them all.
        warps: of a program.
        stages: loads in flight in a loop.
    """

    tokens: int
    columns: int
    loop: int
    warps: int
    stages: int


@dataclass(frozen=True)
class NormConfig:
    """How the work is cut.

    Attributes:
        tokens: of a program.
        columns: of a step of its loop.
        norm_columns: of a step of the norm.
        warps: of a program.
        stages: loads in flight in either loop.
    """

    tokens: int
    columns: int
    norm_columns: int
    warps: int
    stages: int = 1


def block_er(ranks: int) -> int:
    """Ranks that one product takes of so many, for kernels that do not mind experts' limits."""
    return min(BLOCK_ER, max(16, power_of_2(ranks)))


@functools.cache
def expert_blocks(experts: int, rank: int, skip: bool) -> dict[str, int | bool]:
    """How E experts of one rank are cut into products over ranks.

    skip: one expert at a time, so that absent ones can be left out.
    """
    block_r = min(BLOCK_ER, power_of_2(rank))
    block_e = 1 if skip else min(power_of_2(experts), BLOCK_ER // block_r)
    block_r = max(block_r, 16 // block_e)
    even = rank % block_r == 0 and experts % block_e == 0 and (block_e == 1 or rank == block_r)
    return {
        "RANK": rank, "SKIP": skip, "EVEN_K": even, "BLOCK_E": block_e, "BLOCK_R": block_r,
        "ONE": not skip and experts <= block_e and rank <= block_r,
    }  # fmt: skip


def shape_key(size_in: int, rows: int, epilogue: str, itemsize: int) -> str:
    """"4096x11008 silu 2": the shape of a product in a file of configs."""
    return f"{size_in}x{rows} {epilogue or '-'} {itemsize}"


def configs_file(device: str) -> Path:
    """Where the configs of a kind of device are kept: $XDG_CACHE_HOME or ~/.cache, vllm-adafuse/."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vllm-adafuse" / f"tiles-{_file_name(device)}.json"


def _file_name(device: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-")


def packaged_file(device: str) -> Path:
    """The configs of a kind of device that come with the package, where there are any."""
    return Path(__file__).parent / "configs" / f"{_file_name(device)}.json"


Configs = dict[str, dict[int, GemmConfig | None]]


def save_configs(device: str, configs: Configs, how: dict[str, Any]) -> Path:
    """Adds configs to the file of a device, and says in it how they were found.

    Args:
        device: its name, as torch gives it.
        configs: shape key -> tokens -> config, None for cuBLAS.
        how: command, versions, figures.
    """
    path = configs_file(device)
    known = _read(path)
    for key, by_tokens in configs.items():
        known[key] = known.get(key, {}) | by_tokens
    content = {
        "version": VERSION,
        "device": device,
        "how": how,
        "configs": {
            key: {str(t): c and asdict(c) for t, c in sorted(by_tokens.items())}
            for key, by_tokens in sorted(known.items())
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)  # a server may be reading it
    configs_of.cache_clear()
    return path


def _read(path: Path) -> Configs:
    """The configs of a file; none, with a warning, if it cannot be used."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["version"] not in (4, VERSION):
            raise ValueError(f"its version is {content['version']}, expected {VERSION}")
        old = content["version"] == 4
        return {
            key: {int(tokens): _config(of, old) for tokens, of in by_tokens.items()}
            for key, by_tokens in content["cuts" if old else "configs"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        logger.warning("%s is not used: %s; make it again with vllm-adafuse tune", path, e)
        return {}


def _config(keys: dict[str, Any] | None, old: bool) -> GemmConfig | None:
    if keys and old:
        keys = {_VERSION_4.get(key, key): value for key, value in keys.items()}
    return keys and GemmConfig(**keys)


@functools.cache
def configs_of(device: str) -> Configs:
    """The user's own, and for other shapes those of the package."""
    return _read(packaged_file(device)) | _read(configs_file(device))
