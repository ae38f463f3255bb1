"""Lets a config that names an adapter choose its architecture.

`--hf-overrides '{"adafuse_adapter": DIR}'` sets an attribute on the Hugging Face config and no
more; the architecture must follow before vLLM looks it up. `ModelConfig` builds that config by
one call of `get_config`, in the front end, before any other process starts: the result is passed
on here, so that a bad adapter is refused at once.

Read against vLLM 0.26.0 (config/model.py:559) and 0.32.0 (config/model.py:669).
"""

from __future__ import annotations

import functools
import inspect

from vllm_adafuse.serving import vllm_api

_MARK = "_adafuse_wrapped"
_CALLS = ("get_config(", "_apply_dict_overrides(")


def apply() -> None:
    """Wraps `vllm.config.model.get_config`, and refuses what would go past it.

    Raises:
        RuntimeError: the seam has moved in this vLLM.
    """
    import vllm.config.model as seam

    original = getattr(seam, "get_config", None)
    if getattr(original, _MARK, False):
        return
    source = inspect.getsource(seam.ModelConfig.__post_init__)
    if original is None or any(call not in source for call in _CALLS):
        raise vllm_api.moved(
            "vllm.config.model.ModelConfig no longer calls "
            f"{' and '.join(_CALLS)}, so an adapter could be ignored in silence"
        )

    parameters = inspect.signature(original)

    @functools.wraps(original)
    def get_config(model, *args, **kwargs):
        call = parameters.bind(model, *args, **kwargs)
        if "adafuse_adapter" in (call.arguments.get("hf_overrides_kw") or {}):
            from vllm_adafuse.serving.attach import refuse_no_backbone

            refuse_no_backbone(str(model))
        hf_config = original(*call.args, **call.kwargs)
        from vllm_adafuse.serving.options import names_adapter

        if names_adapter(hf_config, str(model)):
            from vllm_adafuse.serving.attach import attach_adapter, in_mistrals_format

            if in_mistrals_format(hf_config, str(model)):
                call.arguments["config_format"] = "hf"
                hf_config = original(*call.args, **call.kwargs)
            attach_adapter(hf_config, str(model))
        return hf_config

    apply_dicts = seam.ModelConfig._apply_dict_overrides

    @functools.wraps(apply_dicts)
    def _apply_dict_overrides(self, config, overrides):
        # Overrides that are objects come later, past `get_config`: none of ours is one.
        from vllm_adafuse.serving import attach, options

        options.refuse(options.check_overrides(overrides))
        if options.OVERRIDE in overrides:
            attach.adapter_override(overrides[options.OVERRIDE], str(self.model))
        return apply_dicts(self, config, overrides)

    setattr(get_config, _MARK, True)
    seam.get_config = get_config
    seam.ModelConfig._apply_dict_overrides = _apply_dict_overrides
