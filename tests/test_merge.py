"""A merged checkpoint says what the reference says with a router that always chooses these."""

import json
import math
import shutil

import pytest
import torch
from cli_fixtures import adapter, base, edit_config, run  # noqa: F401 (fixtures)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_adafuse.format.merge import merge
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.offline import reference
from vllm_adafuse.tiny import make_tiny_backbone, real_prompts

FAMILIES = ("LlamaForCausalLM", "Gemma2ForCausalLM", "Phi3ForCausalLM")


def forced(adapter, chosen: dict[int, float], experts: int):  # noqa: F811
    """Makes the router give these experts these weights, which sum to 1, to every token."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["router.weight"] = torch.zeros_like(tensors["router.weight"])
    logits = [math.log(chosen[e]) if e in chosen else -99.0 for e in range(experts)]
    tensors["router.bias"] = torch.tensor(logits)
    save_file(tensors, file)
    edit_config(adapter, top_k=len(chosen))
    return adapter


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto", attn_implementation="eager")


def logits(model, text: str, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(tokenizer(text, return_tensors="pt").input_ids).logits


@pytest.mark.parametrize("architecture", FAMILIES)
def test_logits_equal_the_reference_with_a_forced_router(architecture, tmp_path):
    base = make_tiny_backbone(tmp_path / "base", architecture)  # noqa: F811
    adapter = make_random_adapter(  # noqa: F811
        base, tmp_path / "adapter", num_experts=4, r=[4, 2, 8, 3], use_rslora=True,
        expert_names=["prose", "code", "2", "maths"], dtype=torch.float32, layers=[0, 2],
    )  # fmt: skip
    forced(adapter, {1: 0.7, 3: 0.3}, 4)
    out = merge(adapter, base, tmp_path / "out", ["code", "3"], [0.7, 0.3])
    tokenizer = AutoTokenizer.from_pretrained(out)
    truth, merged, bare = reference.load(base, adapter), load(out), load(base)
    for text in real_prompts(3):
        want = logits(truth, text, tokenizer)
        assert (logits(merged, text, tokenizer) - want).norm() <= 1e-5 * want.norm()
        assert (logits(bare, text, tokenizer) - want).norm() > 0.1 * want.norm()


def test_shards_are_kept_with_index_dtype_and_all_other_tensors(tmp_path):
    base = make_tiny_backbone(tmp_path / "one", "Qwen2ForCausalLM")  # noqa: F811 (tied)
    model = load(base).to(torch.bfloat16)
    shards = shutil.copytree(base, tmp_path / "base")
    (shards / "model.safetensors").unlink()
    model.save_pretrained(shards, max_shard_size="300KB")
    (shards / "pytorch_model.bin").write_bytes(b"a pickle, which would be the bare backbone")
    adapter = make_random_adapter(base, tmp_path / "a", num_experts=1, top_k=1)  # noqa: F811
    out = merge(adapter, shards, tmp_path / "out", ["0"])
    files = sorted(f.name for f in shards.glob("*.safetensors"))
    assert len(files) > 3 and sorted(f.name for f in out.iterdir()) == sorted(
        f.name for f in shards.iterdir() if f.suffix != ".bin"
    )
    index = "model.safetensors.index.json"
    assert (out / index).read_text() == (shards / index).read_text()
    linears = {name.removesuffix(".lora_A") for name in load_file(_weights(adapter))}
    tensors = load_file(_weights(adapter))
    for name in files:
        old, new = load_file(shards / name), load_file(out / name)
        assert list(old) == list(new)
        for key, w in old.items():
            assert new[key].dtype == torch.bfloat16
            linear = key.removesuffix(".weight")
            if linear not in linears or not key.endswith(".weight"):
                assert torch.equal(new[key], w)
                continue
            a, b = (tensors[f"{linear}.lora_{side}"][0].double() for side in "AB")
            truth = w.double() + 2.0 * (b @ a)
            once = (truth.bfloat16().double() - truth).norm()
            assert (new[key].double() - truth).norm() <= 1.001 * once
    assert "lm_head.weight" not in {key for name in files for key in load_file(out / name)}
    assert load(out).config.tie_word_embeddings


def _weights(path):
    return path / "adapter_model.safetensors"


def test_equal_shares_are_the_default_and_a_composed_base_becomes_a_plain_one(
    base, adapter, tmp_path, capsys  # noqa: F811
):
    assert run(capsys, "compose", base, adapter, tmp_path / "composed")[0] == 0
    merged = []
    for name, source, weights in (("a", base, []), ("b", tmp_path / "composed", ["0.5,0.5"])):
        options = ["--weights", *weights] if weights else []
        code, out, err = run(
            capsys, "merge", adapter, "--base", source, "--experts", "prose,1", *options,
            tmp_path / name,
        )  # fmt: skip
        assert code == 0 and "merged 0.5 prose + 0.5 code into" in out and "merge:" in err
        merged.append(load_file(tmp_path / name / "model.safetensors"))
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["architectures"] == ["LlamaForCausalLM"] and "adafuse" not in config
    torch.testing.assert_close(*merged)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--experts", "poetry"], 'it has no expert "poetry", expected one of "prose", "code"'),
        (["--experts", "4"], "a number from 0 to 3"),
        (["--experts", "prose,0"], "one is named twice"),
        (["--experts", "prose", "--weights", "0.5,0.5"], "2 weights for 1 experts"),
        (["--experts", "prose", "--weights", "nan"], "expected finite numbers"),
    ],
)
def test_bad_choices_are_refused(base, adapter, tmp_path, capsys, options, message):  # noqa: F811
    code, out, err = run(capsys, "merge", adapter, *options, tmp_path / "out")
    assert code == 1 and out == "" and message in err
    assert not (tmp_path / "out").exists()


def test_bad_backbones_and_adapters_are_refused(base, adapter, tmp_path, capsys):  # noqa: F811
    layers = make_random_adapter(base, tmp_path / "layers", num_experts=2, routing="layer_wise")
    code, _, err = run(capsys, "merge", layers, "--experts", "0", tmp_path / "out")
    assert code == 1 and "`routing` is layer_wise" in err

    def fails(path, message):
        code, _, err = run(
            capsys, "merge", adapter, "--base", path, "--experts", "0", tmp_path / "out"
        )
        assert code == 1 and message in err and not (tmp_path / "out").exists()

    broken = shutil.copytree(base, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "awq"}}
    (broken / "config.json").write_text(json.dumps(quantised))
    fails(broken, 'its weights are quantised ("awq")')
    (broken / "config.json").write_text(json.dumps(config))
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    kept = tensors[name]
    tensors[name] = kept.to(torch.float8_e4m3fn)
    save_file(tensors, broken / "model.safetensors")
    fails(broken, f"tensor {name} is F8_E4M3")
    del tensors[name]
    save_file(tensors, broken / "model.safetensors")
    fails(broken, f"tensor {name} is in none of its files")
    (broken / "model.safetensors").unlink()
    fails(broken, "model.safetensors is not in it, expected its weights as safetensors")
