"""PEFT LoRAs with random weights, and what serves requests that choose their adapters."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from engines import assert_greedy_equals, greedy
from vllm.lora.request import LoRARequest
from vllm_adafuse.tiny import real_prompts

MODULES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
# Nothing in common: ranks that are no whole pages, patterns, rsLoRA, few modules.
PATTERNS = {
    "r": 40,
    "lora_alpha": 20,
    "use_rslora": True,
    "target_modules": MODULES,
    "rank_pattern": {"layers.1.self_attn.q_proj": 12, "up_proj": 3},
    "alpha_pattern": {"down_proj": 5},
}
FEW = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def make_lora(base: Path, path: Path, seed: int, **config):
    """Saves a PEFT LoRA under `path`; returns PEFT's model of base and LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**config)).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                scale = weight.shape[1] ** -0.5 * (0.3 if ".lora_B." in name else 1)
                weight.copy_(torch.randn(weight.shape, generator=draw) * scale)
    model.save_pretrained(path)
    return model


def manager_of(llm):
    """The adapters' manager of an engine in this process."""
    return llm.collective_rpc(lambda worker: worker.model_runner.lora_manager)[0]


def ask(versions, name, user_id, path, **options):
    """What `process_inputs` does with a request."""
    request = LoRARequest(name, user_id, path, **options)
    before = repr(request)
    stamped = versions.adopt(request, versions.stamp(request))
    assert repr(request) == before, "the user's request was changed"
    assert not stamped.load_inplace and stamped.lora_name == name
    return stamped


def engine_config(model_config, pipelined=False, **options):
    """What adapters' checks see of an engine's config."""
    defaults = {"revision": None, "enable_prompt_embeds": False}
    for name, value in defaults.items():
        if not hasattr(model_config, name):
            setattr(model_config, name, value)
    return SimpleNamespace(
        model_config=model_config,
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1 + pipelined, prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
        ),  # fmt: skip
        load_config=SimpleNamespace(load_format="auto"),
        lora_config=SimpleNamespace(max_loras=4, max_lora_rank=128),
        additional_config={"adafuse": options} if options else {},
    )


def add_to(manager, request) -> None:
    """Asks a worker's manager for an adapter until it is there."""
    while not manager.add_adapter(request):
        time.sleep(0.001)


PROMPTS = real_prompts(20)
# Mixtures and LoRAs of one engine.
MIXTURES = {
    "mix": {"num_experts": 4, "top_k": 2, "r": [4, 20, 33, 8], "lora_alpha": [8, 20, 33, 8]},
    "mix8": {
        "num_experts": 8, "top_k": 3, "r": 4, "seed": 5, "router_input": "embedding",
        "router_bias": True, "use_rslora": True, "target_modules": ["o_proj", "up_proj"],
    },
}  # fmt: skip
PAST = {"past": {"num_experts": 3, "r": [4, 20, 8], "router_context": "mean", "router_context_scale": 4.0}}
LORAS = {
    "few": FEW,
    "patterns": PATTERNS,
    "third": {"r": 16, "lora_alpha": 32, "target_modules": MODULES},
    "fourth": {"r": 17, "lora_alpha": 17, "target_modules": MODULES[3:]},
}


@dataclass
class Served:
    llm: object
    root: object
    references: dict
    names: list
    fused: bool

    def request(self, name, **options):
        if name == "base":
            return None
        return LoRARequest(name, 1 + self.names.index(name), str(self.root / name), **options)

    def generate(self, names, prompts=PROMPTS, **options):
        """One batch; prompts and names in turns."""
        requests = [self.request(names[i % len(names)]) for i in range(len(prompts))]
        return self.llm.generate(prompts, greedy(**options), lora_request=requests, use_tqdm=False)

    def check(self, names, outputs):
        for i, name in enumerate(names):
            assert_greedy_equals(outputs[i :: len(names)], self.references[name])


def fuse_as_on_a_gpu(patch):
    """On a GPU a plain projection and its pages are one op: here too."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm_adafuse.serving import projections

    def can_fuse(layer):
        return type(layer.quant_method) is UnquantizedLinearMethod

    patch.setattr(projections, "can_fuse", can_fuse)
    # vLLM's CPU build packs weights for a product of its own.
    patch.setattr(
        UnquantizedLinearMethod, "process_weights_after_loading", lambda self, layer: None
    )
