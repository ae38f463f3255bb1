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
from vllm_adafuse.backbone import EMBEDDING, SAVE_AGAIN, load_backbone_tensors
from vllm_adafuse.experts.compose import compose_experts
from vllm_adafuse.random_adapter import make_random_adapter


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
    torch.testing.assert_close(a, b, rtol=0, atol=0)
