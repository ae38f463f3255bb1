"""Backbones as people have them: pickles alone, tokens without a row, the inner model, two formats."""

import json
import pydoc_data.topics
import shutil

import pytest
import torch
from cli_fixtures import base, run  # noqa: F401 (fixtures)
from convert_sources import peft_lora
from safetensors.torch import load_file
from transformers import AutoTokenizer
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.experts.compose import compose_experts
from vllm_adafuse.format.backbone import EMBEDDING, SAVE_AGAIN, load_backbone_tensors
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.tiny import make_tiny_backbone


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return make_random_adapter(base, tmp_path_factory.mktemp("a") / "adapter", num_experts=2, r=2)


@pytest.fixture(scope="module")
def wise(base, tmp_path_factory):
    return make_random_adapter(
        base, tmp_path_factory.mktemp("w") / "wise", num_experts=2, r=2, routing="layer_wise"
    )


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    return peft_lora(base, tmp_path_factory.mktemp("l") / "lora", target_modules=["q_proj"])[1]


@pytest.fixture
def pickled(base, tmp_path):
    """A copy of the backbone as checkpoints were before safetensors."""
    own = shutil.copytree(base, tmp_path / "pickled")
    torch.save(load_file(own / "model.safetensors"), own / "pytorch_model.bin")
    (own / "model.safetensors").unlink()
    return own


def text(path, token=""):
    content = "\n".join(pydoc_data.topics.topics[t] for t in sorted(pydoc_data.topics.topics)[:6])
    path.write_text(content.replace(" the ", f" {token} ") if token else content)
    return path


# Pickles


def reading(backbone, adapter, lora, tmp_path):
    """Commands that read a backbone's weights."""
    sample = text(tmp_path / "text.txt")
    return {
        "route": ["route", adapter, "--base", backbone, "--text", "def f(): pass"],
        "merge": ["merge", adapter, "--base", backbone, "--experts", "0", tmp_path / "out"],
        "compose-experts": ["compose-experts", f"a={lora}", f"b={lora}", "--base", backbone,
                            "--samples", f"a={sample}", "--samples", f"b={sample}", "--output",
                            tmp_path / "out"],
    }  # fmt: skip


def test_a_backbone_of_pickles(pickled, adapter, lora, tmp_path, capsys, monkeypatch):
    from vllm_adafuse.experts import compose as experts

    monkeypatch.setattr(experts, "read_experts", None)  # said before other work is done
    again = SAVE_AGAIN.format(path=pickled, out=f"{pickled}-safetensors")
    for tool, argv in reading(pickled, adapter, lora, tmp_path).items():
        code, out, err = run(capsys, *argv)
        assert code == 1 and not out and len(err.splitlines()) == 2, err
        for word in (f"`{tool}`", "pytorch_model.bin", "can hold code", f"save it again so: {again}"):
            assert word in err, err
        assert not (tmp_path / "out").exists()
    for argv in (
        ["check", adapter, "--base", pickled],
        ["compose", pickled, adapter, tmp_path / "composed"],
        ["inspect", adapter, "--base", pickled],
    ):
        assert run(capsys, *argv)[0] == 0
    exec(again.partition('"')[2].removesuffix('"'))
    made = reading(f"{pickled}-safetensors", adapter, lora, tmp_path)
    assert run(capsys, *made["route"])[0] == 0 and run(capsys, *made["merge"])[0] == 0


def test_a_backbone_without_weights(base, adapter, tmp_path, capsys):
    own = shutil.copytree(base, tmp_path / "own")
    (own / "model.safetensors").unlink()
    code, _, err = run(capsys, "route", adapter, "--base", own, "--text", "a")
    assert code == 1 and "expected its weights as safetensors" in err
    assert "name a directory that has them" in err and "save it again" not in err


# Tokens without a row


@pytest.fixture
def added(base, tmp_path):
    """A copy of the backbone whose tokenizer got a token, and whose embedding did not."""
    own = shutil.copytree(base, tmp_path / "added")
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(own)
    return own


