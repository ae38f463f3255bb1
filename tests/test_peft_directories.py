"""PEFT directories as people have them: other names, whole modules beside the LoRA, newer keys."""

import dataclasses
import json
import shutil

import convert_sources as sources
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from vllm_adafuse.cli.main import main
from vllm_adafuse.convert.names import of_decoder, unwrapped
from vllm_adafuse.convert.peft_config import FOLLOWED, HARMLESS, REFUSED
from vllm_adafuse.convert.registry import convert
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.experts.compose import RouterOptions, compose_experts
from vllm_adafuse.format.backbone import EMBEDDING
from vllm_adafuse.tiny import make_tiny_backbone

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYER = "layers.1.self_attn.q_proj.lora_A.weight"
UNIFORM = RouterOptions(router="uniform")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("peft") / "base", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def good(base, tmp_path_factory):
    """(the model, its directory), with ranks and alphas of their own by an anchored pattern."""
    path = tmp_path_factory.mktemp("lora") / "lora"
    return sources.peft_lora(
        base, path, rank_pattern={r"^model\.layers\.0\.self_attn\.q_proj": 2},
        alpha_pattern={"^model.layers.2.mlp.up_proj": 3}, layers_to_transform=[0, 2],
    )  # fmt: skip


@pytest.fixture
def lora(good, tmp_path):
    return shutil.copytree(good[1], tmp_path / "lora")


def edit(path, **changes):
    config = json.loads((path / CONFIG).read_text()) | changes
    (path / CONFIG).write_text(json.dumps(config))


def edit_tensors(path, change):
    save_file(change(load_file(path / WEIGHTS)), path / WEIGHTS)


def refused(lora, base, *words):
    """What `convert` says, which `compose-experts` says too."""
    said = []
    for make in (
        lambda: convert(lora, lora.with_name("out"), base=base),
        lambda: compose_experts({"x": lora}, lora.with_name("out"), base, options=UNIFORM),
    ):
        with pytest.raises(AdapterError) as caught:
            make()
        text = "\n".join(caught.value.problems)
        assert all(word in text for word in words), text
        assert not lora.with_name("out").exists()
        said.append(caught.value.problems)
    return said[0]


# Names


@pytest.mark.parametrize(
    "name, plain",
    [
        (f"base_model.model.model.{LAYER}", f"model.{LAYER}"),
        (f"base_model.model.{LAYER}", f"model.{LAYER}"),
        (f"model.{LAYER}", f"model.{LAYER}"),
        (LAYER, f"model.{LAYER}"),
        (f"_orig_mod.base_model.model.model.{LAYER}", f"model.{LAYER}"),
        (f"base_model.model._orig_mod.model.{LAYER}", f"model.{LAYER}"),
        (f"module.base_model.model.model.{LAYER}", f"model.{LAYER}"),
        (f"_fsdp_wrapped_module.base_model.model.model.{LAYER}", f"model.{LAYER}"),
        (
            "base_model.model.model.layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."
            "self_attn.q_proj.lora_A.default.weight",
            f"model.{LAYER}",
        ),
        ("base_model.model.model.layers.1.self_attn.q_proj.lora_A.sql.weight", f"model.{LAYER}"),
        (f"base_model.model.language_model.model.{LAYER}", f"model.{LAYER}"),
        (f"base_model.model.model.language_model.{LAYER}", f"model.{LAYER}"),
        (f"language_model.{LAYER}", f"model.{LAYER}"),
        ("base_model.model.lm_head.lora_B.weight", "lm_head.lora_B.weight"),
        ("base_model.model.language_model.lm_head.weight", "lm_head.weight"),
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        # Nobody's, or another part's.
        ("base_model.model.vision_tower." + LAYER, "vision_tower." + LAYER),
        ("mixlora.layers.0.mlp.moe_gate.weight", "mixlora.layers.0.mlp.moe_gate.weight"),
        ("base_model.model.submodule.layers.0.x.weight", "submodule.layers.0.x.weight"),
    ],
)
def test_names(name, plain):
    assert of_decoder(unwrapped(name)) == plain


def renamed(old, new):
    return lambda tensors: {name.replace(old, new, 1): t for name, t in tensors.items()}


