"""Requests choose their adapter with tensor parallelism: each rank holds its share of the pages."""

import pytest
import torch
from engines import assert_greedy_equals, engine, greedy, load_reference, make_pair
from loras import PATTERNS, make_lora
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest
from vllm_adafuse.tiny import real_prompts


def test_two_tensor_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    # One key/value head: it is replicated over both ranks.
    base, mix = make_pair(tmp_path, config={"num_key_value_heads": 1}, r=[4, 20, 33, 8])
    references = [
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(),
        load_reference(base, mix),
        make_lora(base, tmp_path / "lora", 1, **PATTERNS),
    ]
    requests = [None, LoRARequest("m", 1, str(mix)), LoRARequest("l", 2, str(tmp_path / "lora"))]
    prompts = real_prompts(9)
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 128}
    with engine(base, tensor_parallel_size=2, **options) as llm:
        named = [requests[i % 3] for i in range(len(prompts))]
        outputs = llm.generate(prompts, greedy(), lora_request=named, use_tqdm=False)
        with pytest.raises(Exception, match="no such directory|could not|failed"):
            llm.llm_engine.add_lora(LoRARequest("gone", 3, str(tmp_path / "gone")))
        again = llm.generate(prompts[:3], greedy(), lora_request=named[:3], use_tqdm=False)
    for i, reference in enumerate(references):
        assert_greedy_equals(outputs[i::3] + again[i : i + 1], reference)
