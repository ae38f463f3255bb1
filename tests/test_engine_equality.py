"""Served greedy tokens and logprobs equal the reference's, for every family and every option."""

import pytest
from engines import assert_greedy_equals, engine, greedy, load_reference, logprobs_of, make_pair
from vllm_adafuse.tiny import real_prompts

CASES = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-k1": ("LlamaForCausalLM", {"top_k": 1}),
    "llama-dense": ("LlamaForCausalLM", {"top_k": 4}),
    "llama-ranks": ("LlamaForCausalLM", {"r": [1, 4, 3, 8], "lora_alpha": [2, 4, 6, 8]}),
    "llama-partial": (
        "LlamaForCausalLM",
        {"target_modules": ["q_proj", "v_proj", "up_proj"], "layers": [0, 2]},
    ),
    "llama-64-experts": ("LlamaForCausalLM", {"num_experts": 64, "top_k": 5, "r": 2}),
    "mistral": ("MistralForCausalLM", {"router_input": "embedding", "router_bias": True}),
    "qwen2": ("Qwen2ForCausalLM", {"router_weights": "softmax_topk"}),
    "qwen3": ("Qwen3ForCausalLM", {"use_rslora": True, "router_temperature": 0.5}),
    "gemma2": ("Gemma2ForCausalLM", {"lora_alpha": 32}),
    "gemma2-embedding": (
        "Gemma2ForCausalLM",
        {
            "router_input": "embedding",
            "router_weights": "softmax_topk",
            "router_temperature": 3.0,
            "lora_alpha": 64,
        },
    ),
    "phi3": ("Phi3ForCausalLM", {"r": [2, 4, 4, 1]}),
    "phi3-partial": ("Phi3ForCausalLM", {"target_modules": ["gate_up_proj", "o_proj"], "top_k": 1}),
}


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_the_reference(name, tmp_path):
    architecture, options = CASES[name]
    base, adapter = make_pair(tmp_path, architecture, **options)
    with engine(base, adapter) as llm:
        outputs = llm.generate(real_prompts(50), greedy(), use_tqdm=False)
    assert_greedy_equals(outputs, load_reference(base, adapter))
    # The adapter matters: the bare backbone would have said something else.
    bare = load_reference(base, adapter)
    bare.adafuse.scales[:] = [0.0] * len(bare.adafuse.scales)
    changed = 0
    for output in outputs[:10]:
        tokens = list(output.outputs[0].token_ids)
        changed += tokens != logprobs_of(bare, output.prompt_token_ids, tokens).argmax(-1).tolist()
    assert changed >= 3


# Of three layers: norms that end a projection, two a layer where o_proj and down_proj have experts;
# blocks whose queries and keys come turned, where q, k or v has.
FUSED = {
    "llama-partial": (0, 2),
    "qwen2": (6, 3),
    "gemma2": (0, 3),
    "phi3": (6, 3),
    "phi3-partial": (3, 0),
    "qwen3": (6, 0),
}


@pytest.mark.parametrize("name", FUSED)
def test_projections_fused_as_on_a_gpu(name, tmp_path, monkeypatch):
    """On a GPU a plain projection, its deltas and what follows are one or two ops: here too."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm_adafuse.serving import projections, wrap
    from vllm_adafuse.serving.wrap.linears import FusedLinearMethod

    def can_fuse(layer):
        return type(layer.quant_method) is UnquantizedLinearMethod

    monkeypatch.setattr(projections, "can_fuse", can_fuse)
    # vLLM's CPU build packs weights for a product of its own.
    monkeypatch.setattr(
        FusedLinearMethod, "process_weights_after_loading", lambda self, layer: None
    )
    architecture, options = CASES[name]
    base, adapter = make_pair(tmp_path, architecture, **options)
    # Compiled code checks sizes and strides of what ops return.
    with engine(base, adapter, enforce_eager=name != "qwen2") as llm:
        methods = llm.apply_model(
            lambda model: [type(m.quant_method).__name__ for _, m in wrap.adapted(model)]
        )[0]
        names = llm.apply_model(lambda model: [type(m).__name__ for m in model.modules()])[0]
        in_place = llm.apply_model(lambda model: [b.in_place for b in wrap.banks_of(model)])[0]
        outputs = llm.generate(real_prompts(20), greedy(), use_tqdm=False)
    assert set(methods) == {"FusedLinearMethod"}
    assert (names.count("FusedNorm"), names.count("Turned")) == FUSED[name]
    # gate_up, where down is adapted too
    assert any(in_place) is (not name.endswith("partial"))
    assert_greedy_equals(outputs, load_reference(base, adapter))


def test_beside_vllms_own_lora_nothing_is_fused(tmp_path, monkeypatch):
    """LoRA adds to the output of gate_up before the activation, so that must stay outside."""
    from vllm_adafuse.serving import projections

    monkeypatch.setattr(projections, "can_fuse", lambda layer: True)
    base, adapter = make_pair(tmp_path)
    with engine(base, adapter, enable_lora=True, max_lora_rank=8) as llm:
        outputs = llm.generate(real_prompts(5), greedy(), use_tqdm=False)
    assert_greedy_equals(outputs, load_reference(base, adapter))


def test_micro_batches_are_refused():
    from types import SimpleNamespace

    from vllm_adafuse.errors import AdapterError
    from vllm_adafuse.serving.attach import refuse_micro_batches

    config = SimpleNamespace(parallel_config=SimpleNamespace(use_ubatching=True))
    with pytest.raises(AdapterError, match="--enable-dbo or --ubatch-size"):
        refuse_micro_batches(config)
