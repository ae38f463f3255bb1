"""Files that others may read: safetensors and what builds on it give their files mode 0600."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Writes a safetensors file with the mode that any new file here gets, or keeps a file's.

    What safetensors' own `save_file` writes, which copies every tensor first and takes none that
    lie in one another's memory. What stood there may be what the tensors were read from, and be
    mapped into memory: it is whole until the new file is.

    Args:
        tensors: name -> contiguous tensor on the CPU.
        file: to write or replace.

    Raises:
        OSError: it cannot be written.
        ValueError: a tensor is of another kind; nothing is written.
    """
    import torch
    from vllm_adafuse.format.tensor_file import TORCH_DTYPES

    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    for name, value in tensors.items():
        if value.dtype not in names or not value.is_contiguous() or value.device.type != "cpu":
            raise ValueError(
                f"tensor {name}: {value.dtype} on {value.device}, strides {value.stride()}; "
                f"expected contiguous on the CPU, of {', '.join(TORCH_DTYPES)}"
            )
    # Wide dtypes first, so that all lie at multiples of their widths.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        value, begin = tensors[name], end
        end += value.numel() * value.dtype.itemsize
        header[name] = {
            "dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file = Path(os.path.realpath(file))
    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                out.write(tensors[name].detach().reshape(-1).view(torch.uint8).numpy())
        if file.exists():
            part.chmod(file.stat().st_mode)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def open_weights(directory: Path, like: str) -> None:
    """Gives the safetensors files of a directory that another library wrote the mode of a file
    beside them, which was written by umask.

    Args:
        directory: of a checkpoint.
        like: name of that file.
    """
    mode = (directory / like).stat().st_mode
    for file in directory.glob("*.safetensors"):
        file.chmod(mode)
