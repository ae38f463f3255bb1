"""Requests choose their adapter with tensor parallelism: each rank holds its share of the pages, and
of what is vLLM's beside them; rows of logits are as many as drafts say."""

import pytest
import torch
from engines import assert_greedy_equals, engine, greedy, load_reference, make_pair
from loras import MODULES, PATTERNS, make_lora
from test_engine_company import counter
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.tiny import real_prompts

KINDS = "accepted", "draft"
PAST = {"router_context": "mean", "router_context_scale": 4.0, "top_k": 2, "num_experts": 3}
DRAFTS = {
    "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1,
}  # fmt: skip


def test_two_tensor_ranks(tmp_path, monkeypatch):
    def look(worker):  # at what a rank has summed up of requests, and at its last routes
        step = worker.get_model().adafuse_step
        behind = slice(step.vocab_size, None)
        return step.sums, step.table_ids[:, behind], step.table_weights[:, behind]

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    # One key/value head: it is replicated over both ranks.
    base, mix = make_pair(tmp_path, config={"num_key_value_heads": 1}, r=[4, 20, 33, 8])
    references = [
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(),
        load_reference(base, mix),
        make_lora(base, tmp_path / "lora", 1, **PATTERNS),
    ]
    past = make_random_adapter(base, tmp_path / "past", r=4, dtype=torch.float32, **PAST)
    references.append(load_reference(base, past))
    requests = [None, LoRARequest("m", 1, str(mix)), LoRARequest("l", 2, str(tmp_path / "lora"))]
    requests.append(LoRARequest("past", 4, str(past)))
    modules = [*MODULES, "embed_tokens", "lm_head"]
    references.append(make_lora(base, tmp_path / "rest", 2, r=8, target_modules=modules))
    requests.append(LoRARequest("rest", 5, str(tmp_path / "rest")))
    prompts = [f"{prompt} {prompt}" for prompt in real_prompts(10)]
    options = {"enable_lora": True, "max_loras": 4, "max_lora_rank": 128}
    options |= {"additional_config": {"adafuse": {"lora": "both"}}}
    options |= {"speculative_config": DRAFTS, "disable_log_stats": False}
    with engine(base, tensor_parallel_size=2, **options) as llm:
        named = [requests[i % 5] for i in range(len(prompts))]
        outputs = llm.generate(prompts, greedy(30), lora_request=named, use_tqdm=False)
        with pytest.raises(Exception, match="no such directory|could not|failed"):
            llm.llm_engine.add_lora(LoRARequest("gone", 3, str(tmp_path / "gone")))
        again = llm.generate(prompts[:5], greedy(30), lora_request=named[:5], use_tqdm=False)
        accepted, drafts = (counter(llm, f"vllm:spec_decode_num_{k}_tokens") for k in KINDS)
        one, other = llm.collective_rpc(look)
    assert 0 < accepted < drafts
    assert one[0].any() and all(torch.equal(*both) for both in zip(one, other))
    for i, reference in enumerate(references):
        assert_greedy_equals(outputs[i::5] + again[i : i + 1], reference)
