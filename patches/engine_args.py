"""Has a person read our message when vLLM's options or the adapter they name are at fault.

Both of vLLM's front ends, `vllm serve` and `LLM(…)`, make their configs by two methods of
`EngineArgs`. Before them options are checked that vLLM would ignore. Behind them an error of ours
is taken out of the pydantic error that a config's `__post_init__` makes of it. vLLM's own commands
then print the message alone; elsewhere `AdapterError` is raised, for the caller to catch.

Read against vLLM 0.26.0 and 0.32.0 (engine/arg_utils.py, entrypoints/cli/main.py).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pydantic import ValidationError
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.patches.on_import import when_imported
from vllm_adafuse.serving import vllm_api

_SEAM = "vllm.engine.arg_utils"
_MARK = "_adafuse_wrapped"
_MODULES = "adafuse_lora_modules"
_METHODS = ("create_model_config", "create_engine_config")


def apply() -> None:
    """Wraps `EngineArgs` as soon as a process imports it."""
    when_imported(_SEAM, wrap)


def wrap() -> None:
    """Wraps it now.

    Raises:
        RuntimeError: the seam has moved in this vLLM.
    """
    from vllm.engine.arg_utils import EngineArgs

    for name in _METHODS:
        original = getattr(EngineArgs, name, None)
        if original is None:
            raise vllm_api.moved(
                f"EngineArgs of this vLLM has no {name}, so misspelt options could be ignored in "
                "silence"
            )
        if not getattr(original, _MARK, False):
            setattr(EngineArgs, name, _checked(original))
    if not getattr(EngineArgs.from_cli_args, _MARK, False):
        EngineArgs.from_cli_args = _with_modules(EngineArgs.from_cli_args.__func__)


def _checked(original: Callable) -> Callable:
    @functools.wraps(original)
    def create(self, *args, **kwargs):
        from vllm_adafuse.serving import attach, fits, lora_start, options

        try:
            options.refuse(
                options.check_overrides(self.hf_overrides)
                + options.check_options(self.additional_config)
            )
            made = original(self, *args, **kwargs)
            if hasattr(made, "model_config"):
                attach.check_engine(made)
                fits.in_fp8(made)
                lora_start.check_start(made, getattr(self, _MODULES, None) or ())
            return made
        except AdapterError:
            _be_brief()
            raise
        except ValidationError as e:
            found = [error.get("ctx", {}).get("error") for error in e.errors()]
            ours = [error for error in found if isinstance(error, AdapterError)]
            if not ours:
                raise
            _be_brief()
            raise ours[0] from None

    setattr(create, _MARK, True)
    return create


def _with_modules(original: Callable) -> classmethod:
    """`--lora-modules` belongs to vLLM's server, not to its engine: brought along to be checked."""

    @functools.wraps(original)
    def from_cli_args(cls, args):
        made = original(cls, args)
        setattr(made, _MODULES, getattr(args, "lora_modules", None))
        return made

    setattr(from_cli_args, _MARK, True)
    return classmethod(from_cli_args)


def _be_brief() -> None:
    """In a process that vLLM's own command runs, an AdapterError ends it by its message alone."""
    if _is_vllm_command() and not getattr(sys.excepthook, _MARK, False):
        sys.excepthook = _brief(sys.excepthook)


def _is_vllm_command() -> bool:
    """`vllm serve …`, or `python -m vllm.…`."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return (spec.name or "").split(".")[0] == "vllm"
    return getattr(main, "__file__", "").rpartition("/")[2] == "vllm"


def _brief(hook: Callable) -> Callable:
    @functools.wraps(hook)
    def excepthook(
        kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> Any:
        if not isinstance(error, AdapterError):
            return hook(kind, error, trace)
        print(f"vllm-adafuse: {error}", file=sys.stderr, flush=True)

    setattr(excepthook, _MARK, True)
    return excepthook
