"""What transformers reads of a backbone: its config and its tokenizer, never its code.

A checkpoint may bring Python files (`auto_map`), and the backbone that an adapter names may lie
inside the adapter. So every call says `trust_remote_code=False` (unset, transformers asks on a
terminal), and what a config claims is looked at before a class builds lists of it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_adafuse.errors import AdapterError, brief, is_panic
from vllm_adafuse.format.architectures import ARCHITECTURES, find_architecture
from vllm_adafuse.format.keys import CONFIG_FILE
from vllm_adafuse.format.reading import FileProblem, open_regular, read_object, where
from vllm_adafuse.text import show

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

MODEL_CONFIG = "config.json"
# Several times what the largest dense models have.
_MOST = {
    "num_hidden_layers": 512,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 13,
    "num_labels": 1 << 16,
}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MAX_TOKENIZER_BYTES = 128 << 20  # Gemma's take 34 MB
_NO_CODE = "no code of a model is ever run"


def read_config(path: str) -> PreTrainedConfig:
    """A backbone's config.json as transformers understands it.

    Args:
        path: its directory, or a hub name.

    Raises:
        AdapterError: no usable config there, one of a family that is not served or that needs
            code of its own, or sizes that no model has.
    """
    from transformers import AutoConfig

    if os.path.isdir(path):
        check_config(Path(path))
    try:
        hf_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_sizes(lambda key: getattr(hf_config, key, None), path)
        return _without_kernels(hf_config)
    except AdapterError:
        raise
    except Exception as e:  # transformers' checks of a config raise errors of many types
        raise AdapterError(f"backbone {where(path)}", [f"no usable config.json: {brief(e)}"]) from e


def check_config(root: Path) -> dict[str, Any]:
    """Reads a backbone's config.json before transformers does.

    Raises:
        AdapterError: as `read_config`.
    """
    config = read_object(root / MODEL_CONFIG, f"backbone {where(root)}")
    find_architecture(config.get("architectures"), str(root))
    _check_type(config.get("model_type"), "auto_map" in config, str(root))
    check_sizes(config.get, str(root))
    return config


def check_checkpoint(path: str | Path) -> None:
    """Looks at all files of a backbone before transformers loads its weights: one that is no file
    would block it, a damaged one end in an error without its name.

    Args:
        path: its directory; of a hub name nothing is known yet.

    Raises:
        AdapterError: as `read_config`, or for a file.
    """
    from vllm_adafuse.format.tensor_file import TensorFile

    root = Path(path)
    if not root.is_dir():
        return
    check_config(root)
    try:
        for file in sorted(root.iterdir()):
            if not file.exists() or file.is_dir():
                continue  # a link of a hub's cache to what was not downloaded, a folder
            if file.suffix == ".safetensors":
                TensorFile(file).close()
            else:
                open_regular(file).close()
    except FileProblem as e:
        raise AdapterError(f"backbone {where(path)}", [str(e)]) from e
    if os.path.lexists(root / CONFIG_FILE):
        raise AdapterError(
            f"backbone {where(path)}",
            [
                f"{CONFIG_FILE}: lies beside {MODEL_CONFIG}, and transformers would load that "
                "adapter, or another backbone that it names; move it away"
            ],
        )


def check_sizes(get: Callable[[str], Any], path: str) -> None:
    """Refuses sizes of which a model class would make lists and modules without end.

    Args:
        get: the config's value of a key, or None.
        path: the backbone, for the error.

    Raises:
        AdapterError: with every such size.
    """
    problems = [
        f"{MODEL_CONFIG}: `{key}` is {show(value)}, expected an integer from 1 to {most}; it is "
        "damaged, or of another kind of model"
        for key, most in _MOST.items()
        if (value := get(key)) is not None
        and not (type(value) is int and (1 if key != "num_labels" else 0) <= value <= most)
    ]
    if problems:
        raise AdapterError(f"backbone {where(path)}", problems)


def _check_type(model_type: Any, has_code: bool, path: str) -> None:
    """Refuses a `model_type` whose class is none of the table's."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names

    known = {kind: name for kind, name in names.items() if name in ARCHITECTURES}
    if isinstance(model_type, str) and model_type in known:
        return
    code = f", whose code lies beside it (`auto_map`); {_NO_CODE}" if has_code else ""
    raise AdapterError(
        f"backbone {where(path)}",
        [
            f"{MODEL_CONFIG}: `model_type` is {show(model_type)}{code}; expected one of "
            f"{', '.join(known)}"
        ],
    )


def plain_config(hf_config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config, of a class of transformers' own, without quantisation.

    A server that was told to trust a backbone's code has a config of the backbone's own class.
    """
    from transformers import CONFIG_MAPPING

    if type(hf_config).__module__.startswith("transformers."):
        plain = copy.deepcopy(hf_config)
    else:
        plain = CONFIG_MAPPING[hf_config.model_type].from_dict(hf_config.to_dict())
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return _without_kernels(plain)


def _without_kernels(hf_config: PreTrainedConfig) -> PreTrainedConfig:
    """A config may name a kernel on a hub as its attention: transformers would load its code."""
    hf_config._attn_implementation = None
    return hf_config


def load_tokenizer(base: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone on this machine.

    Args:
        base: its directory.

    Raises:
        AdapterError: there is none that works without code of its own.
    """
    from transformers import AutoTokenizer

    root = Path(base)
    check_config(root)
    try:
        for file in _tokenizer_files(root):
            with open_regular(file) as opened:
                size = os.fstat(opened.fileno()).st_size
            if size > MAX_TOKENIZER_BYTES:
                raise FileProblem(
                    f"{where(file)}: is {size} bytes long, expected at most {MAX_TOKENIZER_BYTES}"
                )
        tokenizer = AutoTokenizer.from_pretrained(
            root, local_files_only=True, trust_remote_code=False
        )
        _try(tokenizer)
        return tokenizer
    except FileProblem as e:
        problem = str(e)
    except BaseException as e:  # the tokenizers library raises Exception itself, and panics
        if not isinstance(e, Exception) and not is_panic(e):
            raise
        problem = brief(e)
        if "trust_remote_code" in str(e):
            problem = (
                f"tokenizer_config.json: `auto_map` names code that lies beside it; {_NO_CODE}: "
                "take a backbone whose tokenizer transformers has"
            )
    raise AdapterError(f"backbone {where(base)}", [f"no usable tokenizer: {problem}"])


def _try(tokenizer: PreTrainedTokenizerBase) -> None:
    """Uses it once: some of what is wrong with one shows only then."""
    ids = tokenizer("a b", **({"return_offsets_mapping": True} if tokenizer.is_fast else {}))
    tokenizer.decode(ids["input_ids"])
    tokenizer.convert_ids_to_tokens(0)
    for name in ("pad_token_id", "eos_token_id"):
        if not isinstance(value := getattr(tokenizer, name), (int, type(None))):
            raise ValueError(f"its {name} is {show(value)}")


def _tokenizer_files(root: Path) -> list[Path]:
    """Those that are there."""
    templates = root / "additional_chat_templates"
    more = sorted(templates.glob("*.jinja")) if templates.is_dir() else []
    return [file for name in _TOKENIZER_FILES if os.path.lexists(file := root / name)] + more
