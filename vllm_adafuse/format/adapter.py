"""An adapter directory: its config, the table of its tensors, and every check of the format.

Only safetensors is ever read; nothing in an adapter can run code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import (
    CONFIG_FILE,
    FOREIGN,
    WEIGHTS_FILE,
    AdapterConfig,
    parse_config,
)
from vllm_adafuse.format.layout import (
    Alike,
    TensorInfo,
    check_targets,
    check_tensors,
    router_of,
)
from vllm_adafuse.format.places import adapter_problem
from vllm_adafuse.format.reading import FileProblem, read_json, reason, where
from vllm_adafuse.format.tensor_file import TensorFile, machine_memory
from vllm_adafuse.format.values import check_values
from vllm_adafuse.text import clip_all, show, some

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


@dataclass(frozen=True)
class Adapter:
    """An adapter directory whose files are well formed.

    Attributes:
        path: the directory, absolute.
        config: its adapter_config.json.
        tensors: name -> shape and dtype.
    """

    path: Path
    config: AdapterConfig
    tensors: dict[str, TensorInfo]

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes a compiled graph: config, names, shapes, dtypes."""
        table = {name: [*info.shape, str(info.dtype)] for name, info in self.tensors.items()}
        config = dataclasses.replace(self.config, base_hash="").to_json()
        content = json.dumps([config, table], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def projections(self) -> list[str]:
        """Full names of the linears with experts, in file order ("model.layers.0.mlp.up_proj")."""
        return [name.removesuffix(".lora_A") for name in self.tensors if name.endswith(".lora_A")]

    @property
    def always_on(self) -> list[str]:
        """Full names of the linears with a LoRA part that is always on, in file order."""
        end = ".always_A"
        return [name.removesuffix(end) for name in self.tensors if name.endswith(end)]

    @property
    def routers(self) -> list[str]:
        """What the layer-wise routers belong to: full names of linears or blocks, in file order."""
        end = ".router.weight"
        return [name.removesuffix(end) for name in self.tensors if name.endswith(end)]

    def router_of(self, projection: str) -> str:
        """The entry of `routers` that serves a linear with experts (layer-wise routing)."""
        return router_of(projection, self.config)

    @contextmanager
    def reader(self) -> Iterator:
        """Opens the weights file; yields `read(name) -> tensor` (CPU, dtype of the file).

        Raises:
            AdapterError: its tensors are no longer those that were checked, or cannot be read.
        """
        with open_weights(self.path / WEIGHTS_FILE) as weights:
            if (found := _table(weights, Alike())) != self.tensors:
                changed = sorted(found.keys() ^ self.tensors.keys()) or [
                    name for name, info in self.tensors.items() if found[name] != info
                ]
                raise FileProblem(
                    f"{where(weights.file)}: tensors have changed since it was checked "
                    f"({some(changed)}); try again when its files are complete"
                )
            yield weights.read


def load_adapter(path: str | Path, backbone: Backbone | None = None) -> Adapter:
    """Opens an adapter directory after every check of the format.

    Args:
        path: the directory.
        backbone: also check names and shapes against it.

    Raises:
        AdapterError: with every problem found.
    """
    adapter, problems = check_adapter(path, backbone)
    if problems:
        raise AdapterError(f"adapter {path}", problems)
    return adapter


def check_adapter(
    path: str | Path, backbone: Backbone | None = None, values: bool = True
) -> tuple[Adapter | None, list[str]]:
    """Collects every problem of an adapter directory, in the order config, tensors, values.

    Raises nothing for what an adapter may hold: tensors are checked even beside a bad config.

    Args:
        path: the directory.
        backbone: also check names and shapes against it.
        values: also read every tensor (NaN, Inf, rows past an expert's rank).

    Returns:
        The adapter (None if its files cannot be read), and the problems: none means usable.
    """
    root = Path(os.path.abspath(os.path.expanduser(path)))
    entries, problems = list_directory(root)
    if problems:
        return None, problems
    config, problems = _read_config(root / CONFIG_FILE)
    if config is None and len(problems) == 1 and problems[0].endswith(FOREIGN):
        return None, problems  # nor do its tensors have names of this format
    alike = Alike()
    try:
        weights = TensorFile(root / WEIGHTS_FILE, _missing_weights(entries))
    except FileProblem as e:
        return None, [*problems, str(e)]
    with weights:
        tensors = _table(weights, alike)
        if config and backbone:
            problems += check_targets(config, backbone)
        problems += check_tensors(tensors, config, backbone, alike)
        if too_large := _too_large(weights):
            problems.append(too_large)
        elif values:
            problems += check_values(weights, tensors.keys() - alike.bad, config)
    return Adapter(root, config, tensors) if config else None, clip_all(problems)


def list_directory(root: Path) -> tuple[set[str], list[str]]:
    """Names of its entries, and the problem that keeps them from being read."""
    try:
        entries = set(os.listdir(root))
    except (FileNotFoundError, NotADirectoryError) as e:
        return set(), [adapter_problem(root) or f"{where(root)}: {reason(e)}"]
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        return set(), [
            f"{where(root)}: cannot be read ({reason(e)}), expected a readable "
            f"directory that holds {CONFIG_FILE}; check its permissions and links"
        ]
    found = None if CONFIG_FILE in entries else adapter_problem(root)
    return entries, [found] if found else []


def _read_config(file: Path) -> tuple[AdapterConfig | None, list[str]]:
    try:
        raw, odd = read_json(file, missing="missing; an adapter directory holds this file")
    except FileProblem as e:
        return None, [str(e)]
    config, problems = parse_config(raw)
    if config is None:
        # A number that is none was refused as the value of its key.
        odd = [text for text in odd if "twice" in text]
    return None if odd else config, odd + problems


@contextmanager
def open_weights(file: Path) -> Iterator[TensorFile]:
    """An adapter's file of tensors, open.

    Raises:
        AdapterError: it cannot be read, also later, is not a sound safetensors file, or does not
            fit into memory.
    """
    try:
        with TensorFile(file) as weights:
            if too_large := _too_large(weights):
                raise FileProblem(too_large)
            yield weights
    except FileProblem as e:
        raise AdapterError(f"adapter {where(file.parent)}", [str(e)]) from e


def _too_large(weights: TensorFile) -> str | None:
    """What to say of a file that no machine like this could serve: it may be all holes."""
    if weights.size <= (memory := machine_memory()):
        return None
    return (
        f"{WEIGHTS_FILE}: is {weights.size} bytes long, expected at most the {memory} of this "
        "machine's memory, from which it is served"
    )


def _missing_weights(entries: set[str]) -> str:
    """What to say where there is no weights file."""
    pickles = [name for name in _PICKLES if name in entries]
    instead = f"; {pickles[0]} is a pickle, which is never read" if pickles else ""
    return f"missing{instead}; save the weights with safetensors"


def _table(weights: TensorFile, alike: Alike) -> dict[str, TensorInfo]:
    """Shapes and dtypes; dtypes that no adapter has are problems."""
    tensors = {}
    for name, entry in weights.entries.items():
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            found, expected = show(entry.dtype)[1:-1], ", ".join(DTYPES)
            alike.add(name, f"dtype {found}, expected one of {expected}; convert it")
        tensors[name] = TensorInfo(entry.shape, dtype or torch.float32)
    return tensors


def refuse_layer_wise(adapter: Adapter, why: str) -> None:
    """Raises AdapterError for an adapter that decides anew in every layer, where it cannot be."""
    if adapter.config.layer_wise:
        raise AdapterError(f"adapter {adapter.path}", [f"`routing` is layer_wise: {why}"])
