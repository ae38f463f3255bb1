"""Adapters as a server opens them: AdaFuse directories and PEFT LoRAs, checked without a device."""

import json
import os
import re
import shutil

import convert_sources as sources
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.digest import content_hash
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.serving.adapters import (
    LORA,
    MIXTURE,
    open_adapter,
    split_path,
    stamp_path,
)
from vllm_adafuse.serving.content import Content
from vllm_adafuse.serving.plain_loras import VLLM_LORA
from vllm_adafuse.tiny import make_tiny_backbone, tiny_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"
PEFT = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("serving") / "base")


@pytest.fixture(scope="module")
def backbone(base):
    return Backbone.from_path(str(base))


@pytest.fixture(scope="module")
def good_lora(base, tmp_path_factory):
    """One that no test changes."""
    return sources.peft_lora(base, tmp_path_factory.mktemp("lora") / "lora")[1]


@pytest.fixture
def lora(good_lora, tmp_path):
    return shutil.copytree(good_lora, tmp_path / "lora")


def edit(path, **changes):
    file = path / CONFIG
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def edit_tensors(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)


def pairs(opened):
    """Linear, expert, A [r, in] and B [out, r], one expert at a time."""
    for name, first, a, b in opened.tensors():
        for i, of_expert in enumerate(b):
            yield name, first + i, a[i % len(a)], of_expert


def refusal(path, backbone) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        open_adapter(path, backbone)
    assert caught.value.subject == f"adapter {path}"
    return caught.value


@pytest.mark.parametrize("options", [
    {},
    {"use_rslora": True, "rank_pattern": {"up_proj": 8, r"layers\.1\..*q_proj": 2}},
    {"alpha_pattern": {"up_proj": 32}, "rank_pattern": {"layers.0.mlp.up_proj": 3}},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
])  # fmt: skip
def test_a_peft_lora_is_what_peft_says(options, base, backbone, tmp_path):
    model, path = sources.peft_lora(base, tmp_path / "lora", **options)
    opened = open_adapter(path, backbone)
    assert (opened.kind, opened.num_experts, opened.config) == (LORA, 1, None)
    assert opened.router() is None
    expected = {
        name.removeprefix(PEFT): module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    found = {}
    for name, expert, a, b in pairs(opened):
        linear = opened.linears[name]
        assert expert == 0 and (a.shape[1], b.shape[0]) == (linear.size_in, linear.size_out)
        assert a.shape[0] == b.shape[1] == linear.ranks[0]
        found[name] = linear.scales[0] * (b @ a)
    assert found.keys() == expected.keys() == opened.linears.keys()
    for name, delta in expected.items():
        assert torch.allclose(found[name], delta, atol=1e-6), name
    assert opened.ranks == (max(linear.ranks[0] for linear in opened.linears.values()),)


def test_a_mixture(base, backbone, tmp_path):
    path = make_random_adapter(
        base, tmp_path / "mix", num_experts=3, top_k=2, r=[4, 20, 33], router_bias=True
    )
    opened, tensors = open_adapter(path, backbone), load_file(path / WEIGHTS)
    assert (opened.kind, opened.num_experts, opened.ranks) == (MIXTURE, 3, (4, 20, 33))
    router = opened.router()
    assert router.keys() == {"router.weight", "router.bias"}
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in router.items())
    seen = set()
    for name, expert, a, b in pairs(opened):
        r = opened.config.ranks[expert]
        assert opened.linears[name].scales == opened.config.scales
        assert torch.equal(a, tensors[f"{name}.lora_A"][expert, :r])
        assert torch.equal(b, tensors[f"{name}.lora_B"][expert, :, :r])
        assert (a.shape[1], b.shape[0]) == backbone.linears[name]
        seen.add((name, expert))
    assert len(seen) == 3 * len(opened.linears) == 3 * len(backbone.linears)


def test_layer_wise_and_later_routers_are_kept(base, backbone, tmp_path):
    later = make_random_adapter(base, tmp_path / "later", num_experts=2, top_k=1, router_layer=1)
    assert open_adapter(later, backbone).config.router_layer == 1
    wise = make_random_adapter(
        base, tmp_path / "wise", num_experts=3, top_k=1, routing="layer_wise", shared_A=True
    )
    opened, tensors = open_adapter(wise, backbone), load_file(wise / WEIGHTS)
    assert opened.config.layer_wise and opened.router() is None
    for name, expert, a, _ in pairs(opened):
        assert torch.equal(a, tensors[f"{name}.lora_A"][0]) and expert < 3


