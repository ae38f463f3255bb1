"""Weights that are packed: how small, how near, and what else is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.packed import STEPS, pack, pack_directory, unpack, unpack_directory


def weights():
    draw = torch.Generator().manual_seed(0)
    return {
        "wide": torch.randn(64, 512, generator=draw) * torch.logspace(-3, 2, 64)[:, None],
        "experts": torch.randn(4, 8, 128, generator=draw).bfloat16(),
        "zeros": torch.zeros(3, 5),
        "norm": torch.randn(128, generator=draw),
    }


def test_every_value_is_within_half_a_step_of_its_row():
    tensors = weights()
    content = pack(tensors)
    found = unpack(content)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        row = tensor.float().abs().amax(-1, keepdim=True)
        step = row / STEPS if tensor.dim() > 1 else tensor.abs() / 64  # a norm is only bfloat16
        assert found[name].dtype == torch.bfloat16 and found[name].shape == tensor.shape
        # Scales and values are rounded to bfloat16, too: 1/256 of up to STEPS steps.
        off = (found[name].float() - tensor.float()).abs()
        assert (off <= step * (0.5 + STEPS / 128)).all(), name
    assert len(content) < 0.4 * sum(2 * t.numel() for t in tensors.values())


def test_a_directory_is_packed_in_its_place_and_copied_unpacked(tmp_path):
    (tmp_path / "a").mkdir()
    save_file(weights(), tmp_path / "a" / "model.safetensors")
    (tmp_path / "a" / "config.json").write_text("{}")
    words = json.dumps({f"word{i}": i for i in range(500)})
    (tmp_path / "a" / "tokenizer.json").write_text(words)
    pack_directory(tmp_path)
    names = {f.name for f in (tmp_path / "a").iterdir()}
    assert names == {"config.json", "model.safetensors.xz", "tokenizer.json.xz"}
    assert (tmp_path / "a" / "tokenizer.json.xz").stat().st_size < len(words) / 2
    unpack_directory(tmp_path / "a", tmp_path / "b")
    names = {f.name for f in (tmp_path / "b").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (tmp_path / "b" / "tokenizer.json").read_text() == words
    expected = unpack((tmp_path / "a" / "model.safetensors.xz").read_bytes())
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.json.xz").write_bytes(b"no such file")
    with pytest.raises(AdapterError, match="tokenizer.json.xz: not a packed tokenizer"):
        unpack_directory(tmp_path / "a", tmp_path / "b")
    for content in (b"", b"no such file", pack(weights())[:-20]):
        with pytest.raises(AdapterError, match="not a packed file"):
            unpack(content)
