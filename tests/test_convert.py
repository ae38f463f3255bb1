"""Converted adapters compute what their own library computes, or what its formula says."""

import json

import convert_sources as sources
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_adafuse.cli.main import main
from vllm_adafuse.convert.options import Options
from vllm_adafuse.convert.registry import convert
from vllm_adafuse.format.adapter import check_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.tiny import make_tiny_backbone


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("convert") / "base")


def converted(source, tmp_path, base, **options):
    """Converts; the result passes every check against the backbone."""
    out = tmp_path / "out"
    report = convert(source, out, options=Options(**options))
    assert check_adapter(out, Backbone.from_path(str(base)))[1] == []
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["x_converted_from"] == report.to_json()
    return out, config, report


def mixlora_package(source):
    """The model of pip's mixlora, without the dropout that its eval() does not reach."""
    mixlora = pytest.importorskip("mixlora")
    model, _ = mixlora.MixLoraModelForCausalLM.from_pretrained(
        str(source), attn_implementation="eager"
    )
    for module in model.modules():
        for moe in getattr(module, "mixlora_moes", {}).values():
            for lora in moe.experts_.values():
                lora.dropout_.p = 0.0
    return model.eval()


@pytest.mark.parametrize(
    "architecture, modules, act_fn",
    [
        ("LlamaForCausalLM", (*sources.ATTENTION, *sources.MLP), "silu"),
        ("Gemma2ForCausalLM", ("q_proj", "gate_proj", "down_proj"), "gelu_pytorch_tanh"),
        ("Phi3ForCausalLM", ("qkv_proj", "gate_up_proj", "down_proj"), "silu"),
    ],
)
def test_mixlora(architecture, modules, act_fn, tmp_path):
    base = make_tiny_backbone(tmp_path / "base", architecture)
    source = sources.mixlora(base, tmp_path / "source", modules, act_fn=act_fn)
    out, config, _ = converted(source, tmp_path, base)
    assert config["mix"] == "ffn_output" and config["router.scope"] == "block"
    sources.assert_same(mixlora_package(source), base, out)


def test_mixlora_with_rslora_and_three_of_five_experts(base, tmp_path):
    source = sources.mixlora(base, tmp_path / "source", experts=5, top_k=3, use_rslora=True)
    out, config, _ = converted(source, tmp_path, base)
    assert (config["num_experts"], config["top_k"], config["always_r"]) == (5, 3, 4)
    sources.assert_same(mixlora_package(source), base, out)


def test_mixlora_s_expert_lora_is_read_in_two_ways(base, tmp_path):
    source = sources.mixlora(base, tmp_path / "s", expert_lora={"lora_alpha": 20}, top_k=1)
    ignored, config, report = converted(source, tmp_path / "i", base, expert_lora="ignored")
    assert (config["lora_alpha"], config["always_alpha"]) == (8, 8)
    assert any("expert_lora was ignored" in note for note in report.notes)
    sources.assert_same(mixlora_package(source), base, ignored)  # pip's reader ignores it
    used, config, _ = converted(source, tmp_path / "u", base, expert_lora="used")
    assert (config["lora_alpha"], config["always_alpha"]) == (20, 8)
    # MoE-PEFT's reader: the same as a top-level alpha of 20 with attention's LoRA rescaled.
    same = sources.mixlora(base, tmp_path / "same", lora_alpha=20, top_k=1)
    tensors = torch.load(same / "adapter_model.bin")
    for name in tensors:
        if ".self_attn." in name and ".lora_B." in name:
            tensors[name] = tensors[name] * (8 / 20)
    torch.save(tensors, same / "adapter_model.bin")
    sources.assert_same(mixlora_package(same), base, used)


def test_mixlora_of_attention_alone_is_a_plain_lora(base, tmp_path):
    source = sources.mixlora(base, tmp_path / "source", ("q_proj", "o_proj"))
    out, config, report = converted(source, tmp_path, base)
    assert (config["format_version"], config["num_experts"]) == (1, 1)
    assert len([note for note in report.notes if "no experts" in note]) == 3
    sources.assert_same(mixlora_package(source), base, out)


@pytest.mark.parametrize("r, ks", [(4, 2), ([8, 4, 2], (1, 3, 2))], ids=["one", "by layer"])
def test_mola(r, ks, base, tmp_path):
    source = sources.mola(base, tmp_path / "source", r=r)
    out, config, report = converted(source, tmp_path, base, top_k=ks)
    assert config["num_experts"] == 4 and config["router.scope"] == "linear"
    assert any("--top-k" in note for note in report.notes)
    by_layer = ks if isinstance(ks, tuple) else (ks,) * 3
    sources.assert_same(sources.mola_model(base, source, by_layer), base, out)


def test_mola_of_moe_peft(base, tmp_path):
    source = sources.moe_peft(base, tmp_path / "s", "mola", lambda name: True, use_rslora=True)
    out, config, report = converted(source, tmp_path, base)
    assert config["top_k"] == 2 and any("default" in note for note in report.notes)
    original = sources.moe_peft_model(base, source, "mola", sources.top_k(2))
    sources.assert_same(original, base, out)