def test_the_digest_is_of_the_content(lora, backbone, tmp_path):
    copy = shutil.copytree(lora, tmp_path / "copy")
    before = open_adapter(lora, backbone).digest
    assert before == open_adapter(copy, backbone).digest and len(before) == 64
    stamp = os.stat(lora / WEIGHTS)
    edit_tensors(lora, lambda t: t[min(t)].mul_(2))
    os.utime(lora / WEIGHTS, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert open_adapter(lora, backbone).digest != before
    edit(copy, lora_alpha=9)
    assert open_adapter(copy, backbone).digest != before


def test_a_path_carries_its_digest():
    digest = "0123456789abcdef" * 4
    for path in ("/a/b", "org/name", "with#sha256=in it", f"/a#sha256={digest}"):
        assert split_path(stamp_path(path, digest)) == (path, digest)
    for path in ("/a/b", "/a#sha256=", f"/a#sha256={digest}0", f"/a#sha256={digest[:-1]}G"):
        assert split_path(path) == (path, None)


def test_files_that_change_while_they_are_read(lora, base, backbone, tmp_path):
    mix = make_random_adapter(base, tmp_path / "mix", num_experts=2, top_k=1, dtype=torch.float32)
    for path in (lora, mix):
        reading = open_adapter(path, backbone).tensors()
        next(reading)
        edit_tensors(path, lambda t: t[max(t)].mul_(2))
        with pytest.raises(AdapterError, match="changed while it was read"):
            list(reading)


def test_tensors_that_are_others_when_they_are_read(base, tmp_path):
    mix = make_random_adapter(base, tmp_path / "mix", num_experts=2, top_k=1)
    adapter = load_adapter(mix)
    name = min(adapter.tensors)
    for change in (lambda t: t.update({name: t[name][..., :1].clone()}), lambda t: t.pop(name)):
        edit_tensors(mix, change)
        with pytest.raises(AdapterError, match=rf"changed since .*\({re.escape(name)}\); try"):
            with adapter.reader():
                pass


def test_values_of_a_pinned_adapter_that_change_while_they_are_read(base, tmp_path):
    mix = make_random_adapter(base, tmp_path / "mix", num_experts=2, top_k=1)

    def double():
        edit_tensors(mix, lambda t: t[max(t)].mul_(2))

    for load in (Content.load, Content.load_changed):
        content = Content(load_adapter(mix), content_hash(mix) if load is Content.load else "")
        with pytest.raises(AdapterError, match="may be of both"):
            load(content, double)
        assert not content.loaded
        content.hash = content_hash(mix)
        content.load(lambda: None)
        assert content.loaded and not content.load_changed(double)


def test_a_tensor_that_is_gone_when_it_is_read(lora, backbone):
    opened = open_adapter(lora, backbone)
    edit_tensors(lora, lambda t: t.pop(f"{PEFT}{UP}.lora_A.weight"))
    with pytest.raises(AdapterError, match=r"up_proj\.lora_A\.weight is gone since"):
        list(opened.tensors())


def test_a_pickle_is_read_like_safetensors(lora, backbone):
    expected = {name: (a, b) for name, _, a, b in pairs(open_adapter(lora, backbone))}
    torch.save(load_file(lora / WEIGHTS), lora / "adapter_model.bin")
    (lora / WEIGHTS).unlink()
    opened = open_adapter(lora, backbone)
    found = {name: (a, b) for name, _, a, b in pairs(opened)}
    assert found.keys() == expected.keys()
    for name in found:
        assert all(map(torch.equal, found[name], expected[name]))
    with (lora / "adapter_model.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(AdapterError, match="changed"):
        opened.check_unchanged()


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape):
    return lambda tensors: tensors.update({PEFT + name: torch.ones(shape)})


@pytest.mark.parametrize("config, words", [
    ({"use_dora": True}, ["`use_dora` is true", "DoRA", "merge_and_unload"]),
    ({"bias": "lora_only"}, ['`bias` is "lora_only"', 'expected "none"']),
    ({"lora_bias": True}, ["`lora_bias` is true"]),
    ({"modules_to_save": ["lm_head"]}, ["`modules_to_save`", "lm_head"]),
    ({"init_lora_weights": "pissa"}, ["`init_lora_weights`", "pissa"]),
    ({"r": 8}, ["shape [4, 128], expected [8, 128]", f"`r` is 8 in {CONFIG}"]),
    ({"r": 0}, ["`r` is 0", "from 1 to 65536"]),
    ({"r": "gone"}, ["`r` is missing"]),
    ({"lora_alpha": "gone"}, ["`lora_alpha` is missing"]),
    ({"rank_pattern": {"up_proj": 2}}, ["up_proj.lora_A.weight", "expected [2, 128]"]),
    ({"peft_type": "IA3"}, ['`peft_type` is "IA3"', '"ADAFUSE" or "LORA"', "convert"]),
    ({"peft_type": "gone"}, ["`peft_type` is null"]),
    ({"target_modules": ["q_proj"], "peft_type": "ADAFUSE"}, ["format_version"]),
])  # fmt: skip
def test_configs_that_are_refused(config, words, lora, backbone):
    if config.get("r") == 8:
        words = [word.replace("`r` is", "r is") for word in words]
    edit(lora, **config)
    error = refusal(lora, backbone)
    assert all(word in str(error) for word in words), str(error)
    assert "--base" not in str(error)


@pytest.mark.parametrize("change, words", [
    (put("lm_head.lora_A.weight", 4, 128), ["lm_head.lora_A", "output head", VLLM_LORA]),
    (put("model.embed_tokens.lora_embedding_A", 4, 9), ["adapts the embedding", VLLM_LORA]),
    (put("model.layers.0.mlp.experts.3.w1.lora_A.weight", 4, 128), ["experts.3.w1", "expert of"]),
    (put(f"{UP}.lora_magnitude_vector", 192), ["DoRA"]),
    (put(f"{UP}.ia3_l", 192), ["ia3_l", "IA3"]),
    (put(f"{UP}.lora_B.bias", 192), ["up_proj.lora_B.bias", "trained bias"]),
    (put("lm_head.modules_to_save.weight", 9, 9), ["lm_head.modules_to_save"]),
    (put("score.weight", 2, 128), ["score.weight", "`modules_to_save`"]),
    (put(f"{UP}.other", 192), ["up_proj.other", "unknown name"]),
    (put("model.layers.9.mlp.up_proj.lora_A.weight", 4, 128), ["layers.9", "fits no linear"]),
    (put(f"{UP}.lora_B.weight", 191, 4), ["shape [191, 4], expected [192, 4]", "trained on"]),
    (put(f"{UP}.lora_A.weight", 5, 128), ["shape [5, 128], expected [4, 128]"]),
    (drop(f"{PEFT}{UP}.lora_B.weight"), [f"{UP}.lora_B.weight", "is missing"]),
    (lambda t: t[f"{PEFT}{UP}.lora_A.weight"].fill_(torch.nan), [UP, "NaN or Inf"]),
    (lambda t: (drop(f"{PEFT}{Q}.lora_A.weight")(t), drop(f"{PEFT}{Q}.lora_B.weight")(t)),
     [f"no tensors of {Q}", "`target_modules`", "incomplete"]),
])  # fmt: skip
def test_tensors_that_are_refused(change, words, lora, backbone):
    edit_tensors(lora, change)
    error = refusal(lora, backbone)
    assert all(word in str(error) for word in words), str(error)


def test_an_adapter_of_another_model(lora, backbone):
    edit(lora, target_modules=["other"])
    edit_tensors(lora, lambda t: [t.update({k.replace("model.layers", "model.h"): t.pop(k)})
                                  for k in list(t)])  # fmt: skip
    assert "fits no linear" in str(refusal(lora, backbone))
    edit_tensors(lora, lambda t: [t.pop(name) for name in list(t)])
    assert "holds no lora_A / lora_B pair" in str(refusal(lora, backbone))


def test_other_formats_are_told_to_convert(base, backbone, tmp_path):
    hydra = sources.routed_lora(base, tmp_path / "hydra", True)
    edit(hydra, peft_type="LORA")
    assert f"vllm-adafuse convert {hydra} OUT" in str(refusal(hydra, backbone))


def test_directories_that_are_none(lora, backbone, base, tmp_path):
    assert "no such directory" in str(refusal(tmp_path / "nowhere", backbone))
    assert "is a file" in str(refusal(lora / CONFIG, backbone))
    assert "checkpoint of a whole model" in str(refusal(base, backbone))
    (lora / WEIGHTS).write_bytes((lora / WEIGHTS).read_bytes()[:-8])
    assert "not a sound safetensors file" in str(refusal(lora, backbone))
    (lora / WEIGHTS).unlink()
    assert WEIGHTS in str(refusal(lora, backbone))
    (lora / CONFIG).write_text("[")
    assert "not valid JSON" in str(refusal(lora, backbone))


def test_linears_are_those_that_the_caller_names(lora, backbone):
    """Also of classes that the table of architectures does not hold."""
    linears = {f"transformer.{name}": size for name, size in backbone.linears.items()}
    other = Backbone("other", None, 128, 3, 512, 1e-5, linears)
    assert "fits no linear of the backbone other" in str(refusal(lora, other))
    edit_tensors(lora, lambda t: [
        t.update({k.replace(PEFT, f"{PEFT}transformer."): t.pop(k)}) for k in list(t)
    ])  # fmt: skip
    assert open_adapter(lora, other).linears.keys() == linears.keys()
    # Of an unknown backbone nothing but the file's own consistency is checked.
    assert open_adapter(lora).linears.keys() == linears.keys()
    edit_tensors(lora, put(f"transformer.{UP}.lora_A.weight", 5, 128))
    assert "expected [4, in]" in str(refusal(lora, None))


def test_a_wider_backbone(lora):
    wide = Backbone.from_hf_config(tiny_config("LlamaForCausalLM", hidden_size=256), "wide")
    assert "expected [4, 256]" in str(refusal(lora, wide))
