"""`check` warns of adapters whose values are finite and whose answers are not."""

import shutil
from pathlib import Path

import pytest
import torch
from broken_adapters import edit_config, edit_tensors
from vllm_adafuse.cli.main import main
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.overflow import overflow_warnings
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.offline import reference
from vllm_adafuse.tiny import make_tiny_backbone

Q = "model.layers.1.self_attn.q_proj"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("overflow") / "base", "LlamaForCausalLM")


@pytest.fixture
def adapter(request, base, tmp_path):
    return make(base, tmp_path / "adapter", getattr(request, "param", {}))


def make(base, path, options):
    return make_random_adapter(
        base, path, num_experts=3, **{"r": [2, 4, 4]} | options, router_bias=True, dtype=F32
    )


def times(name: str, factor: float):
    return edit_tensors(lambda t: t[name].mul_(factor))


def plus(name: str, summand: float):
    return edit_tensors(lambda t: t[name].add_(summand))


def both(*damages):
    return lambda path: [damage(path) for damage in damages] and None


def size(name: str, value: float):
    """All values of a tensor of one size, with their own signs; zeros past a rank stay."""
    return edit_tensors(lambda t: t[name].sign_().mul_(value))


OVERFLOWING = {
    "alpha": (
        both(edit_config(lora_alpha=3e38), times(f"{Q}.lora_A", 8)),
        F32,
        ("scale of 1.5e+38", "infinite in float32"),
    ),
    "alpha, float16": (edit_config(lora_alpha=1e7), F16, ("scale of 5e+06", "infinite in float16")),
    "temperature": (
        both(edit_config(router__temperature=1.3e-38), times("router.weight", 8)),
        F32,
        ("`router.temperature` is 1.3e-38",),
    ),
    "router": (size("router.weight", 1e38), F32, ("router.weight", "infinite in float32")),
    "bias": (
        both(plus("router.bias", 3e38), edit_config(router__temperature=0.1)),
        F32,
        ("`router.temperature` is 0.1", "3.0e+38"),
    ),
    "A": (size(f"{Q}.lora_A", 1e38), F32, (f"{Q}.lora_A", "expert")),
    "A, float16": (times(f"{Q}.lora_A", 1e6), F16, (f"{Q}.lora_A: holds values", "float16")),
    "B": (size(f"{Q}.lora_B", 2e38), F32, (f"{Q}.lora_A: with lora_B", "expert")),
    "B, float16": (times(f"{Q}.lora_B", 1e7), F16, (f"{Q}.lora_B: holds values", "float16")),
    "A and B": (
        both(times(f"{Q}.lora_A", 1e20), times(f"{Q}.lora_B", 1e20)), F32, ("with lora_B",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage, dtype, words", OVERFLOWING.values(), ids=OVERFLOWING)
def test_warns_where_answers_are_nan(adapter, base, damage, dtype, words):
    damage(adapter)
    said = overflow_warnings(load_adapter(adapter), dtype)
    assert said and all(len(line) < 500 for line in said)
    text = "\n".join(said)
    assert all(word in text for word in words), text
    model = reference.load(base, adapter, dtype=dtype)
    with torch.no_grad():
        assert model(torch.arange(6, 60)[None]).logits.isnan().any(-1).all()


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"use_rslora": True, "lora_alpha": 512},
        {"router_temperature": 0.01},
        {"routing": "layer_wise", "always_r": 2, "always_alpha": 4.0},
    ],
    indirect=True,
)
def test_says_nothing_of_usual_adapters(adapter):
    assert overflow_warnings(load_adapter(adapter), F16) == []


@pytest.mark.parametrize(
    "adapter, damage, word",
    [
        ({"routing": "layer_wise"}, size(f"{Q}.router.weight", 1e38), f"{Q}.router.weight"),
        (
            {"routing": "layer_wise", "always_r": 2, "always_alpha": 4.0},
            size(f"{Q}.always_B", 3e38),
            f"{Q}.always_A",
        ),
        (
            {"routing": "layer_wise", "shared_A": True, "r": 4},
            size(f"{Q}.lora_A", 1e38),
            f"{Q}.lora_A",
        ),
    ],
    indirect=["adapter"],
)
def test_layer_wise(adapter, damage, word):
    damage(adapter)
    (said,) = overflow_warnings(load_adapter(adapter), F32)
    assert word in said


def test_an_expert_that_is_in_order_is_not_blamed(adapter):
    edit_tensors(lambda t: t[f"{Q}.lora_B"][1].sign_().mul_(3e38))(adapter)
    (said,) = overflow_warnings(load_adapter(adapter), F32)
    assert "expert 1 adds" in said


def test_check_warns_and_accepts(adapter, base, capsys, tmp_path):
    half = Path(shutil.copytree(base, tmp_path / "half"))
    text = (half / "config.json").read_text()
    (half / "config.json").write_text(text.replace('"float32"', '"float16"'))
    assert "float16" in (half / "config.json").read_text()
    edit_config(lora_alpha=1e7)(adapter)
    assert main(["check", str(adapter), "--base", str(base)]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["check", str(adapter), "--base", str(half)]) == 0
    out = capsys.readouterr().out
    assert "warning: adapter_model.safetensors" in out and "ok:" in out
