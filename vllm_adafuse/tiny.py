"""Small random backbones of every supported family, with a tokenizer trained on the spot.

For the demo, the tests and anyone who wants to try the format without a download.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import torch
from vllm_adafuse.format.files import open_weights

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def real_texts() -> Iterator[str]:
    """Paragraphs of English prose and code that every Python carries: its language reference."""
    for topic in sorted(pydoc_data.topics.topics):
        for paragraph in pydoc_data.topics.topics[topic].split("\n\n"):
            if len(paragraph) > 80:
                yield " ".join(paragraph.split())


def real_prompts(count: int, words: int = 24) -> list[str]:
    """The beginnings of `count` different paragraphs."""
    seen: dict[str, None] = {}
    for text in real_texts():
        seen.setdefault(" ".join(text.split()[:words]))
    step = max(1, len(seen) // count)
    return list(seen)[::step][:count]


def save_tokenizer(path: Path, vocab_size: int) -> None:
    """Trains a byte-level BPE tokenizer on `real_texts` and saves it with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(real_texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[1]
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)


def tiny_config(architecture: str, **overrides):
    """A Hugging Face config of a supported family, about a million parameters.

    Args:
        architecture: a name of `vllm_adafuse.format.architectures.ARCHITECTURES`.
        **overrides: keys of the config.
    """
    import transformers

    config_class = getattr(transformers, architecture.removesuffix("ForCausalLM") + "Config")
    values = {
        "vocab_size": 1003,  # odd: vLLM pads the embedding
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": architecture in ("Gemma2ForCausalLM", "Qwen2ForCausalLM"),
        "sliding_window": None,
    }
    if architecture == "Gemma2ForCausalLM":
        values |= {"query_pre_attn_scalar": 32, "sliding_window": 64}
    config = config_class(**values | overrides)
    config.architectures = [architecture]
    return config


def make_tiny_backbone(
    path: str | Path,
    architecture: str = "LlamaForCausalLM",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides,
) -> Path:
    """Writes a random checkpoint with tokenizer and chat template.

    Args:
        path: the directory to make.
        architecture: a name of the architecture table.
        seed: of the weights.
        dtype: of the weights.
        **overrides: keys of the config.

    Returns:
        The directory.
    """
    from transformers import AutoModelForCausalLM

    path = Path(path)
    config = tiny_config(architecture, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Large enough that greedy tokens differ from place to place, norms off one.
                scale = 0.2 if "norm" in name or "bias" in name else parameter.shape[-1] ** -0.5
                parameter.add_(torch.randn_like(parameter) * scale)
    model.to(dtype).save_pretrained(path)
    open_weights(path, "config.json")
    save_tokenizer(path, config.vocab_size)
    return path
