"""Composed checkpoints: what is in them, who can load them, and what is refused."""

import errno
import json
import os
import shutil

import pytest
import torch
from broken_adapters import NOBODY, as_user
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.compose import compose
from vllm_adafuse.format.digest import content_hash
from vllm_adafuse.format.merge import merge
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.format.tree import tree_files
from vllm_adafuse.offline.routing import vocabulary_routes
from vllm_adafuse.tiny import make_tiny_backbone


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = make_tiny_backbone(tmp_path_factory.mktemp("base"))
    (path / "original").mkdir()
    (path / "original" / "consolidated.00.pth").write_bytes(b"never taken")
    return path


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    path = make_random_adapter(base, tmp_path_factory.mktemp("adapter"), num_experts=4, r=4)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"x_note": "kept"}))
    return path


FOLDERS = [
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",  # of a module of its own
    "additional_chat_templates/deep/down/tool_use.jinja",
    "linked/config.json",
    "LICENSE",
]


@pytest.fixture
def full(base, tmp_path):
    """A backbone with folders, one of them a link to elsewhere."""
    full = shutil.copytree(base, tmp_path / "full")
    for number, name in enumerate(FOLDERS):
        file = full / name
        if name.startswith("linked"):
            file = tmp_path / "elsewhere" / "config.json"
            (full / "linked").symlink_to("../elsewhere")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(str(number).encode())
    (full / ".git").mkdir()
    (full / ".git" / "config").write_text("of this copy")
    return full


def compose_it(base, adapter, out):
    return compose(base, adapter, out)


def merge_it(base, adapter, out):
    return merge(adapter, base, out, ["0"])


def names(path):
    return {
        os.path.relpath(os.path.join(folder, file), path)
        for folder, _, files in os.walk(path, followlinks=True)
        for file in files
    }


def test_hard_links(base, adapter, tmp_path):
    before = {p.name: p.read_bytes() for p in base.iterdir() if p.is_file()}
    out = compose(base, adapter, tmp_path / "out")
    assert names(out) == {p.name for p in base.iterdir() if p.is_file()} | {
        "adafuse/adapter_config.json",
        "adafuse/adapter_model.safetensors",
    }
    for name in before.keys() - {"config.json"}:
        assert (out / name).samefile(base / name) and not (out / name).is_symlink()
    assert before == {p.name: p.read_bytes() for p in base.iterdir() if p.is_file()}


def test_config(base, adapter, tmp_path):
    out = compose(base, adapter, tmp_path / "out")
    plain = json.loads((base / "config.json").read_text())
    config = json.loads((out / "config.json").read_text())
    assert config.pop("adafuse") == {"adapter": "adafuse"}
    assert config.pop("architectures") == ["AdaFuseLlamaForCausalLM"]
    assert plain.pop("architectures") == ["LlamaForCausalLM"]
    assert config == plain


