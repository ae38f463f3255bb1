"""What an adapter is, in one number: a hash of its config and of every byte of its tensors.

It tells two adapters apart that lie at one path, and finds one that lies at two.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from vllm_adafuse.adapter import open_weights, read_json
from vllm_adafuse.config import CONFIG_FILE, WEIGHTS_FILE, some
from vllm_adafuse.errors import AdapterError

_CHUNK = 1 << 20
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
    config, repeated = read_json(root / CONFIG_FILE)
    problems = [f"{CONFIG_FILE}: key `{some(repeated)}` stands there twice; keep one"]
    if not isinstance(config, dict):
        problems = [f"{CONFIG_FILE}: holds a {type(config).__name__}, expected a JSON object"]
    elif not repeated:
        problems = []
    if problems:
        raise AdapterError(f"adapter {root}", problems)
    return _hash(root / WEIGHTS_FILE, {k: v for k, v in config.items() if k not in _PLACES})


def _hash(file: Path, config: dict[str, Any]) -> str:
    with open_weights(file) as tensors:  # also checks the header that is read again below
        names = sorted(tensors.keys())
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
            table = [[name, header[name]["dtype"], header[name]["shape"]] for name in names]
            # Names, dtypes and shapes come first: they say where each tensor's bytes end.
            text = json.dumps([config, table], sort_keys=True, ensure_ascii=True)
            digest = hashlib.sha256(text.encode())
            digest.update(b"\n")
            for name in names:
                start, end = header[name]["data_offsets"]
                opened.seek(8 + length + start)
                _update(digest, opened, end - start)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as e:
        raise AdapterError(
            f"adapter {file.parent}",
            [f"{file}: changed while it was read ({e!r}); wait until it is written, then try again"],
        ) from e
    return digest.hexdigest()


def _update(digest: Any, opened: BinaryIO, nbytes: int) -> None:
    """Adds so many bytes of the file, from where it stands."""
    while nbytes:
        data = opened.read(min(_CHUNK, nbytes))
        if not data:
            raise EOFError(f"{nbytes} bytes are missing")
        digest.update(data)
        nbytes -= len(data)
