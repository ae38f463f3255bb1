"""An adapter directory: its config, the table of its tensors, and every check of the format.

Only safetensors is ever read; nothing in an adapter can run code.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from vllm_adafuse.backbone import Backbone
from vllm_adafuse.config import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, parse_config, show, some
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.layout import (
    Alike,
    TensorInfo,
    check_targets,
    check_tensors,
    past_ranks,
    router_of,
)

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_CONFIG_BYTES = 1 << 20
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
        content = json.dumps([self.config.to_json(), table], sort_keys=True)
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
        """Opens the weights file; yields `read(name) -> tensor` (CPU, dtype of the file)."""
        with _open_weights(self.path / WEIGHTS_FILE) as tensors:
            yield tensors.get_tensor


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
    entries, problems = _list_directory(root)
    if problems:
        return None, problems
    config, problems = _read_config(root / CONFIG_FILE)
    alike = Alike()
    tensors, file_problems = _read_header(root / WEIGHTS_FILE, entries, alike)
    problems += file_problems
    if tensors is None:
        return None, problems
    if config and backbone:
        problems += check_targets(config, backbone)
    problems += check_tensors(tensors, config, backbone, alike)
    if values:
        problems += _check_values(root, tensors.keys() - alike.bad, config)
    return Adapter(root, config, tensors) if config else None, problems


def _reason(e: Exception) -> str:
    return getattr(e, "strerror", None) or str(e)


def _list_directory(root: Path) -> tuple[set[str], list[str]]:
    try:
        return set(os.listdir(root)), []
    except FileNotFoundError:
        return set(), [f"{root}: no such directory; name the directory that holds {CONFIG_FILE}"]
    except NotADirectoryError:
        return set(), [f"{root}: is a file, expected the directory that holds {CONFIG_FILE}"]
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path
        return set(), [
            f"{show(str(root))[1:-1]}: cannot be read ({_reason(e)}), expected a readable "
            f"directory that holds {CONFIG_FILE}; check its permissions and links"
        ]


def _check_file(file: Path) -> list[str]:
    """Refuses what cannot be opened, and what would block or never end: pipes and devices."""
    try:
        mode = file.stat().st_mode
        if stat.S_ISREG(mode):
            file.open("rb").close()
            return []
    except FileNotFoundError:
        return [f"{file}: missing; an adapter directory holds this file"]
    except OSError as e:
        return [
            f"{file}: cannot be read ({_reason(e)}), expected a readable file; check its "
            "permissions and links"
        ]
    kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
    return [f"{file}: is {kind}, expected a regular file; replace it with the file"]


def _read_config(file: Path) -> tuple[AdapterConfig | None, list[str]]:
    if problems := _check_file(file):
        return None, problems
    repeated: dict[str, None] = {}

    def pairs(items: list[tuple[str, object]]) -> dict:
        repeated.update({k: None for k, n in Counter(key for key, _ in items).items() if n > 1})
        return dict(items)

    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            return None, [
                f"{file}: is {file.stat().st_size} bytes long, expected at most "
                f"{MAX_CONFIG_BYTES}; is this another file under that name?"
            ]
        raw = json.loads(content.decode("utf-8"), object_pairs_hook=pairs)
    except OSError as e:
        return None, [f"{file}: cannot be read ({_reason(e)}), expected a readable file"]
    except (ValueError, RecursionError) as e:
        return None, [f"{file}: is not valid JSON ({e}), expected a UTF-8 JSON object; mend it"]
    config, problems = parse_config(raw)
    if repeated:
        twice = f"{CONFIG_FILE}: key `{some(list(repeated))}` stands there twice; keep one"
        return None, [twice, *problems]
    return config, problems


@contextmanager
def _open_weights(file: Path) -> Iterator:
    from safetensors import SafetensorError, safe_open

    subject = f"adapter {file.parent}"
    if problems := _check_file(file):
        raise AdapterError(subject, problems)
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except OSError as e:
        raise AdapterError(subject, [f"{file}: cannot be read ({_reason(e)})"]) from e
    except SafetensorError as e:
        raise AdapterError(
            subject,
            [
                f"{file}: is not a sound safetensors file ({e}); the file is truncated, "
                "damaged or of another kind: save or copy it again"
            ],
        ) from e


def _read_header(
    file: Path, entries: set[str], alike: Alike
) -> tuple[dict[str, TensorInfo] | None, list[str]]:
    if file.name not in entries:
        pickles = [name for name in _PICKLES if name in entries]
        instead = f"; {pickles[0]} is a pickle, which is never read" if pickles else ""
        return None, [f"{file}: missing{instead}; save the weights with safetensors"]
    tensors = {}
    try:
        with _open_weights(file) as weights:
            for name in weights.keys():
                view = weights.get_slice(name)
                dtype = DTYPES.get(view.get_dtype())
                if dtype is None:
                    found, expected = view.get_dtype(), ", ".join(DTYPES)
                    alike.add(name, f"dtype {found}, expected one of {expected}; convert it")
                tensors[name] = TensorInfo(tuple(view.get_shape()), dtype or torch.float32)
    except AdapterError as e:
        return None, e.problems
    return tensors, []


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch from starting OpenMP's threads: vLLM may fork this process afterwards, and a
    child that inherits OpenMP without its threads hangs at its first parallel loop."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def _check_values(root: Path, names: set[str], config: AdapterConfig | None) -> list[str]:
    """Reads tensors once: finite, and zero past each expert's rank."""
    problems = []
    try:
        with _open_weights(root / WEIGHTS_FILE) as weights:
            for name in sorted(names):
                tensor = weights.get_tensor(name)
                bad = ~torch.isfinite(tensor)
                if bad.any():
                    where = bad.nonzero()[0].tolist()
                    problems.append(
                        f"{WEIGHTS_FILE}: tensor {name} has {int(bad.sum())} values that are NaN "
                        f"or Inf, the first at {where}, expected finite numbers; train or save "
                        "it again"
                    )
                for e, r, past in past_ranks(name, tensor, config) if config else ():
                    if past.any():
                        problems.append(
                            f"{WEIGHTS_FILE}: tensor {name} is not zero past rank {r} of expert "
                            f"{e} ({show(config.expert_names[e])[1:-1]}), expected zeros; set r "
                            "to its real rank or clear it"
                        )
    except AdapterError as e:
        problems += e.problems
    return problems
