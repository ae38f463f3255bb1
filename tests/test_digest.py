"""The content hash: changes with every byte that counts, and with nothing else."""

import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from broken_adapters import CONFIG, WEIGHTS, edit_config, edit_header, edit_tensors
from safetensors.torch import load_file, save_file
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.digest import content_hash
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.format.tensor_file import TensorFile
from vllm_adafuse.tiny import make_tiny_backbone

PEFT = "base_model.model.model.layers.0.self_attn.q_proj"


def make_lora(path):
    """A plain PEFT LoRA directory."""
    path.mkdir()
    shapes = {"A": (4, 8), "B": (8, 4)}
    tensors = {f"{PEFT}.lora_{side}.weight": torch.randn(shape) for side, shape in shapes.items()}
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
              "base_model_name_or_path": "somewhere/else", "use_rslora": False}  # fmt: skip
    (path / CONFIG).write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("digest")
    base = make_tiny_backbone(root / "base")
    made = make_random_adapter(base, root / "adafuse", num_experts=2, top_k=1, r=[2, 4])
    return {"adafuse": made, "lora": make_lora(root / "lora")}


@pytest.fixture(params=["adafuse", "lora"])
def adapter(request, adapters, tmp_path):
    return shutil.copytree(adapters[request.param], tmp_path / "another" / "place")


def rewrite(path, order, **metadata):
    """Saves the same tensors in another order, so at other offsets."""
    tensors = load_file(path / WEIGHTS)
    names = order(tensors)
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16"}
    for name in names:
        raw = bytes(tensors[name].flatten().view(torch.uint8).numpy())
        header[name] = {"dtype": kinds[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}  # fmt: skip
        data += raw
    text = json.dumps(header, indent=1).encode()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def shuffle_config(path):
    raw = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(dict(reversed(raw.items())), indent=7))


SAME = {
    "another time": lambda path: os.utime(path / WEIGHTS, (1, 1)),
    "another order of tensors": lambda path: rewrite(path, lambda t: sorted(t, reverse=True)),
    "no metadata": lambda path: rewrite(path, sorted),
    "other metadata": lambda path: rewrite(path, sorted, epoch="3", format="pt"),
    "another order of keys": shuffle_config,
    "the backbone elsewhere": edit_config(base_model_name_or_path="../elsewhere"),
    "a file beside it": lambda path: (path / "README.md").write_text("hello"),
}


def flip(path):
    """One bit of the last tensor's last byte."""
    with (path / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def rename(header):
    name = sorted(set(header) - {"__metadata__"})[0]
    header[f"{name}x"] = header.pop(name)


def swap(tensors):
    """Two tensors of one shape under each other's name."""
    shapes = {}
    for name, tensor in list(tensors.items()):
        other = shapes.setdefault(tensor.shape, name)
        if other != name:
            tensors[other], tensors[name] = tensors[name].clone(), tensors[other].clone()
            return
    name = next(iter(tensors))
    tensors[name] = tensors[name].flip(0).clone()


def reshape(header):
    """The same bytes as another shape."""
    entry = header[sorted(set(header) - {"__metadata__"})[0]]
    entry["shape"] = [1, *entry["shape"]]


def other_dtype(header):
    """The same bytes as another dtype of that size."""
    for name in set(header) - {"__metadata__"}:
        header[name]["dtype"] = {"F32": "I32", "BF16": "F16"}[header[name]["dtype"]]


OTHER = {
    "one bit": flip,
    "a name": edit_header(rename),
    "two tensors swapped": edit_tensors(swap),
    "a shape": edit_header(reshape),
    "a dtype": edit_header(other_dtype),
    "a tensor more": edit_tensors(lambda t: t.update(more=torch.zeros(1))),
    "an empty tensor more": edit_tensors(lambda t: t.update(more=torch.zeros(0))),
    "alpha": edit_config(lora_alpha=3.5),
    "a key more": edit_config(use_rslora=True),
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_equal_adapters_have_one_hash(change, adapter):
    before = content_hash(adapter)
    change(adapter)
    assert content_hash(adapter) == before
    assert len(before) == 64 and set(before) <= set("0123456789abcdef")


@pytest.mark.parametrize("change", OTHER.values(), ids=OTHER)
def test_whatever_counts_changes_it(change, adapter):
    before = content_hash(adapter)
    change(adapter)
    assert content_hash(adapter) != before


def test_it_does_not_hang_on_the_spelling_of_the_path(adapter, monkeypatch):
    before = content_hash(adapter)
    link = adapter.with_name("link")
    link.symlink_to(adapter)
    monkeypatch.chdir(adapter.parent)
    monkeypatch.setenv("HOME", str(adapter.parent))
    assert {content_hash(p) for p in (link, adapter.name, f"~/{adapter.name}")} == {before}


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda p: (p / WEIGHTS).unlink(), (WEIGHTS, "missing")),
        (lambda p: (p / CONFIG).unlink(), (CONFIG, "missing")),
        (lambda p: os.truncate(p / WEIGHTS, 100), (WEIGHTS, "sound")),
        (lambda p: (p / CONFIG).write_text("[1]"), (CONFIG, "list", "object")),
        (lambda p: (p / CONFIG).write_text('{"r": 1, "r": 2}'), (CONFIG, "`r`", "twice")),
        (lambda p: (p / CONFIG).write_text("{"), (CONFIG, "JSON")),
    ],
    ids=["no weights", "no config", "cut", "a list", "a key twice", "no JSON"],
)
def test_damaged_files_are_the_projects_error(damage, words, adapter):
    damage(adapter)
    with pytest.raises(AdapterError) as error:
        content_hash(adapter)
    assert all(word in str(error.value) for word in words), error.value


def test_a_pipe_does_not_block_it(adapter):
    (adapter / WEIGHTS).unlink()
    os.mkfifo(adapter / WEIGHTS)
    with pytest.raises(AdapterError, match="pipe"):
        content_hash(adapter)


@pytest.mark.parametrize("adapter", ["adafuse"], indirect=True)  # larger than a read buffer
def test_a_file_that_shrinks_meanwhile_is_noticed(adapter, monkeypatch):
    fill, cut = TensorFile._read_into, []

    def cut_once(*args):
        if not cut:
            cut.append(os.truncate(adapter / WEIGHTS, 300))
        fill(*args)

    monkeypatch.setattr(TensorFile, "_read_into", cut_once)
    with pytest.raises(AdapterError, match="changed while it was read"):
        content_hash(adapter)


def test_memory_is_constant(adapters, tmp_path):
    """A sparse adapter of 256 MiB, by a process that may hold far less."""
    path = shutil.copytree(adapters["lora"], tmp_path / "large")
    nbytes = 1 << 28
    header = {"a": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}
    text = json.dumps(header).encode()
    (path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path / WEIGHTS, 8 + len(text) + nbytes)
    code = (
        "import resource, sys, vllm_adafuse.format.digest as d\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "d.content_hash(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 << 10  # KiB
