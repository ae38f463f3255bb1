"""What an adapter is, in one number: a hash of its config and of every byte of its tensors.

It tells two adapters apart that lie at one path, and finds one that lies at two.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import torch
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import open_weights
from vllm_adafuse.format.config import CONFIG_FILE, WEIGHTS_FILE
from vllm_adafuse.format.reading import read_object, reason, where

# Says where another directory lies, not what this one holds.
_PLACES = ("base_model_name_or_path",)


def content_hash(path: str | Path) -> str:
    """The SHA-256 of an adapter's config and of the name, dtype, shape and bytes of each tensor.

    Directory, file times, white space in the config, and the order of its keys and of the tensors
    make no difference, nor does the path of the backbone. AdaFuse adapters and PEFT's LoRAs have
    one alike. Memory is constant, whatever the size of the adapter.

    Args:
        path: the directory, with adapter_config.json and adapter_model.safetensors.

    Returns:
        64 hexadecimal digits.

    Raises:
        AdapterError: a file is missing, damaged, or changes while it is read.
    """
    root = Path(os.path.abspath(os.path.expanduser(path)))
    config = read_object(root / CONFIG_FILE, f"adapter {where(root)}")
    config = {key: value for key, value in config.items() if key not in _PLACES}
    with open_weights(root / WEIGHTS_FILE) as weights:
        names = sorted(weights.entries)
        table = [[name, weights.entries[name].dtype, weights.entries[name].shape] for name in names]
        # Names, dtypes and shapes come first: they say where each tensor's bytes end.
        text = json.dumps([config, table], sort_keys=True, ensure_ascii=True)
        digest = hashlib.sha256(text.encode())
        digest.update(b"\n")
        for name in names:
            entry = weights.entries[name]
            for piece in weights.pieces(entry.start, entry.end, torch.uint8):
                digest.update(piece.numpy())
    return digest.hexdigest()


def written_at(path: str | Path) -> str:
    """When an adapter's weights were last written: UTC, to the second ("2026-11-30T09:26:25Z").

    Raises:
        OSError: they are not there.
    """
    seconds = os.stat(Path(path, WEIGHTS_FILE)).st_mtime
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def file_identity(path: str | Path) -> tuple:
    """What changes whenever one of an adapter's two files is replaced or written to: cheap to ask
    again, where the hash was equal before.

    Raises:
        AdapterError: a file is missing or cannot be asked about.
    """
    try:
        stats = [os.stat(Path(path, name)) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    except OSError as e:
        raise AdapterError(
            f"adapter {where(path)}", [f"{e.filename}: {reason(e)}; put it back"]
        ) from e
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats)