@pytest.mark.parametrize(
    "change, pattern",
    [
        (renamed("base_model.", "_orig_mod.base_model."), ""),
        (renamed("layers.0.", "layers.0._fsdp_wrapped_module."), ""),
        (renamed(".weight", ".sql.weight"), ""),
        (renamed("base_model.model.model.", "base_model.model.model.language_model."), "language_model."),
    ],
)  # fmt: skip
def test_a_lora_of_other_names_is_the_same(change, pattern, good, lora, base, tmp_path):
    edit_tensors(lora, change)
    config = json.loads((lora / CONFIG).read_text())
    for key in ("rank_pattern", "alpha_pattern"):  # PEFT's patterns are of PEFT's names
        edit(lora, **{key: {
            p.replace("model", "model." + pattern.rstrip("."), 1) if pattern else p: v
            for p, v in config[key].items()
        }})  # fmt: skip
    convert(good[1], tmp_path / "plain", base=base)
    convert(lora, tmp_path / "out", base=base)
    a, b = (load_file(tmp_path / n / WEIGHTS) for n in ("plain", "out"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_lora_of_an_inner_model_is_exact(base, tmp_path):
    model = get_peft_model(
        AutoModel.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"],
                   rank_pattern={r"^layers\.0\.mlp\.up_proj": 2}),
    )  # fmt: skip
    draw = sources.Draw()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(draw(*weight.shape, 0.3 if ".lora_B." in name else 1.0))
    model.save_pretrained(tmp_path / "lora")
    convert(tmp_path / "lora", tmp_path / "a", base=base)
    compose_experts({"x": tmp_path / "lora"}, tmp_path / "b", base, options=UNIFORM)
    head = sources.load_base(base).lm_head

    def original(ids):
        hidden = model.eval()(ids).last_hidden_state
        return type("Out", (), {"logits": hidden @ head.weight.T})

    for out in "ab":
        sources.assert_same(original, base, tmp_path / out)


def test_two_adapters_in_one_file(lora, base):
    names = (renamed(".weight", f".{name}.weight") for name in "ab")
    edit_tensors(lora, lambda t: {n: x.clone() for rule in names for n, x in rule(t).items()})
    refused(lora, base, "lora_A.a.weight", "lora_A.b.weight", "several adapters", "selected_adapters")


def test_a_tower_beside_the_decoder_is_not_dropped(lora, base):
    edit_tensors(lora, lambda t: t | {"base_model.model.vision_tower.q.lora_A.weight": torch.ones(4, 8)})  # fmt: skip
    refused(lora, base, "base_model.model.vision_tower.q.lora_A.weight", "unknown name")


# Whole modules beside the LoRA


def beside(base, dtype=torch.float32, change=None, prefix="base_model.model."):
    def add(tensors):
        own = load_file(base / "model.safetensors")
        names = (EMBEDDING, "lm_head.weight", "model.norm.weight")
        held = {n: own[n].to(dtype).clone() for n in names if n in own}
        if change:
            change(held)
        return tensors | {prefix + n: t for n, t in held.items()}

    return add


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_equal_to_the_backbones_are_left_out(dtype, good, lora, base, tmp_path, capsys):
    edit(lora, modules_to_save=["lm_head", "embed_tokens", "norm"])
    edit_tensors(lora, beside(base, dtype))
    convert(good[1], tmp_path / "plain", base=base)
    assert main(["convert", str(lora), str(tmp_path / "out"), "--base", str(base)]) == 0
    notes = [n for n in capsys.readouterr().out.splitlines() if "equal the backbone's own" in n]
    assert len(notes) == 1 and "lm_head.weight" in notes[0]
    a, b = (load_file(tmp_path / n / WEIGHTS) for n in ("plain", "out"))
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    made = compose_experts({"x": lora}, tmp_path / "c", base, options=UNIFORM)
    assert any("expert x: " in n and "left out" in n for n in made.notes)


def test_a_backbone_of_more_bits_is_compared_as_the_lora_was_saved(lora, tmp_path):
    base = make_tiny_backbone(tmp_path / "base", dtype=torch.float32)
    edit_tensors(lora, beside(base, torch.bfloat16))
    convert(lora, tmp_path / "out", base=base)


def test_a_tied_head_is_the_embedding(tmp_path):
    base = make_tiny_backbone(tmp_path / "base", "Qwen2ForCausalLM")
    assert "lm_head.weight" not in load_file(base / "model.safetensors")
    lora = sources.peft_lora(base, tmp_path / "lora", target_modules=["q_proj"])[1]
    edit_tensors(lora, lambda t: beside(base)(t) | {
        "base_model.model.lm_head.weight": load_file(base / "model.safetensors")[EMBEDDING]
    })  # fmt: skip
    convert(lora, tmp_path / "out", base=base)


def one_value(name):
    def change(held):
        held[name].view(-1)[-1] += 1

    return change


@pytest.mark.parametrize(
    "change, words",
    [
        (one_value(EMBEDDING), ["model.embed_tokens.weight", "1 of its 1003 rows differ"]),
        (one_value("lm_head.weight"), ["base_model.model.lm_head.weight", "1 of its 1003 rows"]),
        (one_value("model.norm.weight"), ["model.norm.weight", "1 of its 128 rows differ"]),
        (
            lambda held: held.update({"lm_head.weight": torch.zeros(1024, 128)}),
            ["its shape is [1024, 128], the backbone's [1003, 128]"],
        ),
    ],
)
def test_modules_that_differ_are_refused_with_a_way_out(change, words, lora, base):
    edit_tensors(lora, beside(base, change=change))
    problems = refused(lora, base, *words, "save_embedding_layers=False", "merge_and_unload")
    assert len(problems) == 1


def test_modules_to_save_without_their_tensors(lora, base):
    edit(lora, modules_to_save=["lm_head", "score"])
    edit_tensors(lora, beside(base, prefix="base_model.model."))
    refused(lora, base, "`modules_to_save`", "score", "merge_and_unload")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_lora_on_head_or_embedding(target, base, tmp_path):
    lora = sources.peft_lora(base, tmp_path / "lora", target_modules=["q_proj", target])[1]
    problems = refused(lora, base, target, "output head or the embedding", "merge_and_unload")
    assert len(problems) == 1


def test_modules_beside_a_lora_on_a_backbone_of_pickles(lora, base, tmp_path):
    own = shutil.copytree(base, tmp_path / "base")
    edit_tensors(lora, beside(base))
    torch.save(load_file(own / "model.safetensors"), own / "pytorch_model.bin")
    (own / "model.safetensors").unlink()
    refused(lora, own, "must be compared", "pytorch_model.bin", "save it again so: python")


# Keys


def test_every_field_of_peft_is_classified():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    classes = (FOLLOWED, HARMLESS, set(REFUSED))
    assert fields <= set.union(*map(set, classes)), fields - set.union(*map(set, classes))
    assert sum(map(len, classes)) == len(set.union(*map(set, classes)))


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_keys_that_change_the_function_are_refused_by_name(key, lora, base):
    for value in (True, [1], {"a": 1}):
        edit(lora, **{key: value})
        assert len(refused(lora, base, f"`{key}` is ", "merge_and_unload")) == 1
    edit(lora, **{key: None})
    convert(lora, lora.with_name("fine"), base=base)


def test_keys_that_change_nothing(lora, base, tmp_path):
    edit(lora, **{key: {"x": 1} for key in HARMLESS - {"peft_version"}})
    edit(lora, exclude_modules=["k_proj"], layers_pattern="layers", bias="none")
    convert(lora, tmp_path / "out", base=base)


def test_a_key_of_a_newer_peft(lora, base, tmp_path):
    edit(lora, peft_version="0.99.0", use_wonder=True, other_new=None)
    problems = refused(lora, base, "unknown key `use_wonder`", "set to true by PEFT 0.99.0")
    assert "other_new" not in problems[0] and "merge_and_unload" in problems[0]
    edit(lora, use_wonder=False)
    convert(lora, tmp_path / "out", base=base)


@pytest.mark.parametrize("init", ["CorDA", "corda", "pissa_niter_4", "loftq", "lora_ga", "olora"])
def test_initialisations_that_change_the_backbone(init, lora, base):
    edit(lora, init_lora_weights=init)
    refused(lora, base, "`init_lora_weights`", "path_initial_model_for_weight_conversion")


@pytest.mark.parametrize("init", ["eva", "gaussian", "orthogonal", "mica", True, False])
def test_initialisations_that_do_not(init, lora, base, tmp_path):
    edit(lora, init_lora_weights=init)
    convert(lora, tmp_path / "out", base=base)


def test_a_revision_of_the_backbone_is_looked_for(lora, tmp_path, monkeypatch, base):
    cache = tmp_path / "hub" / "models--some--base"
    for name in ("a" * 40, "b" * 40):
        shutil.copytree(base, cache / "snapshots" / name)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    edit(lora, base_model_name_or_path="some/base", revision="v2")
    with pytest.raises(AdapterError, match="some/base is not on this machine"):
        convert(lora, tmp_path / "out")
    (cache / "refs" / "v2").write_text("b" * 40)
    report = convert(lora, tmp_path / "out")
    assert any("--revision v2" in note for note in report.notes)
    made = compose_experts({"x": lora}, tmp_path / "mixture", options=UNIFORM)
    assert any("--revision v2" in note for note in made.notes)


def test_a_mixture_is_no_lora(base, tmp_path):
    from vllm_adafuse.format.random_adapter import make_random_adapter

    mixture = make_random_adapter(base, tmp_path / "mixture", num_experts=2, r=2)
    with pytest.raises(AdapterError, match="it is a mixture in this format already"):
        compose_experts({"x": mixture}, tmp_path / "out", base, options=UNIFORM)