def test_tokens_without_a_row(added, adapter, wise, lora, tmp_path, capsys, monkeypatch):
    from vllm_adafuse.training import distill_run
    from vllm_adafuse.training import run as train_run

    def never(*args, **kwargs):
        raise AssertionError("no weight is loaded before the texts are known to be good")

    monkeypatch.setattr(train_run, "load_backbone", never)
    monkeypatch.setattr(distill_run, "load_backbone", never)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"hello <|extra|> {i}"}) for i in range(40)))
    sample, out = text(tmp_path / "text.txt", "<|extra|>"), tmp_path / "out"
    for argv in (
        ["train", "--base", added, "--data", data, "--output", out, "--quiet"],
        ["distill", wise, "--base", added, "--data", data, "--output", out, "--quiet"],
        ["compose-experts", f"a={lora}", "--base", added, "--samples", f"a={sample}",
         "--output", out],
        ["route", adapter, "--base", added, "--text", "hello <|extra|> you"],
    ):  # fmt: skip
        code, _, err = run(capsys, *argv)
        assert code == 1 and not out.exists(), argv
        said = err[err.index("vllm-adafuse: ") :]
        assert len(said.splitlines()) == 2, said
        for word in ("has 1003 rows and none for", '"<|extra|>" (id 1003)', "tokenizer"):
            assert word in said, said


def test_a_token_that_no_text_holds_does_not_matter(added, adapter, lora, tmp_path, capsys):
    assert run(capsys, "route", adapter, "--base", added, "--text", "hello")[0] == 0
    sample = text(tmp_path / "text.txt")
    compose_experts({"a": lora}, tmp_path / "out", added, {"a": [sample]})


# The inner model


@pytest.fixture(scope="module")
def inner(base, tmp_path_factory):
    from transformers import AutoModel

    path = tmp_path_factory.mktemp("inner") / "inner"
    AutoModel.from_pretrained(base).save_pretrained(path)
    AutoTokenizer.from_pretrained(base).save_pretrained(path)
    return path


def test_tensors_of_an_inner_model(base, inner):
    a, b = (load_backbone_tensors(str(p), [EMBEDDING], "x")[EMBEDDING] for p in (base, inner))
    assert "embed_tokens.weight" in load_file(inner / "model.safetensors")
    assert torch.equal(a, b)


def test_commands_take_an_inner_model(base, inner, adapter, lora, tmp_path, capsys):
    for name, own in (("whole", base), ("inner", inner)):
        out = tmp_path / name
        sample = text(tmp_path / "text.txt")
        for argv in (
            ["check", adapter, "--base", own],
            ["inspect", adapter, "--base", own],
            ["route", adapter, "--base", own, "--text", "hello you", "--html", f"{out}.html"],
            ["merge", adapter, "--base", own, "--experts", "0", out / "merged"],
            ["compose", own, adapter, out / "composed"],
            ["convert", lora, out / "converted", "--base", own],
            ["compose-experts", f"a={lora}", f"b={lora}", "--base", own, "--samples",
             f"a={sample}", "--samples", f"b={sample}", "--output", out / "mixture"],
            ["random", own, out / "random", "--r", "2"],
        ):  # fmt: skip
            assert run(capsys, *argv)[0] == 0, argv
    page, other = ((tmp_path / f"{n}.html").read_text() for n in ("whole", "inner"))
    assert page.partition("<ul")[2] == other.partition("<ul")[2]
    merged, other = (
        load_file(tmp_path / n / "merged" / "model.safetensors") for n in ("whole", "inner")
    )
    del merged["lm_head.weight"]
    merged = {n.removeprefix("model."): t for n, t in merged.items()}
    torch.testing.assert_close(merged, dict(other))
    for made in ("converted", "mixture", "random"):
        one, other = (
            load_file(tmp_path / n / made / "adapter_model.safetensors") for n in ("whole", "inner")
        )
        torch.testing.assert_close(one, other, msg=made)
    config = json.loads((tmp_path / "inner" / "composed" / "config.json").read_text())
    assert config["architectures"] == ["AdaFuseLlamaModel"]
    plain = merge_again(tmp_path / "inner" / "composed", adapter, tmp_path / "again", capsys)
    assert plain["architectures"] == ["LlamaModel"]


