"""Paths that are not what a command wants: each is told apart, and what to name instead is said."""

import json
import re
import shutil

import pytest
from cli_fixtures import adapter, base, run  # noqa: F401 (fixtures)
from convert_sources import peft_lora
from vllm_adafuse.convert.registry import convert
from vllm_adafuse.convert.source import read_json
from vllm_adafuse.errors import AdapterError, brief
from vllm_adafuse.experts.compose import RouterOptions, compose_experts
from vllm_adafuse.format.adapter import check_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.compose import compose
from vllm_adafuse.format.places import backbone_problem, find_local_backbone, require_backbone

UNIFORM = RouterOptions(router="uniform")


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):
    return peft_lora(base, tmp_path_factory.mktemp("lora"), target_modules=["q_proj"])[1]


@pytest.fixture
def commands(base, adapter, tmp_path, capsys):
    """What every command that takes an adapter says of a path in its place; exit code 1 each."""

    def ask(path, *names):
        calls = {
            "check": ["check", path, "--base", base],
            "inspect": ["inspect", path, "--base", base],
            "route": ["route", path, "--base", base, "--text", "a"],
            "merge": ["merge", path, "--base", base, "--experts", "0", tmp_path / "out"],
            "compose": ["compose", base, path, tmp_path / "out"],
            "distill": ["distill", path, "--base", base, "--data", "x", "--output",
                        tmp_path / "out"],
            "convert": ["convert", path, tmp_path / "out", "--base", base],
            "compose-experts": ["compose-experts", f"a={path}", "--base", base, "--output",
                                tmp_path / "out", "--router", "uniform"],
        }  # fmt: skip
        said = {}
        for name, argv in calls.items():
            if not names or name in names:
                code, out, err = run(capsys, *argv)
                assert code == 1 and not (tmp_path / "out").exists(), name
                lines = re.split(r"[\r\n]+", out + err)
                said[name] = "\n".join(line for line in lines if line and "it/s]" not in line)
        return said

    return ask


def say(said, *words):
    for command, text in said.items():
        for word in words:
            assert word in text, f"{command}: {word} is not in\n{text}"
        assert "not valid JSON" not in text and "Traceback" not in text
        assert len(text.splitlines()) <= 3, text


@pytest.mark.parametrize("below", ["sql", "checkpoint-20", "out/checkpoint-7"])
def test_a_folder_above_the_adapter(below, commands, adapter, lora, tmp_path):
    shutil.copytree(adapter, tmp_path / "above" / below)
    say(commands(tmp_path / "above"), "adapter_config.json is missing here", f"above/{below}")


def test_the_newest_checkpoint_is_named_first(adapter, tmp_path):
    for n in (9, 100, 20):
        shutil.copytree(adapter, tmp_path / f"checkpoint-{n}")
    problem = check_adapter(tmp_path)[1]
    assert len(problem) == 1 and f"such as {tmp_path / 'checkpoint-100'}" in problem[0]
    assert "checkpoint-100, checkpoint-20, checkpoint-9 have it" in problem[0]


def test_a_file_in_place_of_its_directory(commands, adapter):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        say(commands(adapter / name), "is a file, expected the directory", f"name {adapter}")
    assert check_adapter(adapter / "adapter_config.json" / "x")[1]


def test_a_mistyped_path(commands, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "my-adapter")
    say(commands(tmp_path / "my-adaptor"), "no such directory", f"{tmp_path / 'my-adapter'}?")
    say(commands(tmp_path / "no" / "way"), f"{tmp_path / 'no'} does not exist either")


def test_backbone_and_adapter_swapped(commands, base, adapter, capsys, tmp_path):
    say(commands(base), "checkpoint of a whole model", "the other way round")
    code, _, err = run(capsys, "compose", adapter, base, tmp_path / "out")
    assert code == 1 and "is an adapter" in err and "the other way round" in err
    code, _, err = run(capsys, "check", base, "--base", adapter)
    assert code == 1 and "is an adapter" in err and "the other way round" in err


def test_a_composed_checkpoint_and_a_training_state(commands, base, adapter, tmp_path):
    composed = compose(base, adapter, tmp_path / "composed")
    say(commands(composed), "is a composed checkpoint", f"its adapter is {composed / 'adafuse'}")
    state = tmp_path / "checkpoint-5"
    state.mkdir()
    (state / "trainer_state.json").write_text("{}")
    say(commands(state, "check", "convert"), "resume training", "--output")


