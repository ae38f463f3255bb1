"""The hash of the backbone that an adapter was made on: who writes it, and who says that it is
another one."""

import json
import shutil

import pytest
import torch
from cli_fixtures import run, run_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm.engine.arg_utils import EngineArgs
from vllm_adafuse.convert.registry import convert
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.experts.compose import RouterOptions, compose_experts
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.origin import backbone_hash
from vllm_adafuse.serving import attach
from vllm_adafuse.tiny import make_tiny_backbone
from vllm_adafuse.training import AdaFuseModel, MixtureConfig


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("origin")


@pytest.fixture(scope="module")
def base(root):
    return make_tiny_backbone(root / "base")


@pytest.fixture(scope="module")
def other(root):
    """The same shapes, other weights."""
    return make_tiny_backbone(root / "other", seed=7)


@pytest.fixture(scope="module")
def trained(root, base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    made = AdaFuseModel.from_backbone(model, MixtureConfig(num_experts=2, top_k=1, r=2))
    made.save_pretrained(root / "trained")
    return root / "trained"


def edit_weights(base, path, change):
    """A copy of a backbone with some tensors changed."""
    copy = shutil.copytree(base, path)
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors = {name: change(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_casts_and_other_linears_are_one_backbone(base, tmp_path, dtype):
    first = edit_weights(base, tmp_path / "first", lambda name, t: t.to(dtype))
    copy = edit_weights(first, tmp_path / "cast", lambda name, t: t.to(torch.bfloat16))
    assert backbone_hash(str(copy)) == backbone_hash(str(first))
    copy = edit_weights(
        base, tmp_path / "linears", lambda name, t: t + 1 if "_proj" in name else t
    )
    assert backbone_hash(str(copy)) == backbone_hash(str(base))


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
)
def test_one_value_is_another_backbone(base, tmp_path, name):
    def change(this, tensor):
        tensor.view(-1)[-1] += 1.0 if this == name else 0.0
        return tensor

    assert backbone_hash(str(edit_weights(base, tmp_path / "copy", change))) != backbone_hash(
        str(base)
    )


def lora(path, base_name):
    """A PEFT LoRA of a tiny backbone, which it names so."""
    from loras import FEW, make_lora

    make_lora(path.parent / "base", path, 1, **FEW)
    file = path / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(base_name)}
    file.write_text(json.dumps(config))
    return path


def test_trained_composed_and_converted_adapters_carry_it(root, base, trained):
    assert load_adapter(trained).config.base_hash == backbone_hash(str(base))
    one = lora(root / "one", base)
    options = RouterOptions("uniform")
    composed = compose_experts({"a": one, "b": one}, root / "composed", options=options).path
    convert(one, root / "converted")
    for made in (composed, root / "converted"):
        assert load_adapter(made).config.base_hash == backbone_hash(str(base))
        raw = json.loads((made / "adapter_config.json").read_text())
        assert raw["base_model_hash"] == backbone_hash(str(base))
    # What is trained on keeps shapes of graphs: the key is no part of the fingerprint.
    copy = shutil.copytree(trained, root / "copy")
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_hash": "0" * 64}))
    assert load_adapter(copy).fingerprint == load_adapter(trained).fingerprint


def test_the_key_is_optional_and_checked(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    file = copy / "adapter_config.json"
    raw = json.loads(file.read_text())
    for value in ("00", "G" * 64, 7, "A" * 64, None):
        file.write_text(json.dumps(raw | {"base_model_hash": value}))
        with pytest.raises(AdapterError, match="`base_model_hash` is .*, expected 64 hexadecimal"):
            load_adapter(copy)
    del raw["base_model_hash"]
    file.write_text(json.dumps(raw))
    assert load_adapter(copy).config.base_hash == ""
    assert "base_model_hash" not in load_adapter(copy).config.to_json()


def test_loras_of_different_backbones(root, base, other, tmp_path, capsys):
    same = shutil.copytree(base, tmp_path / "same")
    first, second = lora(root / "first", base), lora(root / "second", other)
    copy, hub = lora(root / "third", same), lora(root / "hub", "someone/else")
    options = ["--router", "uniform", "--base", base]

    def compose(name, *loras):
        named = [f"{path.name}={path}" for path in loras]
        return run(capsys, "compose-experts", *named, *options, "--output", tmp_path / name)

    for number, wrong in enumerate((second, hub)):
        code, out, err = compose(f"refused{number}", first, wrong)
        assert code == 1 and "different backbones" in err and "--mixed-backbones" in err
        assert not (tmp_path / f"refused{number}").exists()
    assert compose("copy", first, copy)[0] == 0  # another directory, the same weights
    options.append("--mixed-backbones")
    code, out, _ = compose("mixed", first, second)
    assert code == 0 and "name different backbones" in out


def test_check_and_inspect_say_so(base, other, trained, capsys):
    document = run_json(capsys, "check", trained, "--base", base)
    assert document["ok"] and document["warnings"] == []
    assert document["base_model_hash"] == backbone_hash(str(base))
    inspected = run_json(capsys, "inspect", trained, "--base", base)
    assert inspected["content"] == document["content"]
    assert inspected["base_model_hash"] == document["base_model_hash"]
    assert document["content"] in run(capsys, "inspect", trained)[1]
    (warning,) = run_json(capsys, "check", trained, "--base", other)["warnings"]
    assert "not the one that the routes were made for" in warning and str(other) in warning
    code, out, _ = run(capsys, "check", trained, "--base", other)
    assert code == 0 and "warning: " in out and "ok: " in out


def test_check_reports_problems_as_json(trained, tmp_path, capsys):
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "adapter_model.safetensors").unlink()
    code, out, _ = run(capsys, "check", copy, "--json")
    document = json.loads(out)
    assert code == 1 and not document["ok"] and document["content"] is None
    assert "adapter_model.safetensors" in document["problems"][0]


def test_serving_warns_or_refuses(base, other, trained, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(attach.logger, "warning", lambda text, *values: said.append(text % values))

    def serve(model, how=None, **options):
        said.clear()
        if how:
            options["additional_config"] = {"adafuse": {"backbone": how}}
        overrides = {"adafuse_adapter": str(trained)}
        EngineArgs(str(model), hf_overrides=overrides, **options).create_engine_config()
        return said

    assert not serve(base) and not serve(base, "refuse")
    assert "not the one that the routes were made for" in serve(other)[0]
    assert serve(other, "warn") and not serve(other, load_format="dummy")
    with pytest.raises(AdapterError, match="not the one that the routes were made for"):
        serve(other, "refuse")
    # Where it cannot be told, "refuse" refuses.
    bare = shutil.copytree(base, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert "cannot be compared" in serve(bare)[0]
    with pytest.raises(AdapterError, match="cannot be compared"):
        serve(bare, "refuse")
