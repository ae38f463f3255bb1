"""Turns a backbone's config into that of an adapted model, in vLLM's front end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from vllm.logger import init_logger
from vllm_adafuse import __version__
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import check_adapter, load_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import (
    ADAPTER_KEY,
    CONTENT_KEY,
    FINGERPRINT_KEY,
    SECTION,
    AdapterConfig,
)
from vllm_adafuse.format.context_keys import CONTEXT_KEY
from vllm_adafuse.format.digest import content_hash, written_at
from vllm_adafuse.format.origin import origin_problem
from vllm_adafuse.format.places import CONFIGS, backbone_problem, find_local_backbone
from vllm_adafuse.serving.options import OVERRIDE, check_section, option, refuse

# vLLM shows only what is logged below its own name.
logger = init_logger("vllm.adafuse")
# Why this vLLM's runners do not say whose a step's tokens are: kind of runner -> what is missing.
UNSEEN: dict[str, str] = {}


def attach_adapter(hf_config: Any, model: str) -> None:
    """Checks the adapter that a config names and sets the architecture that serves it.

    The adapter is named by `adafuse_adapter` (a directory; from `--hf-overrides`) or by the
    section `adafuse` of a composed checkpoint (relative to that checkpoint). What the workers
    need is left in `hf_config.adafuse`. It holds the adapter's fingerprint, because vLLM's
    compile cache is keyed by the config: an adapter of another shape must not meet old graphs.

    Args:
        hf_config: the backbone's `PretrainedConfig`, changed.
        model: the path or hub name given to vLLM.

    Raises:
        AdapterError: the adapter or the backbone cannot be used.
    """
    path = _adapter_path(hf_config, model)
    refuse(check_section(getattr(hf_config, SECTION, None)))
    backbone = Backbone.from_hf_config(hf_config, model)
    adapter = load_adapter(path, backbone)
    hf_config.architectures = [backbone.adafuse_name]
    hf_config.adafuse = {
        ADAPTER_KEY: str(adapter.path),
        FINGERPRINT_KEY: adapter.fingerprint,
        CONTENT_KEY: (content := content_hash(adapter.path)),
    }
    logger.info(
        "AdaFuse %s: serving adapter %s (%s, written %s, content %s) on %s as %s",
        __version__, adapter.path.name, adapter.path, written_at(adapter.path), content,
        model, backbone.adafuse_name,
    )  # fmt: skip


def refuse_context(config: AdapterConfig, subject: str, vllm_config: Any) -> None:
    """Raises AdapterError for a router that sees a request's past where it could not."""
    if config.router_context and (problem := options_problem(vllm_config)):
        raise AdapterError(subject, [f"`{CONTEXT_KEY}` {config.router_context}: {problem}"])


def options_problem(vllm_config: Any) -> str | None:
    """What of an engine's options keeps routers from seeing a request's past; None: nothing."""
    parallel = vllm_config.parallel_config
    found = {
        "context parallelism of prefills (PCP)": parallel.prefill_context_parallel_size > 1,
        "context parallelism of decodes (DCP)": parallel.decode_context_parallel_size > 1,
    }
    if named := [name for name, there in found.items() if there]:
        return f"is not served with {' or '.join(named)} yet; leave it out"
    if UNSEEN:
        return f"cannot be served on this vLLM: {'; '.join(UNSEEN.values())}"
    return None


def check_engine(vllm_config: Any) -> None:
    """What the engine's whole config shows before its processes start.

    Raises:
        AdapterError: a pinned adapter cannot be served so.
    """
    if isinstance(getattr(vllm_config.model_config.hf_config, SECTION, None), dict):
        refuse_micro_batches(vllm_config)
        _check_adapter(vllm_config)


def refuse_micro_batches(vllm_config: Any) -> None:
    """Raises AdapterError where vLLM would run parts of a step side by side."""
    if vllm_config.parallel_config.use_ubatching:
        raise AdapterError(
            "vLLM's options",
            [
                "--enable-dbo or --ubatch-size splits a step into parts that run side by side, "
                "and would overwrite each other's routes; leave them out"
            ],
        )


def _check_adapter(vllm_config: Any) -> None:
    """Refuses an adapter that these options cannot serve; says where it was made on other weights
    than those that are going to be served.

    Args:
        vllm_config: of the engine, its `hf_config` attached. `additional_config` has our option
            `backbone`: "warn", the default, or "refuse".

    Raises:
        AdapterError: it cannot be served so; or it was made on others, or that cannot be told, and
            the option is "refuse".
    """
    model = vllm_config.model_config
    path = model.hf_config.adafuse[ADAPTER_KEY]
    adapter, problems = check_adapter(path, values=False)
    if problems:  # since it was attached
        raise AdapterError(f"adapter {path}", problems)
    refuse_context(adapter.config, f"adapter {path}", vllm_config)
    if vllm_config.load_config.load_format == "dummy":
        return
    found = find_local_backbone(model.model, model.revision)
    problem = origin_problem(adapter.config, str(found or model.model))
    say_origin(path, problem, option(vllm_config.additional_config, "backbone"))


def say_origin(path: str, problem: str | None, how: str) -> None:
    """Warns of an adapter's other backbone; raises AdapterError where `how` is "refuse"."""
    if problem and how == "refuse":
        raise AdapterError(f"adapter {path}", [problem])
    if problem:
        logger.warning("AdaFuse: adapter %s: %s", path, problem)


def refuse_no_backbone(model: str) -> None:
    """Raises AdapterError where a path is given for the model that is no checkpoint, such as the
    adapter's own; vLLM's message knows nothing of adapters."""
    root = Path(model).expanduser()
    if root.exists() and not any((root / name).is_file() for name in CONFIGS):
        raise AdapterError(f"backbone {model}", [backbone_problem(model)])


def in_mistrals_format(hf_config: Any, model: str) -> bool:
    """Whether vLLM read Mistral's params.json, though Hugging Face's config.json is beside it.

    The shapes of linears follow from the latter. Weights may still come from either format: the
    names that vLLM gives them are the same.

    Raises:
        AdapterError: there is no config.json.
    """
    if type(hf_config) is not PretrainedConfig:  # a family's own, of a config.json
        return False
    if find_local_backbone(model) is None:
        raise AdapterError(f"backbone {model}", [backbone_problem(model)])
    return True


def _adapter_path(hf_config: Any, model: str) -> str:
    override = getattr(hf_config, OVERRIDE, None)
    if override is not None:
        return adapter_override(override, model)
    section = hf_config.adafuse
    named = section.get(ADAPTER_KEY) if isinstance(section, dict) else None
    if not isinstance(named, str) or not named:
        raise AdapterError(
            f"checkpoint {model}",
            [
                f"config.json: `adafuse` is {section!r}, expected an object with `adapter`, the "
                "adapter's directory; make checkpoints with vllm-adafuse compose"
            ],
        )
    return os.path.join(model, named)


def adapter_override(value: Any, model: str) -> str:
    """The directory that `--hf-overrides` names, absolute.

    Raises:
        AdapterError: it is not a path.
    """
    if not isinstance(value, str) or not value:
        raise AdapterError(
            f"--hf-overrides for {model}",
            [f"adafuse_adapter is {value!r}, expected the path of an adapter directory"],
        )
    return os.path.abspath(os.path.expanduser(value))
