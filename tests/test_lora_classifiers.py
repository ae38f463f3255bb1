"""Classifiers of whole prompts, whose requests choose an adapter: its linears lie on pages, its head,
whole or a LoRA on the backbone's, is vLLM's own beside them. All equal PEFT."""

import json
import shutil

import pytest
import torch
from engines import engine
from loras import manager_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from vllm.lora import layers
from vllm.lora.request import LoRARequest
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.serving import rest
from vllm_adafuse.serving.adapters import open_adapter
from vllm_adafuse.serving.plain_loras import BOTH_LORA, VLLM_LORA
from vllm_adafuse.tiny import make_tiny_backbone, real_prompts

pytestmark = pytest.mark.skipif(
    not hasattr(layers, "ClassificationHeadWithLoRA"), reason="this vLLM's LoRA replaces no head"
)
PROMPTS = real_prompts(10, words=12)
LORAS = {
    "whole": {"task_type": "SEQ_CLS", "target_modules": ["q_proj", "v_proj"]},
    "linears": {"target_modules": ["o_proj"]},
    "pair": {"target_modules": ["up_proj", "score"]},
    "more": {"task_type": "SEQ_CLS", "target_modules": ["k_proj", "down_proj"]},
}
NAMES = ["base", *LORAS]


@torch.no_grad()
def make_adapter(base, path, seed, labels, config):
    """Saves a PEFT LoRA for a classifier; returns PEFT's model."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32)
    if labels != 3:
        model.score = torch.nn.Linear(model.config.hidden_size, labels, bias=False)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, **config)).eval()
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".lora_" in name or "modules_to_save" in name:
            weight.copy_(torch.randn(weight.shape, generator=draw) * 0.1)
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("classifiers")
    language = make_tiny_backbone(root / "language", "Qwen3ForCausalLM", num_hidden_layers=2)
    model = AutoModelForSequenceClassification.from_pretrained(language, num_labels=3)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    model.save_pretrained(root / "base")
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.save_pretrained(root / "base")
    references = {"base": model.eval()}
    for seed, (name, config) in enumerate(LORAS.items()):
        labels = 5 if name == "more" else 3
        references[name] = make_adapter(root / "base", root / name, seed, labels, config)
    options = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 16, "max_lora_cls_labels": 5}
    options["additional_config"] = {"adafuse": {"lora": "both"}}
    with engine(root / "base", runner="pooling", **options) as llm:
        yield llm, root, references, tokenizer


@torch.no_grad()
def check(served, *names, prompts=PROMPTS):
    """One batch; prompts and names in turns."""
    llm, root, references, tokenizer = served
    every = [None, *(LoRARequest(n, i + 1, str(root / n)) for i, n in enumerate(LORAS))]
    chosen = [names[i % len(names)] for i in range(len(prompts))]
    requests = [every[NAMES.index(name)] for name in chosen]
    found = [o.outputs.probs for o in llm.classify(prompts, lora_request=requests, use_tqdm=False)]
    for prompt, name, probs in zip(prompts, chosen, found, strict=True):
        logits = references[name](input_ids=torch.tensor([tokenizer(prompt).input_ids])).logits[0]
        assert len(probs) == len(logits), name
        assert (torch.tensor(probs) - torch.softmax(logits, -1)).abs().max() < 1e-4, name
    return found


def test_one_batch(served):
    check(served, *NAMES)
    said = [check(served, name, prompts=PROMPTS[:1])[0] for name in NAMES]
    assert len({tuple(probs) for probs in said}) == len(NAMES)  # every adapter matters


def test_steps_without_such_adapters_leave_vllms_part_alone(served, monkeypatch):
    check(served, "whole", "pair", prompts=PROMPTS[:2])
    check(served, "base", "linears", prompts=PROMPTS[:2])
    monkeypatch.setattr(rest._Modules, "map", None)
    monkeypatch.setattr(layers.ClassificationHeadWithLoRA, "forward", None)
    check(served, "base", "linears")
    check(served, "base")


def test_heads_come_and_go_with_their_adapters(served):
    engine_ = served[0].llm_engine
    whole = 1 + list(LORAS).index("whole")
    check(served, "whole", "base", prompts=PROMPTS[:2])
    assert manager_of(served[0]).hosted[whole].size.rests == 1
    assert engine_.remove_lora(whole)
    assert whole not in manager_of(served[0]).rest._modules.lora_index_to_id
    check(served, "more", "whole", "linears", prompts=PROMPTS[:6])


def test_a_head_has_no_pages(served):
    """Its rows are of requests, which pages know nothing of."""
    assert all(name.startswith("model.layers.") for name in manager_of(served[0]).loader.sizes)


REFUSED = {
    "inputs": (lambda w: w[:, 1:], ["score: has 127 inputs, the backbone's has 128"]),
    "labels": (lambda w: w.repeat(2, 1), ["score: has 6 labels", "for 5", "--max-lora-cls-labels 6"]),
    "NaN": (lambda w: w * torch.nan, ["score.weight", "NaN or Inf"]),
    "flat": (lambda w: w[0], ["score.weight", "shape [128], expected [labels, in]"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(served, case, tmp_path):
    shutil.copytree(served[1] / "whole", tmp_path / "bad")
    file = tmp_path / "bad" / "adapter_model.safetensors"
    change, expected = REFUSED[case]
    tensors = load_file(file)
    tensors["base_model.model.score.weight"] = change(tensors["base_model.model.score.weight"]).contiguous()
    save_file(tensors, file)
    with pytest.raises(AdapterError) as refused:
        served[0].llm_engine.add_lora(LoRARequest("bad", 99, str(tmp_path / "bad")))
    assert all(part in str(refused.value) for part in expected), str(refused.value)


def test_another_whole_module_is_refused(served, tmp_path):
    shutil.copytree(served[1] / "whole", tmp_path / "bad")
    config = json.loads((tmp_path / "bad" / "adapter_config.json").read_text())
    file = tmp_path / "bad" / "adapter_model.safetensors"
    for named in (["classifier", "score", "norm"], ["norm"], ["classifier", "score"]):
        config["modules_to_save"] = named
        (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(config))
        if "norm" not in named:  # nor is a head there that is named
            save_file({k: t for k, t in load_file(file).items() if "score" not in k}, file)
        with pytest.raises(AdapterError, match="`modules_to_save` is"):
            open_adapter(tmp_path / "bad", rest=True)


def test_a_head_that_is_not_vllms_is_refused(served, monkeypatch):
    here = manager_of(served[0]).rest
    monkeypatch.setattr(here._modules, "heads", {})
    [problem] = here.unfit_heads({"score": (128, 3)})
    assert "replaces score (`modules_to_save`)" in problem and "merge_and_unload" in problem


def test_the_option_is_named(served):
    with pytest.raises(AdapterError, match="replaces a classifier's head") as refused:
        open_adapter(served[1] / "whole")
    assert BOTH_LORA in str(refused.value) and VLLM_LORA in str(refused.value)
