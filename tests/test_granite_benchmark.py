"""The peer of `benchmarks.engine`: its config is the backbone's, and its absence is told of."""

import json

import benchmark_package  # noqa: F401
import pytest

from benchmarks import engine, granite


@pytest.fixture
def base(tmp_path):
    engine.write_config(engine.Options(model="tiny"), tmp_path / "base")
    return tmp_path / "base"


def test_the_config_has_the_backbones_shape_and_its_loras(base):
    backbone = json.loads((base / "config.json").read_text())
    made = granite.config(backbone, count=3, r=16)
    for name in ("hidden_size", "vocab_size", "num_key_value_heads", "rope_parameters"):
        assert made[name] == backbone[name]
    assert made["num_hidden_layers"] == len(made["layer_types"]) == 2 + 2
    assert made["shared_intermediate_size"] == 256 and made["attention_multiplier"] == 32**-0.5
    assert made["adapter_token_ids"] == [997, 998, 999] and made["adapter_ranks"] == [16] * 3


def test_its_bare_model_has_no_loras_and_no_switch(base):
    made = granite.config(json.loads((base / "config.json").read_text()), count=0, r=16)
    assert made["num_hidden_layers"] == len(made["layer_types"]) == 2
    assert made["num_adapters"] == 0 and not [key for key in made if key.startswith("adapter_")]


@pytest.mark.parametrize("vllm", ["0.31.0", "0.32.0", "1.0"])
def test_a_vllm_that_is_too_new_is_refused(base, tmp_path, monkeypatch, vllm):
    monkeypatch.setattr(granite, "version", lambda name: "0.1.1")
    monkeypatch.setattr("vllm.__version__", vllm)
    with pytest.raises(RuntimeError, match=f"vLLM is {vllm}, granite-switch 0.1.1 needs 0.26"):
        granite.write_config(base, tmp_path / "out", 8, 16)
    monkeypatch.setattr("vllm.__version__", "0.26.0")
    assert granite.write_config(base, tmp_path / "out", 8, 16) == list(range(992, 1000))


def test_without_the_package_nothing_starts(monkeypatch):
    def missing(name):
        raise granite.PackageNotFoundError(name)

    monkeypatch.setattr(granite, "version", missing)
    rows = engine.measure(engine.Options(model="tiny", engines=["stock", "granite"]))
    with pytest.raises(RuntimeError, match="granite-switch is not installed"):
        next(rows)
