"""What people tell vLLM for us: misspelt keys are refused, by `LLM(…)` and `vllm serve` alike, in a
message that stands alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.digest import content_hash
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.serving import attach
from vllm_adafuse.serving.options import OPTIONS, check_options, option
from vllm_adafuse.tiny import make_tiny_backbone, tiny_config

LLAMA = ["AdaFuseLlamaForCausalLM"]
MISSPELT = [
    "adafuse_adaptor", "adafuse-adapter", "AdaFuse_Adapter", "adafuseAdapter", "adafuse",
    "ADAFUSE", "ada_fuse_adapter", "adafuse_adapter_path", "adafuse.adapter", "adafuse ",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("options") / "base")


@pytest.fixture(scope="module")
def adapter(base):
    return make_random_adapter(base, base.parent / "adapter", num_experts=2, r=2)


def config_of(base, **options):
    return EngineArgs(str(base), enforce_eager=True, **options).create_engine_config()


def refusal(base, **options):
    with pytest.raises(AdapterError) as error:
        config_of(base, **options)
    return str(error.value)


@pytest.mark.parametrize("key", MISSPELT)
@pytest.mark.parametrize("value", ["path", {"adapter": "path"}], ids=["text", "object"])
def test_misspelt_overrides(key, value, base, adapter):
    """Of any type: objects go another way through vLLM than text."""
    value = {"adapter": str(adapter)} if isinstance(value, dict) else str(adapter)
    for more in ({}, {"architectures": LLAMA}, {"adafuse_adapter": str(adapter)}):
        said = refusal(base, hf_overrides={key: value, **more})
        assert f"unknown key `{key}`" in said and "did you mean `adafuse_adapter`?" in said


def test_overrides_in_the_wrong_place(base, adapter):
    said = refusal(base, hf_overrides={"text_config": {"inner": {"adafuse_adapter": str(adapter)}}})
    assert "`text_config` holds `adafuse_adapter`" in said and "top level" in said


def test_overrides_by_a_function(base):
    def override(config):
        config.adafuse_adaptor = "path"
        return config

    assert "did you mean `adafuse_adapter`" in refusal(base, hf_overrides=override)


@pytest.mark.parametrize(
    "section, words",
    [
        ({"adafuse_adapter_dir": "adafuse"}, ("`adafuse_adapter_dir`", "did you mean")),
        ({"AdaFuse": {"adapter": "adafuse"}}, ("`AdaFuse`", "did you mean `adafuse`")),
        ({"adafuse": {"adapter": "../adapter", "adaptor": 1}}, ("`adaptor`", "mean `adapter`")),
        ({"architectures": LLAMA}, ("no adapter is named", "adafuse_adapter")),
    ],
)
def test_composed_configs(section, words, base, tmp_path):
    tiny_config("LlamaForCausalLM").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | section))
    said = refusal(tmp_path, tokenizer=str(base))
    assert not [word for word in words if word not in said], said


@pytest.mark.parametrize("overrides", [{}, {"adapter": "x"}, {"my_adafuse_adapter": "x"}])
def test_an_architecture_of_ours_without_an_adapter(overrides, base):
    said = refusal(base, hf_overrides={"architectures": LLAMA, **overrides})
    assert "no adapter is named" in said and '"adafuse_adapter": DIR' in said


def test_the_override_with_architectures_is_the_override(base, adapter):
    """It is the way that fails loudly where the plugin is not loaded."""
    named = {"adafuse_adapter": str(adapter)}
    one, other = (
        config_of(base, hf_overrides=o) for o in (named, {"architectures": LLAMA, **named})
    )
    assert one.model_config.architectures == other.model_config.architectures == LLAMA
    assert one.compute_hash() == other.compute_hash()


@pytest.mark.parametrize(
    "config, words",
    [
        ({"adafuse-lora": "vllm"}, ("`adafuse-lora`", "did you mean `adafuse`")),
        ({"AdaFuse": {"lora": "vllm"}}, ("`AdaFuse`", "did you mean `adafuse`")),
        ({"adafuse": {"lorra": "vllm"}}, ("`lorra`", "did you mean `lora`")),
        ({"adafuse": {"backbones": "warn"}}, ("did you mean `backbone`",)),
        ({"adafuse": {"lora": "vLLM"}}, ("`adafuse.lora` is", '"adafuse", "vllm"')),
        ({"adafuse": {"lora": ["vllm"]}}, ("`adafuse.lora` is",)),
        ({"adafuse": "vllm"}, ("expected an object", "lora, backbone")),
    ],
)
def test_additional_config(config, words, base):
    said = refusal(base, additional_config=config)
    assert not [word for word in words if word not in said], said


def test_good_additional_config_and_that_of_others(base):
    config = {"adafuse": {"lora": "vllm", "backbone": "refuse"}, "other": {"adafuse_x": 1}}
    assert config_of(base, additional_config=config).additional_config == config
    assert [option(config, name) for name in OPTIONS] == ["vllm", "refuse", "auto"]
    assert [option(other, "lora") for other in ({}, None, {"adafuse": {}})] == ["adafuse"] * 3
    assert not check_options(None)


def test_an_error_of_pydantic_is_still_one(base):
    with pytest.raises(ValueError, match="validation error"):
        config_of(base, dtype="float17")


def test_the_log_line_names_what_is_served(base, adapter, monkeypatch):
    from vllm_adafuse import __version__

    said = []
    monkeypatch.setattr(attach.logger, "info", lambda text, *values: said.append(text % values))
    os.utime(adapter / "adapter_model.safetensors", (86400, 86400))
    config_of(base, hf_overrides={"adafuse_adapter": str(adapter)})
    for word in (__version__, "adapter adapter (", str(adapter), "1970-01-02T00:00:00Z",
                 content_hash(adapter), str(base)):  # fmt: skip
        assert word in said[0]


def test_the_whole_config_is_checked_before_an_engine_starts(base, adapter, monkeypatch):
    """Not by a worker, whose error would stand above pages of others."""
    asked = []
    monkeypatch.setattr(attach, "refuse_micro_batches", asked.append)
    config = config_of(base, hf_overrides={"adafuse_adapter": str(adapter)})
    assert asked == [config]
    config_of(base)  # without an adapter its options are vLLM's business
    assert asked == [config]


def serve(base, *options, module=False):
    """Exit code and stderr's last lines of a real `vllm serve`, from its Traceback on."""
    start = [sys.executable, "-m", "vllm.entrypoints.cli.main"] if module else (
        [str(Path(sys.executable).with_name("vllm"))]
    )  # fmt: skip
    done = subprocess.run(
        [*start, "serve", str(base), "--enforce-eager", *options],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("module", [False, True], ids=["vllm", "python -m"])
def test_vllm_serve_ends_by_our_message(module, base):
    options = {"adafuse_adaptor": "x"} if module else {"adafuse_adapter": "/nowhere"}
    code, said = serve(base, "--hf-overrides", json.dumps(options), module=module)
    assert code == 1
    assert "Traceback" not in said and "pydantic" not in said and "ArgsKwargs" not in said
    last = said.strip().splitlines()
    assert re.match("vllm-adafuse: .* cannot be used:", last[-2]), said
    assert ("did you mean" if module else "/nowhere: no such directory") in last[-1]
