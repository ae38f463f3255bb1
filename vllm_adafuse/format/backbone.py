"""What an adapter must know of its backbone, read from config.json without its weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm_adafuse.errors import AdapterError, brief
from vllm_adafuse.format.architectures import PREFIX, Architecture, find_architecture
from vllm_adafuse.format.places import backbone_problem, find_local_backbone
from vllm_adafuse.format.pretrained import check_sizes, plain_config, read_config
from vllm_adafuse.format.reading import MAX_INDEX_BYTES, FileProblem, read_object, where
from vllm_adafuse.format.tensor_file import TensorFile
from vllm_adafuse.text import show, some

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
        inner: whether it is the model without its head (`LlamaModel`).
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
    inner: bool = False

    @property
    def plain_name(self) -> str:
        """Its class, for `architectures` of a config.json."""
        return self.architecture.inner_name if self.inner else self.architecture.name

    @property
    def adafuse_name(self) -> str:
        """The same of what serves it with an adapter."""
        return PREFIX + self.plain_name

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

        names = getattr(hf_config, "architectures", None)
        architecture = find_architecture(names, path)
        check_sizes(lambda key: getattr(hf_config, key, None), path)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    plain_config(hf_config), trust_remote_code=False
                )
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
            inner=architecture.inner_name in [str(name).removeprefix(PREFIX) for name in names],
        )

    @classmethod
    def from_path(cls, path: str) -> Backbone:
        """Reads the backbone's config.json, never its code.

        Raises:
            AdapterError: no usable config there, or the architecture is not in the table.
        """
        here = os.path.isabs(path) or os.path.exists(path)  # else a hub name: not ours to judge
        if here and find_local_backbone(path) is None:
            raise AdapterError(f"backbone {path}", [backbone_problem(path)])
        return cls.from_hf_config(read_config(path), path)

    def require_head(self, tool: str) -> None:
        """Raises AdapterError for the model without its output head, which `tool` needs."""
        if self.inner and not self.tied:
            raise AdapterError(
                f"backbone {self.path}",
                [
                    f"config.json: `architectures` is {self.plain_name}: the model without its "
                    f"output head, which `{tool}` needs; name the checkpoint of "
                    f"{self.architecture.name} that it was made of"
                ],
            )

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
    require_safetensors(path, tool)
    root, files, loaded = Path(path), {}, {}
    try:
        if os.path.lexists(root / INDEX):
            files = {name: root / file for name, file in read_weight_map(root).items()}
        else:
            for file in sorted(root.glob("*.safetensors")):
                with TensorFile(file) as tensors:
                    files.update(dict.fromkeys(tensors.entries, file))
        own = {full_name(name): name for name in files}
        for name in names:
            if name in own:
                with TensorFile(files[own[name]]) as tensors:
                    if own[name] in tensors.entries:
                        loaded[name] = tensors.read(own[name])
    except FileProblem as e:
        raise AdapterError(f"backbone {where(path)}", [str(e)]) from e
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
    if os.path.lexists(root / INDEX) or any(root.glob("*.safetensors")):
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


def read_weight_map(root: Path) -> dict[str, str]:
    """Tensor -> name of the file beside the index that holds it.

    Raises:
        AdapterError: there is no usable index, or it leads out of the directory.
    """
    subject = f"backbone {root}"
    weight_map = read_object(root / INDEX, subject, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AdapterError(
            subject, [f"{INDEX}: `weight_map` is {show(weight_map)}, expected names of files"]
        )
    odd = {
        file if isinstance(file, str) else show(file)
        for file in weight_map.values()
        if not isinstance(file, str) or os.path.basename(file) != file or file in ("", ".", "..")
    }
    if odd:
        raise AdapterError(
            subject,
            [
                f"{INDEX}: `weight_map` names {some(sorted(odd))}, expected names of files beside "
                "it; copy the checkpoint again"
            ],
        )
    return weight_map
