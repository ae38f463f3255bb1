"""One expert, E = k = 1, is plain LoRA: Hugging Face PEFT on the same weights says the same."""

import json
import math

import pytest
import torch
from engines import assert_greedy_equals, engine, greedy, load_reference
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from vllm_adafuse.tiny import make_tiny_backbone, real_prompts

MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
R, ALPHA = 4, 8
PROMPTS = real_prompts(16)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("peft") / "base")


def make_peft_model(base, use_rslora: bool):
    """PEFT's model with random weights in every lora_A and lora_B."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=MODULES, use_rslora=use_rslora)
    model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                scale = weight.shape[1] ** -0.5 * (0.3 if ".lora_B." in name else 1)
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model


def convert(model, path, use_rslora: bool):
    """Writes PEFT's weights in our format, as a mixture of one expert."""
    tensors = {"router.weight": torch.randn(1, model.config.hidden_size)}
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            name = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            tensors[name] = weight.detach()[None].contiguous()
    assert len(tensors) == 1 + 2 * len(MODULES) * model.config.num_hidden_layers
    config = {
        "peft_type": "ADAFUSE",
        "format_version": 1,
        "base_model_name_or_path": "../base",
        "num_experts": 1,
        "top_k": 1,
        "r": R,
        "lora_alpha": ALPHA,
        "use_rslora": use_rslora,
        "target_modules": MODULES,
    }
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["lora", "rslora"])
def pair(request, base):
    model = make_peft_model(base, request.param)
    name = "rslora" if request.param else "lora"
    return model, convert(model, base.with_name(name), request.param)


def test_the_scale_is_peft_s(pair, base):
    model, adapter = pair
    (scale,) = load_reference(base, adapter).adafuse.scales
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert scale == layer.scaling["default"]
    rslora = model.peft_config["default"].use_rslora
    assert scale == (ALPHA / math.sqrt(R) if rslora else ALPHA / R)


@torch.no_grad()
def test_reference_logits_equal_peft_s(pair, base):
    model, adapter = pair
    reference = load_reference(base, adapter)
    ids = torch.randint(6, model.config.vocab_size, (4, 60), generator=torch.Generator())
    expected, found = model(ids).logits, reference(ids).logits
    assert (reference.adafuse.gates == 1).all()
    size = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-5 * size
    with model.disable_adapter():
        assert (model(ids).logits - expected).abs().max() > 0.1 * size  # LoRA matters


# One engine; served rsLoRA is compared in test_engine_equality.
@pytest.mark.parametrize("pair", [False], indirect=True, ids=["lora"])
def test_served_tokens_equal_peft_s(pair, base):
    model, adapter = pair
    with engine(base, adapter) as llm:
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    assert len(outputs) == len(PROMPTS)
    assert_greedy_equals(outputs, model)
    with model.disable_adapter(), pytest.raises(AssertionError):
        assert_greedy_equals(outputs, model)
