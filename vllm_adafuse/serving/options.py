"""The keys that people give to vLLM for us, and what looks like one of them but is none.

`--hf-overrides` and a checkpoint's config.json name the adapter; `--additional-config` has options
under `adafuse`. vLLM takes any key there and ignores what it does not know: a misspelt one would
serve the bare backbone in silence.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.architectures import PREFIX
from vllm_adafuse.format.config import ADAPTER_KEY, CONTENT_KEY, FINGERPRINT_KEY, SECTION
from vllm_adafuse.text import show

OVERRIDE = "adafuse_adapter"
# Options under `adafuse` of --additional-config: values, the default first.
OPTIONS: dict[str, tuple[str, ...]] = {
    "lora": ("adafuse", "vllm", "both"),
    "backbone": ("warn", "refuse"),
    "lora_dtype": ("auto", "fp8"),
}

# What serving itself leaves there, see `vllm_api.mark_compiled`.
GRAPH = "graph"


def looks_like_ours(key: Any) -> bool:
    """Whether a key begins with adafuse, in any case and with any dashes."""
    return isinstance(key, str) and re.sub(r"[\W_]", "", key).lower().startswith(SECTION)


def unknown_keys(keys: Iterable[Any], known: Iterable[str], where: str) -> list[str]:
    """A problem for each key that begins with adafuse and is none of the known ones.

    Args:
        keys: all keys of an object, those of others among them.
        known: ours.
        where: the object, for the message.
    """
    return [
        _unknown(key, known, where) for key in keys if looks_like_ours(key) and key not in known
    ]


def _unknown(key: Any, known: Iterable[str], where: str) -> str:
    by_letters = {re.sub(r"[\W_]", "", name).lower(): name for name in known}
    letters = re.sub(r"[\W_]", "", str(key)).lower()
    near = difflib.get_close_matches(letters, by_letters, n=1, cutoff=0.0)[0]
    return (
        f"{where}: unknown key `{show(key)[1:-1]}`, which would be ignored; did you mean "
        f"`{by_letters[near]}`?"
    )


def check_overrides(overrides: Any) -> list[str]:
    """Problems of `--hf-overrides`, at any depth. A function is seen by its result alone."""
    problems = []
    if isinstance(overrides, Mapping):
        problems = unknown_keys(overrides, (OVERRIDE,), "--hf-overrides")
        for key, value in overrides.items():
            problems += _nested(value, f"--hf-overrides: `{show(key)[1:-1]}`")
    return problems


def _nested(value: Any, where: str) -> list[str]:
    if isinstance(value, Mapping):
        problems = [
            f"{where} holds `{show(key)[1:-1]}`, where it would be ignored; write `{OVERRIDE}` at "
            "the top level"
            for key in value
            if looks_like_ours(key)
        ]
        return problems + [p for inner in value.values() for p in _nested(inner, where)]
    return []


def check_section(section: Any) -> list[str]:
    """Unknown keys in the section `adafuse` of a checkpoint's config.json."""
    known = (ADAPTER_KEY, FINGERPRINT_KEY, CONTENT_KEY)
    unknown = [key for key in section if key not in known] if isinstance(section, dict) else []
    return [_unknown(key, (ADAPTER_KEY,), f"config.json: `{SECTION}`") for key in unknown]


def check_options(additional_config: Any) -> list[str]:
    """Problems of `--additional-config`."""
    if not isinstance(additional_config, Mapping):
        return []
    place = "--additional-config"
    problems = unknown_keys(additional_config, (SECTION,), place)
    options = additional_config.get(SECTION, {})
    if not isinstance(options, Mapping):
        return [
            *problems,
            f"{place}: `{SECTION}` is {show(options)}, expected an object with options: "
            f"{', '.join(OPTIONS)}",
        ]
    for key, value in options.items():
        if key == GRAPH:
            continue
        if key not in OPTIONS:
            problems.append(_unknown(key, OPTIONS, f"{place}: `{SECTION}`"))
        elif value not in OPTIONS[key]:
            problems.append(
                f"{place}: `{SECTION}.{key}` is {show(value)}, expected one of "
                f"{', '.join(map(show, OPTIONS[key]))}"
            )
    return problems


def option(additional_config: Any, name: str) -> str:
    """The value of one of OPTIONS, checked before."""
    options = additional_config.get(SECTION) if isinstance(additional_config, Mapping) else None
    return (options or {}).get(name, OPTIONS[name][0])


def refuse(problems: list[str]) -> None:
    """Raises AdapterError if there is a problem with what vLLM was told."""
    if problems:
        raise AdapterError("vLLM's options", problems)


def names_adapter(hf_config: Any, model: str) -> bool:
    """Whether a config is meant for us.

    Raises:
        AdapterError: it has a key that begins with adafuse and is none of ours, or an
            architecture of ours and no adapter.
    """
    known = (OVERRIDE, SECTION)
    refuse(unknown_keys(vars(hf_config), known, f"config of {model}"))
    if any(hasattr(hf_config, key) for key in known):
        return True
    names = getattr(hf_config, "architectures", None)
    ours = [n for n in names or [] if isinstance(n, str) and n.startswith(PREFIX)]
    if ours:
        raise AdapterError(
            f"checkpoint {model}",
            [
                f"`architectures` is {ours[0]}, but no adapter is named, expected its directory "
                f'beside it: --hf-overrides \'{{"architectures": ["{ours[0]}"], "{OVERRIDE}": '
                "DIR}'"
            ],
        )
    return False