def test_an_empty_directory(commands, tmp_path):
    (tmp_path / "empty").mkdir()
    say(commands(tmp_path / "empty"), "adapter_config.json", "missing")


def backbone(kind, base, tmp_path):
    path = tmp_path / kind
    if kind == "file":
        return base / "config.json"
    if kind == "above":
        shutil.copytree(base, path / "checkpoint-3")
    elif kind not in ("typo", "nowhere"):
        path.mkdir()
        (path / kind).write_text("{}")
    else:
        shutil.copytree(base, tmp_path / "typing")
    return path


@pytest.mark.parametrize(
    "kind, words",
    [
        ("file", ["is a file, expected a checkpoint's directory", "name "]),
        ("above", ["config.json is missing here", "above/checkpoint-3"]),
        ("typo", ["is not on this machine"]),
        ("params.json", ["Mistral's own format", "Hugging Face files"]),
        ("model.gguf", ["GGUF", "made from"]),
        ("adapter_config.json", ["is an adapter", "the other way round"]),
        ("readme", ["config.json is missing"]),
    ],
)
def test_what_is_no_backbone(kind, words, base, adapter, tmp_path, capsys):
    path = backbone(kind, base, tmp_path)
    for argv in (
        ["check", adapter, "--base", path],
        ["compose", path, adapter, tmp_path / "out"],
        ["random", path, tmp_path / "out"],
        ["train", "--base", path, "--data", "x", "--output", tmp_path / "out"],
    ):
        code, out, err = run(capsys, *argv)
        assert code == 1 and not out and len(err.splitlines()) == 2, err
        assert all(word in err for word in words), err
    with pytest.raises(AdapterError, match="backbone"):
        Backbone.from_path(str(path))


def test_hub_names_and_odd_ones(tmp_path):
    assert "hf download no-such/model" in backbone_problem("no-such/model")
    assert "its name is empty" in backbone_problem("")
    (tmp_path / "mistral").mkdir()
    assert f"did you mean {tmp_path}/mistral?" in backbone_problem(f"{tmp_path}/mistrall")
    for name in ("", "\0", "x" * 5000, "a/b/c", "../nowhere"):
        assert find_local_backbone(name) is None
        with pytest.raises(AdapterError):
            require_backbone(name, tmp_path)


def name_base(lora, name):
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))


@pytest.mark.parametrize("name", ["../base", "base", "./base"])
def test_a_relative_base_is_looked_for_beside_the_lora(name, base, lora, tmp_path, monkeypatch):
    own = shutil.copytree(lora, tmp_path / "project" / "lora")
    shutil.copytree(base, tmp_path / "project" / "base")
    name_base(own, name)
    monkeypatch.chdir(tmp_path)  # not where the training was started
    convert(own, tmp_path / "a")
    compose_experts({"x": own}, tmp_path / "b", options=UNIFORM)
    for out in ("a", "b"):
        written = read_json(tmp_path / out / "adapter_config.json")["base_model_name_or_path"]
        assert (tmp_path / "project" / "base").samefile(written), written
    shutil.copytree(base, tmp_path / "base")  # where it was started, perhaps: another one
    if name != "../base":
        with pytest.raises(AdapterError, match="means .*base and .*base; name the right one by --"):
            convert(own, tmp_path / "c")
        convert(own, tmp_path / "c", base=tmp_path / "base")


def test_a_base_that_a_lora_does_not_name(lora, tmp_path, monkeypatch):
    own = shutil.copytree(lora, tmp_path / "lora")
    name_base(own, None)
    for make in (
        lambda: convert(own, tmp_path / "a"),
        lambda: compose_experts({"x": own}, tmp_path / "a", options=UNIFORM),
    ):
        with pytest.raises(AdapterError, match="`base_model_name_or_path` is null.*--base"):
            make()


def test_a_long_error_of_another_library_is_cut():
    assert brief(ValueError("a\n  b")) == "ValueError: a b"
    assert brief(KeyError()) == "KeyError"
    assert len(brief(ValueError("some class, " * 200))) < 300
