"""Files that others may read: safetensors and what builds on it give their files mode 0600."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Writes a safetensors file with the mode that any new file here gets, or keeps a file's.

    Args:
        tensors: name -> contiguous tensor on the CPU.
        file: to write or replace.
    """
    from safetensors.torch import save_file

    file.touch()  # by umask, or a directory's default ACL
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)


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