def merge_again(composed, adapter, out, capsys):
    assert run(capsys, "merge", adapter, "--base", composed, "--experts", "0", out)[0] == 0
    return json.loads((out / "config.json").read_text())


def test_a_model_without_a_head_is_not_trained(inner, wise, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"hello you {i}"}) for i in range(40)))
    for argv in (["train", "--base", inner], ["distill", wise, "--base", inner]):
        code, _, err = run(capsys, *argv, "--data", data, "--output", tmp_path / "out", "--quiet")
        assert code == 1 and f"output head, which `{argv[0]}` needs" in err
        assert "name the checkpoint of LlamaForCausalLM" in err


# What vLLM's front end makes of them, without an engine


@pytest.fixture(scope="module")
def get_config():
    """vLLM's, as `ModelConfig` calls it, with an adapter named by --hf-overrides."""
    from vllm.config import model as seam
    from vllm_adafuse.plugin import register

    register()

    def read(model, adapter, config_format="auto"):
        overrides = {"adafuse_adapter": str(adapter)} if adapter else {}
        return seam.get_config(
            str(model), False, None, None, config_format, hf_overrides_kw=overrides
        )

    return read


def in_two_formats(base, path):
    """A copy of a checkpoint with the other format's config and (no) weights beside it."""
    own = shutil.copytree(base, path)
    config = json.loads((own / "config.json").read_text())
    (own / "params.json").write_text(json.dumps({
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "head_dim": 32,
        "hidden_dim": config["intermediate_size"], "n_heads": 4, "n_kv_heads": 2,
        "norm_eps": config["rms_norm_eps"], "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"], "rope_theta": 10000.0,
    }))  # fmt: skip
    shutil.copy(own / "model.safetensors", own / "consolidated.safetensors")
    return own


def test_a_directory_in_two_formats(get_config, tmp_path, capsys):
    base = make_tiny_backbone(tmp_path / "base", "MistralForCausalLM")
    adapter = make_random_adapter(base, tmp_path / "adapter", num_experts=2, r=2)
    both = in_two_formats(base, tmp_path / "both")
    assert type(get_config(both, None)).__name__ != "MistralConfig"  # what vLLM takes by itself
    for form in ("auto", "hf", "mistral"):
        config = get_config(both, adapter, form)
        assert type(config).__name__ == "MistralConfig"
        assert config.architectures == ["AdaFuseMistralForCausalLM"]
    for command in (
        ["compose", both, adapter, tmp_path / "composed"],
        ["merge", adapter, "--base", both, "--experts", "0", tmp_path / "merged"],
    ):
        assert run(capsys, *command)[0] == 0
        assert not (tmp_path / f"{command[0]}d" / "params.json").exists()
    assert get_config(tmp_path / "composed", None).architectures == ["AdaFuseMistralForCausalLM"]
    (both / "config.json").unlink()
    with pytest.raises(AdapterError, match="Mistral's own format .params.json. alone"):
        get_config(both, adapter)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Phi3"])
def test_vllm_is_told_to_embed_with_an_inner_model(family, get_config, tmp_path):
    base = make_tiny_backbone(tmp_path / "base", f"{family}ForCausalLM")
    adapter = make_random_adapter(base, tmp_path / "adapter", num_experts=2, r=2)
    file = base / "config.json"
    names = {"architectures": [f"{family}Model"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | names))
    assert get_config(base, adapter).architectures == [f"AdaFuse{family}Model"]


def test_backbone_and_adapter_swapped_in_serving(get_config, base, adapter, tmp_path):
    with pytest.raises(AdapterError, match="is an adapter .*the other way round"):
        get_config(adapter, base)
    with pytest.raises(AdapterError, match="checkpoint of a whole model .*the other way round"):
        get_config(base, base)
    with pytest.raises(AdapterError, match="is a file, expected a checkpoint's directory"):
        get_config(base / "config.json", adapter)
