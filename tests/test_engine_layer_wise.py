"""Layer-wise adapters served by vLLM equal the reference: tokens and logprobs, in every mode."""

import pytest
from engines import (
    assert_greedy_equals,
    assert_same_completions,
    engine,
    greedy,
    load_reference,
    logprobs_of,
    make_pair,
)
from vllm_adafuse.tiny import real_prompts

PROMPTS = real_prompts(14, words=30)
LLAMA = {"num_key_value_heads": 1}  # replicated over tensor-parallel ranks
CHUNKED = {"max_num_batched_tokens": 16, "max_num_seqs": 8, "enable_prefix_caching": False}
TRACED = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
MIXLORA = {"router_scope": "block", "mix": "ffn_output"}
# architecture, its config, the adapter, the engine
CASES = {
    "linear, compiled, in chunks": (
        "LlamaForCausalLM",
        {},
        {"top_k": [1, 2, 3], "layer_experts": [3, 4, 4], "router_bias": True, "r": [1, 4, 3, 4]},
        {"enforce_eager": False, **CHUNKED},
    ),
    "MixLoRA, always on": (
        "Gemma2ForCausalLM",
        {},
        {
            **MIXLORA,
            "top_k": {"self_attn": 1, "mlp": 3},
            "always_r": 2,
            "always_alpha": 8,
            "lora_alpha": 32,
        },
        {},
    ),
    "linear on two tensor ranks": (
        "LlamaForCausalLM", LLAMA, {"use_rslora": True}, {"tensor_parallel_size": 2}
    ),
    "MixLoRA on two tensor ranks": (
        "Phi3ForCausalLM",
        {},
        {**MIXLORA, "expert_modules": ["gate_up_proj", "down_proj"], "always_r": 2}
        | {"always_alpha": 4, "always_modules": ["qkv_proj"]},
        {"tensor_parallel_size": 2},
    ),
    "blocks on two pipeline stages": (
        "LlamaForCausalLM",
        {},
        {"router_scope": "block", "top_k": 4, "target_modules": ["o_proj", "down_proj", "q_proj"]},
        {"pipeline_parallel_size": 2, **TRACED},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, tmp_path, monkeypatch):
    architecture, config, adapter, options = CASES[name]
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    several = "tensor_parallel_size" in options or "pipeline_parallel_size" in options
    if several:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    pair = make_pair(tmp_path, architecture, config, routing="layer_wise", **adapter)
    with engine(*pair, **options) as llm:
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
        alone = [] if several else [
            llm.generate([prompt], greedy(), use_tqdm=False)[0] for prompt in PROMPTS[:3]
        ]  # fmt: skip
    assert_same_completions(alone, outputs[: len(alone)])
    model = load_reference(*pair)
    assert_greedy_equals(outputs, model)
    gates = model.adafuse.gates
    assert any(len({tuple(g.nonzero()[:, 0].tolist()) for g in router[0]}) > 1
               for router in gates.values()) or adapter.get("top_k") == 4  # fmt: skip
    # The adapter matters: the bare backbone would have said something else.
    model.adafuse.scales[:] = [0.0] * 4
    model.adafuse.always_scale = 0.0
    changed = 0
    for output in outputs[:10]:
        tokens = list(output.outputs[0].token_ids)
        changed += tokens != logprobs_of(model, output.prompt_token_ids, tokens).argmax(-1).tolist()
    assert changed >= 3


def test_projections_joined_as_on_a_gpu(tmp_path, monkeypatch):
    """On a GPU W, A and the routers are one tensor, and the activation is part of the op."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm_adafuse.serving import projections, wrap
    from vllm_adafuse.serving.wrap.linears import FusedLinearMethod

    monkeypatch.setattr(
        projections, "can_fuse", lambda layer: type(layer.quant_method) is UnquantizedLinearMethod
    )
    # vLLM's CPU build packs weights for a product of its own.
    monkeypatch.setattr(
        FusedLinearMethod, "process_weights_after_loading", lambda self, layer: None
    )
    options = {"always_r": 6, "always_alpha": 6}
    options |= {"always_modules": ["k_proj", "o_proj", "gate_proj"]}
    options |= {"expert_modules": ["q_proj", "k_proj", "up_proj", "down_proj"], "shared_A": True}
    options |= {"router_logits": "abs", "router_weights": "softmax_topk"}
    pair = make_pair(tmp_path, "Qwen2ForCausalLM", routing="layer_wise", **options)
    with engine(*pair) as llm:
        methods = llm.apply_model(
            lambda model: [type(m.quant_method).__name__ for _, m in wrap.adapted(model)]
        )[0]
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    assert methods == ["FusedLinearMethod"] * 12
    assert_greedy_equals(outputs, load_reference(*pair))


def test_beside_vllms_own_lora_whole_mlps_are_not_mixed(monkeypatch):
    from types import SimpleNamespace

    from vllm_adafuse.errors import AdapterError
    from vllm_adafuse.serving import layer_wise, projections

    place = SimpleNamespace(whole_ffn=True)
    monkeypatch.setattr(projections, "places", lambda *arguments: iter([place]))
    adapter = SimpleNamespace(path="mixlora")
    with pytest.raises(AdapterError, match="--enable-lora.*`mix` is ffn_output .mixlora."):
        layer_wise.wrap_layers(None, adapter, {}, 1, None, alone=False)
