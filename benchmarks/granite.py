"""Granite Switch with random weights, for `benchmarks.engine`: LoRAs in the model, one active.

`pip install granite-switch==0.1.1`, which needs vLLM 0.26 to 0.30, brings the model and, as a
plugin, tells vLLM of it. Made for its checkpoints, it lacks what vLLM's dummy loader asks of a
model: fused weights are built in `load_weights`, which that loader does not call, and the code book
by which adapters are found again is a buffer, which it would fill with noise. A loader of our own
does both. Importing this module registers it; vLLM's workers import it for `Extension`.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

FORMAT = "granite_random"
# Arguments of `vllm.LLM` beside those of other engines.
ARGUMENTS = {"load_format": FORMAT, "worker_extension_cls": "benchmarks.granite.Extension"}
FIRST_TOO_NEW = (0, 31)  # of vLLM, for granite-switch 0.1.1
# What a backbone's config and Granite Switch's call by the same name.
SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "hidden_act",
    "dtype",
)


class Extension:
    """Nothing; named in `ARGUMENTS`, it has vLLM's workers import this module."""


@register_model_loader(FORMAT)
class RandomWeights(DummyModelLoader):
    """vLLM's dummy loader, with what Granite Switch does when it has loaded a checkpoint."""

    def load_weights(self, model: torch.nn.Module, model_config) -> None:
        if model.model.switch is None:  # no LoRAs
            super().load_weights(model, model_config)
            return
        codebook = model.model.switch.codebook
        kept = codebook.clone()
        super().load_weights(model, model_config)
        codebook.copy_(kept)
        model.model.decoder_interface.finalize_modules(model, model.config)


def check_installed() -> None:
    """
    Raises:
        RuntimeError: the package is not installed, or does not run with this vLLM.
    """
    try:
        version("granite-switch")
    except PackageNotFoundError as e:
        raise RuntimeError(
            "engine granite: the package granite-switch is not installed; "
            "pip install --no-deps granite-switch==0.1.1, or leave the engine out"
        ) from e
    from vllm import __version__ as vllm

    if tuple(int(part) for part in vllm.split(".")[:2]) >= FIRST_TOO_NEW:
        raise RuntimeError(
            f"engine granite: vLLM is {vllm}, granite-switch 0.1.1 needs 0.26 to 0.30; "
            "install such a vLLM, or leave the engine out"
        )


def config(backbone: dict, count: int, r: int) -> dict:
    """The config.json of a backbone's shape with `count` LoRAs of rank r on all linears.

    The last `count` ids of the vocabulary switch the LoRAs on.

    Args:
        backbone: config.json of the bare backbone.
        count: 0 for Granite Switch's own bare model.
    """
    # Its switch has two layers of keys and values, which count as layers.
    layers = backbone["num_hidden_layers"] + (2 if count else 0)
    vocab = backbone["vocab_size"]
    same = {key: backbone[key] for key in SAME if key in backbone}
    model = same | {
        "architectures": ["GraniteSwitchForCausalLM"],
        "model_type": "granite_switch",
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "shared_intermediate_size": backbone["intermediate_size"],
        "num_local_experts": 0,
        "position_embedding_type": "rope",
        "attention_multiplier": backbone["head_dim"] ** -0.5,
        "tie_word_embeddings": False,
        "fused_add_norm": True,  # as Llama and Mistral add and norm
        "num_adapters": count,
    }
    if not count:
        return model
    return model | {
        "adapter_names": [f"lora{i}" for i in range(count)],
        "adapter_token_ids": list(range(vocab - count, vocab)),
        "adapter_substitute_token_ids": list(range(3, 3 + count)),
        "adapter_ranks": [r] * count,
        "max_lora_rank": r,
        "ms_code_m": 6,
    }


def write_config(base: Path, out: Path, count: int, r: int) -> list[int]:
    """A checkpoint directory with nothing but a config.json; returns its control tokens.

    Raises:
        RuntimeError: as `check_installed`.
    """
    check_installed()
    content = config(json.loads((base / "config.json").read_text()), count, r)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(content, indent=1))
    return content.get("adapter_token_ids", [])
