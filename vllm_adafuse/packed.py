"""Weights in a third of bfloat16's bytes, for the demo's models: whole steps of each row's largest
value, compressed; and tokenizers, compressed."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save, save_file
from vllm_adafuse.errors import AdapterError

STEPS = 31  # of a row's largest value; 63 levels, some five bits of a normal weight
SCALE = ".scale"
SUFFIX = ".safetensors.xz"
TOKENIZER = "tokenizer.json"


def pack(tensors: dict[str, torch.Tensor]) -> bytes:
    """Rounds tensors and compresses them.

    Args:
        tensors: floating-point, each with one dimension or more.

    Returns:
        The content of a packed file.
    """
    packed = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 1:  # norms: few, and each counts
            packed[name] = tensor.bfloat16()
            continue
        scale = (tensor.float().abs().amax(-1, keepdim=True) / STEPS).bfloat16()
        steps = tensor.float() / scale.float().clamp(min=torch.finfo(torch.bfloat16).tiny)
        packed[name], packed[name + SCALE] = steps.round().to(torch.int8), scale
    return _compress(save(packed))


def _compress(content: bytes) -> bytes:
    return lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)


def unpack(content: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a packed file, in bfloat16.

    Raises:
        AdapterError: it is no such file.
    """
    try:
        packed = load(lzma.decompress(content))
    except (lzma.LZMAError, ValueError, OSError) as e:
        raise AdapterError("packed weights", [f"not a packed file of tensors: {e}"]) from e
    tensors = {name: value for name, value in packed.items() if not name.endswith(SCALE)}
    for name, value in tensors.items():
        if name + SCALE in packed:
            tensors[name] = (value.float() * packed[name + SCALE].float()).bfloat16()
    return tensors


def unpack_directory(packed: Path, out: Path) -> None:
    """Copies a checkpoint or an adapter, or a folder of them, its weights and tokenizer unpacked.

    Args:
        packed: has files NAME.safetensors.xz where others have NAME.safetensors, and
            tokenizer.json.xz.
        out: the directory to make.

    Raises:
        AdapterError: one of them is no packed file.
    """
    shutil.copytree(packed, out)
    for file in sorted(out.rglob(f"*{SUFFIX}")):
        tensors = unpack(file.read_bytes())
        save_file(tensors, file.with_suffix(""), metadata={"format": "pt"})
        file.unlink()
    for file in sorted(out.rglob(f"{TOKENIZER}.xz")):
        try:
            file.with_suffix("").write_bytes(lzma.decompress(file.read_bytes()))
        except lzma.LZMAError as e:
            raise AdapterError(str(packed), [f"{file.name}: not a packed tokenizer: {e}"]) from e
        file.unlink()


def pack_directory(directory: Path) -> None:
    """Packs a directory's weights and tokenizer in their place."""
    for file in sorted(directory.rglob("*.safetensors")):
        file.with_name(file.name + ".xz").write_bytes(pack(load_file(file)))
        file.unlink()
    for file in sorted(directory.rglob(TOKENIZER)):
        file.with_name(file.name + ".xz").write_bytes(_compress(file.read_bytes()))
        file.unlink()
