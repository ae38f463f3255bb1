"""The decoder families that can carry an AdaFuse adapter: one line each.

A family belongs here if its vLLM class keeps the decoder at `.model` with
`embed_input_ids`, `.layers[i].input_layernorm` and vLLM's own linear layers, and its
Hugging Face class names them `model.embed_tokens` and `model.layers.{i}`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_adafuse.errors import AdapterError

PREFIX = "AdaFuse"


@dataclass(frozen=True)
class Architecture:
    """How one family differs from Llama.

    Attributes:
        name: the class name in Hugging Face's config.json and in vLLM.
        module: the module of `vllm.model_executor.models` that defines it.
        norm_offset: RMSNorm multiplies by `norm_offset + weight`.
        scaled_embedding: embeddings are multiplied by sqrt(hidden_size), rounded to
            the model's dtype, before the first layer.
        residual_norms: what o_proj and down_proj give goes nowhere but into the residual, added
            by the RMSNorm behind them. Allows a fusion; false is always right.
        rotary_follows: the rotary embedding takes queries and keys as their projection leaves
            them, and attention keys as the embedding leaves them and values as the projection.
            Allows a fusion; false is always right.
    """

    name: str
    module: str
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    residual_norms: bool = False
    rotary_follows: bool = False

    @property
    def adafuse_name(self) -> str:
        """The name under which the served class is registered with vLLM."""
        return PREFIX + self.name

    @property
    def inner_name(self) -> str:
        """The class of the model without its output head ("LlamaModel"), as embedding models are
        saved. vLLM finds the registered class for it, and embeds with it."""
        return self.name.removesuffix("ForCausalLM") + "Model"


_LLAMA_LIKE = {"residual_norms": True, "rotary_follows": True}

ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("LlamaForCausalLM", "llama", **_LLAMA_LIKE),
        Architecture("MistralForCausalLM", "mistral", **_LLAMA_LIKE),
        Architecture("Qwen2ForCausalLM", "qwen2", **_LLAMA_LIKE),
        Architecture("Qwen3ForCausalLM", "qwen3", residual_norms=True),  # norms of q and k between
        Architecture(
            "Gemma2ForCausalLM",
            "gemma2",
            norm_offset=1.0,
            scaled_embedding=True,
            rotary_follows=True,
        ),
        Architecture("Phi3ForCausalLM", "phi3", **_LLAMA_LIKE),
    )
}


def find_architecture(names: list[str] | None, where: str) -> Architecture:
    """The table's line for a config's `architectures` (AdaFuse names are accepted too).

    Args:
        names: `architectures` of a config.json.
        where: the file or directory to name in the error.

    Raises:
        AdapterError: none of the names is in the table.
    """
    for name in names if isinstance(names, list) else []:
        for architecture in ARCHITECTURES.values():
            if str(name).removeprefix(PREFIX) in (architecture.name, architecture.inner_name):
                return architecture
    raise AdapterError(
        f"backbone {where}",
        [
            f"config.json: architectures is {names}; AdaFuse adapters are served on "
            f"{', '.join(ARCHITECTURES)}. Use a backbone of one of these families"
        ],
    )
