"""What an adapter must know of its backbone, read from config.json without its weights."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm_adafuse.architectures import Architecture, find_architecture
from vllm_adafuse.errors import AdapterError, brief
from vllm_adafuse.places import backbone_problem, find_local_backbone

EMBEDDING = "model.embed_tokens.weight"
FIRST_NORM = "model.layers.0.input_layernorm.weight"
INDEX = "model.safetensors.index.json"
# transformers reads a pickle by torch's `weights_only`, which runs no code.
SAVE_AGAIN = (
    'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "M.from_pretrained('{path}', dtype='auto').save_pretrained('{out}'); "
    "T.from_pretrained('{path}').save_pretrained('{out}')\""
)


@dataclass(frozen=True)
class Backbone:
    """Names and shapes of a decoder's Hugging Face linears.

    Attributes:
        path: directory or hub name, for messages.
        architecture: its line in the table, None for a class that is not in it.
        hidden_size: H.
        num_layers: decoder layers.
        vocab_size: V, the rows of the embedding.
        norm_eps: epsilon of RMSNorm.
        linears: full name ("model.layers.0.self_attn.q_proj") -> (in, out).
        tied: whether the output head is the embedding.
        biased: those of the linears that add a bias.
    """

    path: str
    architecture: Architecture | None
    hidden_size: int
    num_layers: int
    vocab_size: int
    norm_eps: float
    linears: dict[str, tuple[int, int]]
    tied: bool = False
    biased: frozenset[str] = frozenset()

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
                [f"transformers cannot build the model of its config.json: {brief(e)}"],
            ) from e
        modules = {
            name: module
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
            linears={name: (m.in_features, m.out_features) for name, m in modules.items()},
            tied=bool(getattr(hf_config, "tie_word_embeddings", False)),
            biased=frozenset(name for name, m in modules.items() if m.bias is not None),
        )

    @classmethod
    def from_path(cls, path: str) -> Backbone:
        """Reads the backbone's config.json (never its code: `trust_remote_code` stays off).

        Raises:
            AdapterError: no readable config there, or the architecture is not in the table.
        """
        from transformers import AutoConfig

        here = os.path.isabs(path) or os.path.exists(path)  # else a hub name: not ours to judge
        if here and find_local_backbone(path) is None:
            raise AdapterError(f"backbone {path}", [backbone_problem(path)])
        try:
            hf_config = AutoConfig.from_pretrained(path)
        except Exception as e:  # transformers' checks of a config raise errors of many types
            raise AdapterError(f"backbone {path}", [f"no usable config.json: {brief(e)}"]) from e
        return cls.from_hf_config(hf_config, path)

    def modules(self) -> set[str]:
        """Leaf names of the linears: q_proj, k_proj, …"""
        return {name.rsplit(".", 1)[1] for name in self.linears}


def load_backbone_tensors(path: str, names: list[str], tool: str) -> dict[str, torch.Tensor]:
    """Reads single tensors of a checkpoint directory of safetensors files.

    Args:
        path: the directory.
        names: as a model for causal language has them; the inner model's files lack `model.`.
        tool: that needs them, for messages.

    Raises:
        AdapterError: no safetensors files there, or a tensor is missing.
    """
    loaded = read_backbone_tensors(path, names, tool)
    if missing := [name for name in names if name not in loaded]:
        raise AdapterError(
            f"backbone {path}",
            [f"tensor {name} is in none of its safetensors files" for name in missing],
        )
    return loaded


def read_backbone_tensors(path: str, names: list[str], tool: str) -> dict[str, torch.Tensor]:
    """As `load_backbone_tensors`, those of them that are there."""
    from safetensors import SafetensorError, safe_open

    require_safetensors(path, tool)
    root = Path(path)
    index = root / INDEX
    files, loaded = {}, {}
    try:
        if index.is_file():
            held = json.loads(index.read_text("utf-8"))["weight_map"]
            files = {name: root / file for name, file in held.items()}
        else:
            for file in sorted(root.glob("*.safetensors")):
                with safe_open(file, framework="pt") as tensors:
                    files.update(dict.fromkeys(tensors.keys(), file))
        own = {full_name(name): name for name in files}
        for name in names:
            if name in own:
                with safe_open(files[own[name]], framework="pt") as tensors:
                    loaded[name] = tensors.get_tensor(own[name])
    except (OSError, SafetensorError) as e:
        raise AdapterError(
            f"backbone {path}", [f"its safetensors files cannot be read ({e}); copy them again"]
        ) from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise AdapterError(
            f"backbone {path}",
            [f"{index.name}: expected a JSON object with weight_map, found none ({e!r})"],
        ) from e
    return loaded


def full_name(name: str) -> str:
    """A tensor's name in a model for causal language; the inner model's files lack `model.`."""
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.", "norm.")) else name


def require_safetensors(path: str, tool: str) -> None:
    """Says at once that a tool cannot read a backbone's weights, and what to do.

    Args:
        path: the backbone's directory.
        tool: that reads weights.

    Raises:
        AdapterError: it has no safetensors file.
    """
    root = Path(path)
    if (root / INDEX).is_file() or any(root.glob("*.safetensors")):
        return
    pickle = next(iter(sorted(root.glob("*.bin")) + sorted(root.glob("*.pt*"))), None)
    reason, way_out = f"`{tool}` reads them", "name a directory that has them"
    if pickle is not None:
        reason += f", and never a pickle ({pickle.name}), which can hold code"
        out = f"{str(root).rstrip('/')}-safetensors"
        way_out = f"save it again so: {SAVE_AGAIN.format(path=root, out=out)}"
    raise AdapterError(
        f"backbone {path}",
        [
            f"model.safetensors is not in it, expected its weights as safetensors: {reason}; "
            f"{way_out}"
        ],
    )
