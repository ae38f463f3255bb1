"""What an adapter must know of its backbone, read from config.json without its weights."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm_adafuse.architectures import Architecture, find_architecture
from vllm_adafuse.errors import AdapterError

EMBEDDING = "model.embed_tokens.weight"
FIRST_NORM = "model.layers.0.input_layernorm.weight"


@dataclass(frozen=True)
class Backbone:
    """Names and shapes of a decoder's Hugging Face linears.

    Attributes:
        path: directory or hub name, for messages.
        architecture: its line in the table.
        hidden_size: H.
        num_layers: decoder layers.
        vocab_size: V, the rows of the embedding.
        norm_eps: epsilon of RMSNorm.
        linears: full name ("model.layers.0.self_attn.q_proj") -> (in, out).
    """

    path: str
    architecture: Architecture
    hidden_size: int
    num_layers: int
    vocab_size: int
    norm_eps: float
    linears: dict[str, tuple[int, int]]

    @classmethod
    def from_hf_config(cls, hf_config: Any, path: str) -> Backbone:
        """Builds the model on the meta device (no memory) and lists its linears.

        Args:
            hf_config: the `PretrainedConfig` of the backbone.
            path: directory or hub name, for messages.

        Raises:
            AdapterError: the architecture is not in the table, or its model cannot be built.
        """
        from transformers import AutoModelForCausalLM

        architecture = find_architecture(getattr(hf_config, "architectures", None), path)
        plain = copy.deepcopy(hf_config)
        if hasattr(plain, "quantization_config"):
            del plain.quantization_config
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(plain)
        except Exception as e:  # whatever a model's code makes of a damaged config
            raise AdapterError(
                f"backbone {path}",
                [f"transformers cannot build the model of its config.json: {e!r}"],
            ) from e
        linears = {
            name: (module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and name.startswith("model.layers.")
        }
        return cls(
            path=path,
            architecture=architecture,
            hidden_size=hf_config.hidden_size,
            num_layers=hf_config.num_hidden_layers,
            vocab_size=hf_config.vocab_size,
            norm_eps=hf_config.rms_norm_eps,
            linears=linears,
        )

    @classmethod
    def from_path(cls, path: str) -> Backbone:
        """Reads the backbone's config.json (never its code: `trust_remote_code` stays off).

        Raises:
            AdapterError: no readable config there, or the architecture is not in the table.
        """
        from transformers import AutoConfig

        try:
            hf_config = AutoConfig.from_pretrained(path)
        except Exception as e:  # transformers' checks of a config raise errors of many types
            raise AdapterError(f"backbone {path}", [f"no usable config.json: {e}"]) from e
        return cls.from_hf_config(hf_config, path)

    def modules(self) -> set[str]:
        """Leaf names of the linears: q_proj, k_proj, …"""
        return {name.rsplit(".", 1)[1] for name in self.linears}


def find_local_backbone(name: str) -> Path | None:
    """The directory of a backbone on this machine, without asking the network.

    Args:
        name: a directory, or a hub name whose snapshot is in the Hugging Face cache.

    Returns:
        The directory that holds its config.json, or None.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if (Path(name) / "config.json").is_file():
        return Path(name)
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path that does not exist is no hub name
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def load_backbone_tensors(path: str, names: list[str]) -> dict[str, torch.Tensor]:
    """Reads single tensors of a checkpoint directory of safetensors files.

    Raises:
        AdapterError: no safetensors files there, or a tensor is missing.
    """
    from safetensors import SafetensorError, safe_open

    root = Path(path)
    index = root / "model.safetensors.index.json"
    files, loaded = {}, {}
    try:
        if index.is_file():
            weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            files = {name: root / weight_map[name] for name in names if name in weight_map}
        else:
            for file in sorted(root.glob("*.safetensors")):
                with safe_open(file, framework="pt") as tensors:
                    files.update({name: file for name in names if name in tensors.keys()})
        for name, file in files.items():
            with safe_open(file, framework="pt") as tensors:
                loaded[name] = tensors.get_tensor(name)
    except (OSError, SafetensorError) as e:
        raise AdapterError(
            f"backbone {path}", [f"its safetensors files cannot be read ({e}); copy them again"]
        ) from e
    except (ValueError, KeyError, TypeError) as e:
        raise AdapterError(
            f"backbone {path}",
            [f"{index.name}: expected a JSON object with weight_map, found none ({e!r})"],
        ) from e
    if missing := [name for name in names if name not in files]:
        raise AdapterError(
            f"backbone {path}",
            [f"tensor {name} is in none of its safetensors files" for name in missing],
        )
    return loaded
