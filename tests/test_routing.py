"""Offline routes equal the gates of the independent reference."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.places import find_local_backbone
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.offline import reference
from vllm_adafuse.offline.routing import OfflineRouter, vocabulary_routes
from vllm_adafuse.tiny import make_tiny_backbone

VOCAB = 1003


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Gemma2ForCausalLM"])
def architecture(request):
    return request.param


# bfloat16, because Gemma's embedding scale is rounded to it (sqrt(128) is 11.3125 there).
@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def base(request, architecture, tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone")
    return make_tiny_backbone(path, architecture, dtype=request.param), request.param


@pytest.mark.parametrize("router_input", ["first_norm", "embedding"])
@pytest.mark.parametrize("router_weights", ["topk_softmax", "softmax_topk"])
def test_vocabulary_routes_equal_reference(base, router_input, router_weights, tmp_path):
    base, dtype = base
    path = make_random_adapter(
        base,
        tmp_path / "adapter",
        num_experts=6,
        top_k=3,
        r=4,
        layers=[0],
        target_modules=["q_proj"],
        # Beside a tiny model's small embeddings a random bias would decide alone.
        router_bias=router_input == "first_norm",
        router_input=router_input,
        router_weights=router_weights,
        router_temperature=0.7,
        dtype=torch.float32,
    )
    ids, gates = vocabulary_routes(load_adapter(path), base)
    assert ids.shape == gates.shape == (VOCAB, 3)
    assert ids.dtype == torch.int32 and gates.dtype == torch.float32

    model = reference.load(base, path, dtype=dtype)
    with torch.no_grad():
        model(torch.arange(VOCAB).view(17, 59))
    expected = model.adafuse.gates.view(VOCAB, 6)
    found = torch.zeros_like(expected).scatter(1, ids.long(), gates)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # By falling weight, and experts differ between tokens: the test is not of a constant.
    assert (gates[:, :-1] >= gates[:, 1:]).all()
    assert len(ids[:, 0].unique()) > 1
    total = gates.sum(1)
    if router_weights == "topk_softmax":
        torch.testing.assert_close(total, torch.ones(VOCAB))
    else:
        assert (total < 1).all()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = make_tiny_backbone(tmp_path_factory.mktemp("llama"))
    return base, make_random_adapter(base, tmp_path_factory.mktemp("adapter"), r=2)


def test_chunks_do_not_matter(llama, monkeypatch):
    base, path = llama
    whole = vocabulary_routes(load_adapter(path), base)
    monkeypatch.setattr("vllm_adafuse.offline.routing.CHUNK", 100)
    parts = vocabulary_routes(load_adapter(path), base)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])


def test_single_tokens_equal_the_vocabulary(llama):
    base, path = llama
    ids, gates = vocabulary_routes(load_adapter(path), base)
    tokens = torch.tensor([1002, 7, 7, 0])
    some_ids, some_gates = OfflineRouter(load_adapter(path), base).routes(tokens)
    assert torch.equal(some_ids, ids[tokens])
    torch.testing.assert_close(some_gates, gates[tokens])


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_refuses_tokens_outside_the_vocabulary(llama, token):
    router = OfflineRouter(load_adapter(llama[1]), llama[0])
    with pytest.raises(AdapterError, match=f"token id {token} has no row"):
        router.routes(torch.tensor([3, token]))


def test_no_tokens_have_no_routes(llama):
    ids, gates = OfflineRouter(load_adapter(llama[1]), llama[0]).routes(torch.tensor([]).long())
    assert ids.shape == gates.shape == (0, 2)


def test_refuses_backbone_of_another_hidden_size(llama, tmp_path):
    wide = make_tiny_backbone(tmp_path / "wide", hidden_size=64)
    with pytest.raises(AdapterError, match="hidden_size 64"):
        OfflineRouter(load_adapter(llama[1]), wide)


def test_refuses_embedding_unlike_its_config(llama, tmp_path):
    base = shutil.copytree(llama[0], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].clone()
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(AdapterError, match=r"\[1002, 128\], but config.json says \[1003, 128\]"):
        OfflineRouter(load_adapter(llama[1]), base)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is not valid JSON .*, expected a UTF-8 JSON object"),
        (b"{", "is not valid JSON .*, expected a UTF-8 JSON object"),
        (b"[]", "holds a list, expected a JSON object"),
        (b"{}", "`weight_map` is null, expected names of files"),
    ],
)
def test_damaged_index_is_reported(llama, tmp_path, content, words):
    base = shutil.copytree(llama[0], tmp_path / "base")
    (base / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(AdapterError, match=f"index.json: {words}"):
        OfflineRouter(load_adapter(llama[1]), base)


def test_damaged_weights_are_reported(llama, tmp_path):
    base = shutil.copytree(llama[0], tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(AdapterError, match="model.safetensors: is not a sound safetensors file"):
        OfflineRouter(load_adapter(llama[1]), base)


def test_find_local_backbone(llama, tmp_path):
    assert find_local_backbone(str(llama[0])) == llama[0]
    for absent in (str(tmp_path), str(tmp_path / "none"), "no-such-owner/no-such-model"):
        assert find_local_backbone(absent) is None
