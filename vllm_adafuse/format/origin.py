"""Which backbone an adapter was made on: a hash of the weights that its routes depend on.

Routers read embeddings, mostly through the first norm. On another backbone of the same shape an
adapter loads and runs, and tokens go to other experts than those it was trained with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import torch
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.backbone import EMBEDDING, FIRST_NORM, load_backbone_tensors
from vllm_adafuse.format.config import BASE_HASH, CONFIG_FILE, AdapterConfig
from vllm_adafuse.format.values import one_thread

# Rows hashed at once.
_ROWS = 4096


def backbone_hash(path: str) -> str:
    """The SHA-256 of a backbone's embedding and first norm: names, shapes, and values rounded to
    bfloat16, so that a checkpoint, its cast to bfloat16 and one with quantised linears are one.

    Args:
        path: its directory.

    Returns:
        64 hexadecimal digits.

    Raises:
        AdapterError: its weights cannot be read.
    """
    return tensors_hash(load_backbone_tensors(path, [EMBEDDING, FIRST_NORM], BASE_HASH))


@one_thread()
def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """As `backbone_hash`, of the two tensors themselves (any float dtype, on any device)."""
    digest = hashlib.sha256()
    for name in (EMBEDDING, FIRST_NORM):
        digest.update(json.dumps([name, list(tensors[name].shape)]).encode())
        for part in tensors[name].detach().split(_ROWS):
            digest.update(part.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def known_hash(path: str) -> str:
    """`backbone_hash`, or "" where a backbone's weights are not there to be read."""
    try:
        return backbone_hash(path)
    except AdapterError:
        return ""


def origin_problem(
    config: AdapterConfig, path: str, hash_of: Callable[[str], str] = backbone_hash
) -> str | None:
    """What to say of an adapter on this backbone: None if it was made on it, or does not say.

    Args:
        config: of the adapter.
        path: of the backbone, its directory.
        hash_of: `backbone_hash`, or one that remembers.
    """
    if not config.base_hash:
        return None
    try:
        found = hash_of(path)
    except AdapterError as e:
        return (
            f"{CONFIG_FILE}: `{BASE_HASH}` is {config.base_hash}, which cannot be compared with "
            f"the backbone {path}: {'; '.join(e.problems)}"
        )
    if found == config.base_hash:
        return None
    return (
        f"{CONFIG_FILE}: `{BASE_HASH}` is {config.base_hash}, but the backbone {path} has {found}: "
        "its embedding or first norm is not the one that the routes were made for, so tokens meet "
        f"other experts; take the backbone that it was made on ({config.base_model})"
    )