def test_loramoe_of_moe_peft(base, tmp_path):
    source = sources.moe_peft(base, tmp_path / "s", "loramoe", lambda name: ".mlp." in name)
    out, config, _ = converted(source, tmp_path, base)
    assert config["top_k"] == 4 and config["always_r"] == 4
    original = sources.moe_peft_model(base, source, "loramoe", sources.dense)
    sources.assert_same(original, base, out)


@pytest.mark.parametrize("shared_a", [True, False], ids=["hydralora", "loramoe"])
def test_routed_lora(shared_a, base, tmp_path):
    source = sources.routed_lora(base, tmp_path / "source", shared_a)
    out, config, report = converted(source, tmp_path, base)
    assert report.kind == ("HydraLoRA" if shared_a else "LoRAMoE")
    assert config["shared_A"] == shared_a and config["top_k"] == 4
    sources.assert_same(sources.routed_lora_model(base, source, shared_a), base, out)


def test_the_source_s_dtype_is_kept(base, tmp_path):
    source = sources.routed_lora(base, tmp_path / "source", False)
    config, tensors = sources.read(source)
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(half, source / "adapter_model.safetensors")
    out, _, _ = converted(source, tmp_path, base)
    written = load_file(out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    exact = {name: tensor.float() for name, tensor in half.items()}
    same = sources.write(tmp_path / "same", config, exact)
    sources.assert_same(sources.routed_lora_model(base, same, False), base, out)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {
            "rank_pattern": {"q_proj": 2, r"model\.layers\.1\.mlp\.up_proj": 7},
            "alpha_pattern": {"up_proj": 3, "layers.2.self_attn.q_proj": 5},
        },
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_peft_lora(config, base, tmp_path):
    model, source = sources.peft_lora(base, tmp_path / "source", **config)
    out, config, _ = converted(source, tmp_path, base)
    assert (config["format_version"], config["num_experts"], config["top_k"]) == (1, 1, 1)
    sources.assert_same(model, base, out)


def arrow_model(base, tmp_path, gks=0, seed=None):
    """PEFT's own Arrow over three LoRAs, two per token; not saved yet."""
    from peft import ArrowConfig, create_arrow_model

    def lora(name, seed):
        return str(sources.peft_lora(base, tmp_path / name, seed, lora_alpha=4 + seed)[1])

    tasks = [lora(f"lora-{e}", e) for e in range(3)]
    general = [lora(f"general-{g}", 10 + g) for g in range(gks)]
    config = ArrowConfig(top_k=2, router_temperature=0.7, use_gks=gks > 0, rng_seed=seed)
    model = create_arrow_model(sources.load_base(base), tasks, config, general or None)
    return model.eval()


def test_arrow_with_a_seed(base, tmp_path):
    model = arrow_model(base, tmp_path, seed=5)
    model.save_pretrained(tmp_path / "source")
    out, config, report = converted(tmp_path / "source", tmp_path, base)
    assert config["router.logits"] == "abs" and config["router.temperature"] == 0.7
    assert config["expert_names"] == ["task_0", "task_1", "task_2"]
    assert any("rng_seed 5" in note for note in report.notes)
    sources.assert_same(model, base, out)


def test_arrow_without_a_seed_takes_what_peft_s_iteration_converges_to(base, tmp_path, monkeypatch):
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    original = ArrowLoraLinearLayer.top_right_singular_vec_from_BA
    monkeypatch.setattr(
        ArrowLoraLinearLayer,
        "top_right_singular_vec_from_BA",
        lambda self, a, b: original(self, a.double(), b.double(), iters=3000),
    )
    model = arrow_model(base, tmp_path)
    model.save_pretrained(tmp_path / "source")
    out, _, report = converted(tmp_path / "source", tmp_path, base)
    assert any("vary a little" in note for note in report.notes)
    sources.assert_same(model, base, out)


@pytest.mark.parametrize("when", ["subtract", "done"])
def test_arrow_s_general_knowledge(when, base, tmp_path):
    model = arrow_model(base, tmp_path, gks=2, seed=1)
    if when == "subtract":
        model.save_pretrained(tmp_path / "source")
    with torch.no_grad():
        model(torch.arange(6, 20)[None])  # PEFT subtracts now, in place
    if when == "done":
        model.save_pretrained(tmp_path / "source")
    out, _, _ = converted(tmp_path / "source", tmp_path, base, gks=when)
    sources.assert_same(model, base, out)


def test_the_command_says_what_it_did(base, tmp_path, capsys):
    source = sources.mola(base, tmp_path / "source", base_model_name_or_path="gone/elsewhere")
    out = tmp_path / "out"
    assert main(["convert", str(source), str(out), "--base", str(base), "--top-k", "2"]) == 0
    printed = capsys.readouterr()
    assert "MoLA adapter" in printed.out and "exact: the same function" in printed.out
    assert "note: top_k is not saved" in printed.out and "check: 100%" in printed.err
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert main(["check", str(out)]) == 0
