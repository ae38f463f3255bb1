"""256 LoRAs in one mixture: composed, loaded, served pinned and chosen per request, beside the
reference. They run where they are asked for:

    MANY_EXPERTS=1 pytest tests/test_many_experts.py
"""

import json
import os

import pytest
import torch
from engines import assert_greedy_equals, engine, greedy, load_reference
from safetensors.torch import save_file
from test_engine_context import prompts
from vllm.lora.request import LoRARequest
from vllm_adafuse.experts.compose import RouterOptions, compose_experts
from vllm_adafuse.experts.context import ContextOptions
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.serving.adapters import open_adapter
from vllm_adafuse.serving.pool import Size
from vllm_adafuse.tiny import make_tiny_backbone, real_texts

pytestmark = pytest.mark.skipif(not os.environ.get("MANY_EXPERTS"), reason="MANY_EXPERTS is not set")

MANY = 256
TARGETS = (["q_proj", "v_proj"], ["up_proj", "down_proj"], ["k_proj", "o_proj", "gate_proj"])
PAST = {"router_context": "mean", "router_context_scale": 4.0, "r": 4}
KINDS = {
    "even": {"top_k": 2, **PAST},
    "token": {"top_k": 2, "r": 8},
    "all": {"top_k": MANY, "router_weights": "softmax_topk", **PAST},
}


def write_lora(backbone, path, seed):
    """A PEFT LoRA of a rank from 1 to 20, on some of the linears."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    rank, targets = 1 + seed % 20, TARGETS[seed % len(TARGETS)]
    for name, (size_in, size_out) in backbone.linears.items():
        if name.rpartition(".")[2] in targets:
            for side, shape in (("A", (rank, size_in)), ("B", (size_out, rank))):
                value = torch.randn(shape, generator=draw) * shape[1] ** -0.5
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = value
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "bias": "none"}
    config |= {"target_modules": targets, "base_model_name_or_path": str(backbone.path)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Backbone; name -> adapter, of which "composed" has ranks and targets of all kinds."""
    root = tmp_path_factory.mktemp("many")
    base = make_tiny_backbone(root / "base")
    backbone, text = Backbone.from_path(str(base)), root / "text.txt"
    text.write_text("\n".join(t for t, _ in zip(real_texts(), range(40))))
    loras = {f"lora-{i}": write_lora(backbone, root / f"lora-{i}", i) for i in range(MANY)}
    past = ContextOptions((text,), steps=2, length=64, batch_size=2, dtype="float32")
    adapters = {
        "composed": compose_experts(
            loras, root / "composed", base, options=RouterOptions(context=past)
        ).path
    }  # fmt: skip
    for name, options in KINDS.items():
        adapters[name] = make_random_adapter(
            base, root / name, num_experts=MANY, dtype=torch.float32, **options
        )
    return base, adapters


def check(llm, reference, named=None):
    texts = prompts(3, 70, 1, 40, seed=8)
    outputs = llm.generate(texts, greedy(10), lora_request=named, use_tqdm=False)
    assert_greedy_equals(outputs, reference)


@pytest.mark.parametrize("name", ["composed", "all"])
def test_pinned(made, name):
    base, adapters = made
    with engine(base, adapters[name], max_num_batched_tokens=64) as llm:
        check(llm, load_reference(base, adapters[name]))


def test_chosen_by_requests(made):
    base, adapters = made
    options = {"enable_lora": True, "max_loras": 64, "max_lora_rank": 128, "max_num_batched_tokens": 64}
    opened = open_adapter(adapters["composed"])
    assert len(set(load_adapter(adapters["composed"]).config.ranks)) == 20
    assert opened.size == Size(MANY + sum(rank > 16 for rank in opened.ranks), MANY)
    with engine(base, **options) as llm:
        for i, (name, path) in enumerate(adapters.items(), 1):
            check(llm, load_reference(base, path), LoRARequest(name, i, str(path)))
