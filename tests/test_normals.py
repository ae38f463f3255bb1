"""Random tensors of large adapters: normal, none like another, and files as safetensors writes them."""

import os

import pytest
import torch
from safetensors.torch import load_file, save
from vllm_adafuse.format import normals
from vllm_adafuse.format.adapter import check_adapter
from vllm_adafuse.format.files import save_tensors
from vllm_adafuse.format.normals import Normals
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.tiny import make_tiny_backbone


def source(seed: int = 0) -> Normals:
    return Normals(torch.Generator().manual_seed(seed), torch.float32)


@pytest.fixture
def small_block(monkeypatch):
    """What is drawn for itself, and the block behind it, as small as a tiny adapter needs."""
    for name, value in {"DRAWN": 1000, "BLOCK": 4096, "HALF": 2048}.items():
        monkeypatch.setattr(normals, name, value)


def test_what_is_small_is_drawn_for_itself():
    one, generator = source(), torch.Generator().manual_seed(0)
    for shape in ((3, 4), (70,), (2, 3, 5)):
        drawn = torch.randn(shape, generator=generator) * 0.5
        assert torch.equal(one.take(*shape, scale=0.5), drawn)


def test_stretches_are_normal_and_none_is_like_another():
    one = source()
    found = [one.take(16, 4096, scale=scale) for scale in (1.0, 0.25) * 40]
    found.append(one.take(3, 1 << 20, scale=1.0))  # longer than a stretch may be
    for i, value in enumerate(found):
        scale = 0.25 if i % 2 and i < 80 else 1.0
        assert abs(value.mean()) < 0.05 * scale and abs(value.std() / scale - 1) < 0.02
        assert value.is_contiguous() and (value / scale).abs().max() > 3.5
    rows = torch.cat([value.view(-1)[:16] / (value.std()) for value in found]).view(-1, 16)
    distances = torch.cdist(rows, rows) + 100 * torch.eye(len(rows))
    assert distances.min() > 0.5
    parts = found[-1].view(-1, 1 << 19)
    assert len({tuple(part[:4].tolist()) for part in parts}) == len(parts)


def test_a_seed_says_what_comes(small_block):
    def some(seed):
        one = source(seed)
        return torch.cat([one.take(n, scale=1.0).view(-1) for n in (900, 900, 50, 5000)])

    assert torch.equal(some(1), some(1)) and not torch.isclose(some(1), some(2)).any()


def test_as_many_stretches_as_there_are_places_begin_at_places_of_their_own():
    places = torch.arange(normals.HALF) * normals.STRIDE % normals.HALF
    assert len(places.unique()) == normals.HALF == normals.BLOCK // 2


def test_ranks_of_a_large_adapter_end_where_they_should_and_nowhere_else(small_block, tmp_path):
    base = make_tiny_backbone(tmp_path / "base")
    path = make_random_adapter(base, tmp_path / "a", num_experts=3, r=[2, 8, 4])
    adapter, problems = check_adapter(path)
    assert not problems and adapter is not None
    tensors = load_file(path / "adapter_model.safetensors")
    assert sum(value.numel() for value in tensors.values()) > 10 * normals.DRAWN
    for name, value in tensors.items():
        if name.endswith("lora_B"):
            value = value.transpose(1, 2)
        for expert, rank in enumerate((2, 8, 4)) if "lora" in name else ():
            assert not value[expert, rank:].any() and value[expert, :rank].ne(0).all(), name
    again = make_random_adapter(base, tmp_path / "b", num_experts=3, r=[2, 8, 4])
    weights = [p / "adapter_model.safetensors" for p in (path, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert len({value.float().numpy().tobytes() for value in tensors.values()}) == len(tensors)


def test_files_are_those_of_safetensors(tmp_path):
    block, file = torch.randn(100), tmp_path / "a.safetensors"
    tensors = {"ö \"b\"": block[3:43].view(5, 8), "a": block[:40], "none": torch.empty(0, 4)}
    save_tensors(tensors, file)
    alone = {name: value.clone() for name, value in tensors.items()}
    assert file.read_bytes() == save(alone, metadata={"format": "pt"})
    tensors |= {
        "half": block.bfloat16()[1:7], "one": torch.tensor(3.0), "ids": torch.arange(3),
        "bits": torch.tensor([True, False]), "eight": block[:4].to(torch.float8_e4m3fn),
    }  # fmt: skip
    save_tensors(tensors, file)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name].float(), value.float())


def test_a_file_stands_until_the_new_one_does(tmp_path):
    file, link = tmp_path / "a.safetensors", tmp_path / "link"
    save_tensors({"a": torch.arange(1000)}, file)
    link.symlink_to(file)
    os.link(file, tmp_path / "other")
    save_tensors({"b": load_file(file)["a"]}, link)  # reads it by a map of the old file
    assert torch.equal(load_file(file)["b"], torch.arange(1000)) and link.is_symlink()
    assert set(load_file(tmp_path / "other")) == {"a"}
    with pytest.raises(ValueError, match=r"tensor turned: torch.int64 on cpu, strides \(1, 3\)"):
        save_tensors({"turned": torch.arange(6).view(2, 3).T}, file)
    (tmp_path / "a.safetensors.part").mkdir()
    with pytest.raises(OSError, match=r"a.safetensors.part"):
        save_tensors({"c": torch.arange(2)}, file)
    assert set(load_file(file)) == {"b"}