def test_composed_adapter_is_the_adapter_and_finds_its_backbone(base, adapter, tmp_path):
    out = compose(base, adapter, tmp_path / "out")
    moved = tmp_path / "moved"
    out.rename(moved)
    composed = load_adapter(moved / "adafuse", Backbone.from_path(str(moved)))
    assert composed.config.base_path(composed.path) == str(moved)
    raw = [
        json.loads((d / "adapter_config.json").read_text()) for d in (adapter, moved / "adafuse")
    ]
    assert raw[0] | {"base_model_name_or_path": ".."} == raw[1] and raw[1]["x_note"] == "kept"
    routes = vocabulary_routes(load_adapter(adapter), base)
    ids, gates = vocabulary_routes(composed, moved)
    assert torch.equal(routes[0], ids)
    torch.testing.assert_close(routes[1], gates)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_transformers_loads_the_plain_backbone(architecture, tmp_path):
    base = make_tiny_backbone(tmp_path / "base", architecture)
    adapter = make_random_adapter(base, tmp_path / "adapter", num_experts=2, r=2)
    out = compose(base, adapter, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    inputs = tokenizer("The value of the expression", return_tensors="pt")["input_ids"]
    plain, composed = (AutoModelForCausalLM.from_pretrained(d).eval() for d in (base, out))
    assert type(composed) is type(plain)
    with torch.no_grad():
        torch.testing.assert_close(composed(inputs).logits, plain(inputs).logits)
    for (name, one), (same, other) in zip(*(m.state_dict().items() for m in (composed, plain))):
        assert name == same and torch.equal(one, other)
    written = [
        pipeline("text-generation", model=str(d))("The value", max_new_tokens=5, do_sample=False)
        for d in (base, out)
    ]
    assert written[0] == written[1]


def test_copy_shares_no_file(base, adapter, tmp_path):
    out = compose(base, adapter, tmp_path / "out", copy=True)
    linked = compose(base, adapter, tmp_path / "linked")
    assert names(out) == names(linked)
    for name in names(out):
        assert (out / name).read_bytes() == (linked / name).read_bytes()
        assert os.stat(out / name).st_nlink == 1 and not (out / name).is_symlink()


def test_symbolic_links_across_file_systems(base, adapter, tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    out = compose(base, adapter, tmp_path / "out")
    weights = out / "model.safetensors"
    assert weights.is_symlink() and weights.readlink() == (base / "model.safetensors").resolve()
    assert not (out / "config.json").is_symlink()
    assert load_adapter(out / "adafuse", Backbone.from_path(str(out)))


@pytest.fixture
def cached(base, tmp_path):
    """The backbone as a hub cache keeps it: relative links from a snapshot to blobs."""
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(p for p in base.iterdir() if p.is_file()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.mark.parametrize("how", ["hard", "symbolic", "copy"])
def test_links_of_a_hub_cache_are_resolved(cached, adapter, tmp_path, monkeypatch, how):
    if how == "symbolic":
        monkeypatch.setattr(
            os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EXDEV, "other device"))
        )
    out = compose(cached, adapter, tmp_path / "out", copy=how == "copy")
    weights = out / "model.safetensors"
    assert weights.is_symlink() == (how == "symbolic")
    assert weights.samefile(cached / "model.safetensors") == (how != "copy")
    assert weights.read_bytes() == (cached / "model.safetensors").read_bytes()


def test_empty_directory_is_taken_and_full_one_refused(base, adapter, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    compose(base, adapter, out)
    before = {name: (out / name).read_bytes() for name in names(out)}
    with pytest.raises(AdapterError, match="not empty"):
        compose(base, adapter, out)
    assert before == {name: (out / name).read_bytes() for name in names(out)}


def test_refuses_the_backbone_itself(base, adapter, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(base)
    for out in (base, base / "original" / "..", link):
        with pytest.raises(AdapterError, match="backbone itself"):
            compose(base, adapter, out)
    assert (base / "config.json").exists() and not (base / "adafuse").exists()


def test_refuses_a_file_as_output(base, adapter, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(AdapterError, match="is a file or a link"):
        compose(base, adapter, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_unfit_adapter_leaves_nothing_behind(base, adapter, tmp_path):
    wide = make_tiny_backbone(tmp_path / "wide", hidden_size=64)
    with pytest.raises(AdapterError, match=r"expected \[4, 64\]"):
        compose(wide, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("copy", [False, True])
def test_failure_half_way_leaves_nothing_behind(base, adapter, tmp_path, monkeypatch, copy):
    broken = shutil.copytree(base, tmp_path / "broken")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vllm_adafuse.format.compose._write_object", fail)
    with pytest.raises(OSError, match="No space left"):
        compose(broken, adapter, tmp_path / "out", copy)
    assert not (tmp_path / "out").exists()
    assert names(broken) == names(base)


def test_dangling_link_in_the_backbone(cached, adapter, tmp_path):
    (cached / "vocab.json").symlink_to("../../blobs/none")
    with pytest.raises(FileNotFoundError, match="blobs/none"):
        compose(cached, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_composing_again_replaces_the_adapter(base, adapter, tmp_path):
    first = compose(base, adapter, tmp_path / "first")
    other = make_random_adapter(base, tmp_path / "other", num_experts=2, r=2)
    second = compose(first, other, tmp_path / "second")
    assert load_adapter(second / "adafuse").config.num_experts == 2
    config = json.loads((second / "config.json").read_text())
    assert config["architectures"] == ["AdaFuseLlamaForCausalLM"]


@pytest.mark.parametrize("copy", [False, True], ids=["linked", "copied"])
def test_the_adapter_is_never_shared(base, adapter, tmp_path, copy):
    """What is written over the source later is not in the composed checkpoint."""
    source = shutil.copytree(adapter, tmp_path / "source")
    before = content_hash(source)
    out = compose(base, source, tmp_path / "out", copy)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert os.stat(out / "adafuse" / name).st_nlink == 1
        (source / name).write_bytes(b"other")
    assert content_hash(out / "adafuse") == before


@pytest.mark.parametrize("how", [compose_it, merge_it])
def test_folders_come_along(full, adapter, tmp_path, how):
    out = how(full, adapter, tmp_path / "out")
    assert names(out) - {"adafuse/adapter_config.json", "adafuse/adapter_model.safetensors"} == (
        names(full) - {"original/consolidated.00.pth", ".git/config"}
    )
    for name in FOLDERS:
        assert (out / name).read_bytes() == (full / name).read_bytes(), name
    assert not (out / "linked").is_symlink()


def test_merge_leaves_other_forms_of_the_weights(full, adapter, tmp_path):
    for name in ("onnx/model.onnx", "onnx/model.onnx_data", "model.gguf", "gguf/q4.gguf"):
        (full / name).parent.mkdir(exist_ok=True)
        (full / name).write_bytes(b"the backbone")
    kept = names(merge_it(full, adapter, tmp_path / "merged"))
    assert not [name for name in kept if "onnx" in name or "gguf" in name]
    assert "onnx/model.onnx" in names(compose(full, adapter, tmp_path / "composed"))


@pytest.mark.parametrize("how", [compose_it, merge_it])
@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda base: os.mkfifo(base / "1_Pooling" / "pipe"), "1_Pooling/pipe: is a pipe"),
        (lambda base: (base / "1_Pooling" / "up").symlink_to(".."), "1_Pooling/up: is a link to"),
        (lambda base: (base / "root").symlink_to("/"), "root: is a link to /"),
    ],
    ids=["a pipe", "a link upwards", "a link to everything"],
)
def test_what_cannot_come_along(full, adapter, tmp_path, how, spoil, words):
    spoil(full)
    with pytest.raises(AdapterError, match=words):
        how(full, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("name", ["1_Pooling", "1_Pooling/config.json"])
def test_what_cannot_be_read(full, name):
    (full / name).chmod(0)
    for folder in (full, *full.parents):
        folder.chmod(folder.stat().st_mode | 0o055)
    with as_user(NOBODY), pytest.raises(AdapterError, match=f"{name}: cannot be read"):
        tree_files(full)


def test_a_folder_under_our_name(full, adapter, tmp_path):
    (full / "adafuse").mkdir()
    (full / "adafuse" / "README.md").write_text("mine")
    with pytest.raises(AdapterError, match="adafuse/README.md: adafuse is where"):
        compose(full, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "adafuse/README.md" in names(merge_it(full, adapter, tmp_path / "merged"))


def test_a_composed_backbone_leaves_its_adapter_behind(full, adapter, tmp_path):
    first = compose(full, adapter, tmp_path / "first")
    merged = merge_it(first, adapter, tmp_path / "merged")
    assert (merged / "1_Pooling").is_dir() and not (merged / "adafuse").exists()


def test_an_output_inside_the_backbone(full, adapter):
    for how in (compose_it, merge_it):
        with pytest.raises(AdapterError, match="lies in the backbone"):
            how(full, adapter, full / "1_Pooling" / "out")
