"""An adapter directory: its config, the table of its tensors, and every check of the format.

Only safetensors is ever read; nothing in an adapter can run code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_adafuse.backbone import Backbone
from vllm_adafuse.config import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig, parse_config
from vllm_adafuse.errors import AdapterError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MAX_CONFIG_BYTES = 16 << 20
_LORA = re.compile(r"(model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+))\.lora_([AB])")
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, from the file's header."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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
        """Full names of the adapted linears, in file order ("model.layers.0.mlp.up_proj")."""
        return [name.removesuffix(".lora_A") for name in self.tensors if name.endswith(".lora_A")]

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
    """Collects every problem of an adapter directory, in the order files, config, tensors, values.

    Args:
        path: the directory.
        backbone: also check names and shapes against it.
        values: also read every tensor (NaN, Inf, rows past an expert's rank).

    Returns:
        The adapter (None if its files cannot be read), and the problems: none means usable.
    """
    root = Path(os.path.abspath(Path(path).expanduser()))
    problems = _check_directory(root)
    if problems:
        return None, problems
    raw, problems = _read_json(root / CONFIG_FILE)
    config = None
    if not problems:
        config, problems = parse_config(raw)
    tensors, file_problems = _read_header(root)
    problems += file_problems
    if config is None or tensors is None:
        return None, problems
    adapter = Adapter(root, config, tensors)
    shape_problems = _check_tensors(adapter)
    if backbone is not None:
        shape_problems += _check_backbone(adapter, backbone)
    problems += shape_problems
    if values and not shape_problems:
        problems += _check_values(adapter)
    return adapter, problems


def _reason(e: OSError) -> str:
    return e.strerror or str(e)


def _check_directory(root: Path) -> list[str]:
    try:
        entries = {entry.name for entry in os.scandir(root)}
    except FileNotFoundError:
        return [f"{root}: no such directory; name the directory that holds {CONFIG_FILE}"]
    except NotADirectoryError:
        return [f"{root}: is a file, expected the directory that holds {CONFIG_FILE}"]
    except OSError as e:
        return [f"{root}: cannot be read ({_reason(e)}); check its permissions and links"]
    problems = []
    if CONFIG_FILE not in entries:
        problems.append(f"{root / CONFIG_FILE}: missing; an adapter directory holds this file")
    if WEIGHTS_FILE not in entries:
        pickles = [name for name in _PICKLES if name in entries]
        instead = f" ({pickles[0]} is a pickle, which is never read)" if pickles else ""
        problems.append(
            f"{root / WEIGHTS_FILE}: missing{instead}; save the weights with safetensors"
        )
    return problems


def _read_json(file: Path) -> tuple[object, list[str]]:
    repeated: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> dict:
        keys = [key for key, _ in items]
        repeated.extend(sorted({key for key in keys if keys.count(key) > 1}))
        return dict(items)

    try:
        if (size := file.stat().st_size) > MAX_CONFIG_BYTES:
            return None, [f"{file}: {size} bytes, expected at most {MAX_CONFIG_BYTES}"]
        raw = json.loads(file.read_text("utf-8"), object_pairs_hook=pairs)
    except OSError as e:
        return None, [f"{file}: cannot be read ({_reason(e)})"]
    except (ValueError, RecursionError) as e:
        return None, [f"{file}: is not valid JSON ({e}); write it again as UTF-8 JSON"]
    return raw, [f"{file}: key `{key}` stands there twice; keep one" for key in repeated]


@contextmanager
def _open_weights(file: Path) -> Iterator:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except OSError as e:
        raise AdapterError(f"adapter {file.parent}", [f"{file}: cannot be read ({_reason(e)})"])
    except SafetensorError as e:
        raise AdapterError(
            f"adapter {file.parent}",
            [
                f"{file}: is not a sound safetensors file ({e}); the file is truncated, "
                "damaged or of another kind: save or copy it again"
            ],
        ) from e


def _read_header(root: Path) -> tuple[dict[str, TensorInfo] | None, list[str]]:
    problems, tensors = [], {}
    try:
        with _open_weights(root / WEIGHTS_FILE) as weights:
            for name in weights.keys():
                view = weights.get_slice(name)
                dtype = DTYPES.get(view.get_dtype())
                if dtype is None:
                    problems.append(
                        f"{WEIGHTS_FILE}: tensor {name} has dtype {view.get_dtype()}, "
                        f"expected one of {', '.join(DTYPES)}"
                    )
                tensors[name] = TensorInfo(tuple(view.get_shape()), dtype or torch.float32)
    except AdapterError as e:
        return None, e.problems
    return tensors, problems


def _expect_shape(adapter: Adapter, name: str, shape: tuple[int, ...], why: str) -> list[str]:
    found = adapter.tensors[name].shape
    if found == shape:
        return []
    return [
        f"{WEIGHTS_FILE}: tensor {name} has shape {list(found)}, expected {list(shape)} ({why})"
    ]


def _check_tensors(adapter: Adapter) -> list[str]:
    """Names, pairs and the dimensions that the config alone fixes."""
    config, tensors, problems = adapter.config, adapter.tensors, []
    experts, rank = config.num_experts, config.rank
    if "router.weight" not in tensors:
        problems.append(f"{WEIGHTS_FILE}: tensor router.weight is missing; it is required")
    elif len(shape := tensors["router.weight"].shape) != 2 or shape[0] != experts:
        problems.append(
            f"{WEIGHTS_FILE}: tensor router.weight has shape {list(shape)}, "
            f"expected [{experts}, hidden] (num_experts is {experts})"
        )
    if "router.bias" in tensors:
        problems += _expect_shape(adapter, "router.bias", (experts,), "[num_experts]")
    for name, info in tensors.items():
        if name in ("router.weight", "router.bias"):
            continue
        match = _LORA.fullmatch(name)
        if not match:
            problems.append(
                f"{WEIGHTS_FILE}: unknown tensor {name}; expected router.weight, router.bias or "
                "model.layers.{i}.{self_attn or mlp}.{module}.lora_A / lora_B"
            )
            continue
        projection, _, module, side = match.groups()
        other = f"{projection}.lora_{'B' if side == 'A' else 'A'}"
        if other not in tensors:
            problems.append(
                f"{WEIGHTS_FILE}: tensor {name} is half a pair; expected {other} beside it"
            )
        if module not in config.target_modules:
            problems.append(
                f"{WEIGHTS_FILE}: tensor {name} belongs to module {module}, but target_modules "
                f"lists only {', '.join(config.target_modules)}; list it or leave the tensor out"
            )
        dims = [experts, rank, "in"] if side == "A" else [experts, "out", rank]
        if len(info.shape) != 3 or any(
            isinstance(want, int) and want != have for want, have in zip(dims, info.shape)
        ):
            problems.append(
                f"{WEIGHTS_FILE}: tensor {name} has shape {list(info.shape)}, expected "
                f"[{', '.join(map(str, dims))}] (num_experts is {experts}, the largest r is {rank})"
            )
    if not adapter.projections and not problems:
        problems.append(f"{WEIGHTS_FILE}: holds no lora_A / lora_B pair; nothing would be adapted")
    return problems


def _check_backbone(adapter: Adapter, backbone: Backbone) -> list[str]:
    """Names and dimensions that the backbone fixes."""
    config, problems = adapter.config, []
    made_for = f"the backbone {backbone.path}; this adapter was made for {config.base_model}"
    for module in config.target_modules:
        if module not in backbone.modules():
            problems.append(
                f"{CONFIG_FILE}: target_modules lists {module}, which {made_for} does not have; "
                f"it has {', '.join(sorted(backbone.modules()))}"
            )
    router = adapter.tensors.get("router.weight")
    if router and len(router.shape) == 2 and router.shape[1] != backbone.hidden_size:
        problems.append(
            f"{WEIGHTS_FILE}: tensor router.weight has shape {list(router.shape)}, expected "
            f"[{config.num_experts}, {backbone.hidden_size}] for {made_for}"
        )
    for name in adapter.tensors:
        match = _LORA.fullmatch(name)
        if not match:
            continue
        projection, layer, module, side = match.groups()
        if int(layer) >= backbone.num_layers:
            problems.append(
                f"{WEIGHTS_FILE}: tensor {name} is for layer {layer}, expected layers 0 to "
                f"{backbone.num_layers - 1} for {made_for}"
            )
        elif projection not in backbone.linears:
            if module in backbone.modules() or module not in config.target_modules:
                problems.append(f"{WEIGHTS_FILE}: tensor {name} fits no linear of {made_for}")
        else:
            size_in, size_out = backbone.linears[projection]
            experts, rank = config.num_experts, config.rank
            shape = (experts, rank, size_in) if side == "A" else (experts, size_out, rank)
            problems += _expect_shape(adapter, name, shape, made_for)
    return problems


def _check_values(adapter: Adapter) -> list[str]:
    """Reads every tensor once: finite, and zero past each expert's rank."""
    config, problems = adapter.config, []
    short = [(e, r) for e, r in enumerate(config.ranks) if r < config.rank]
    try:
        with adapter.reader() as read:
            for name in adapter.tensors:
                tensor = read(name)
                bad = ~torch.isfinite(tensor)
                if bad.any():
                    where = bad.nonzero()[0].tolist()
                    problems.append(
                        f"{WEIGHTS_FILE}: tensor {name} has {int(bad.sum())} values that are NaN "
                        f"or Inf, the first at {where}; expected finite numbers"
                    )
                for e, r in short if _LORA.fullmatch(name) else ():
                    past = tensor[e, r:] if name.endswith("A") else tensor[e, :, r:]
                    if past.any():
                        problems.append(
                            f"{WEIGHTS_FILE}: tensor {name} is not zero past rank {r} of expert "
                            f"{e} ({config.expert_names[e]}); set r to its real rank or clear it"
                        )
    except AdapterError as e:
        problems += e.problems
    return problems
