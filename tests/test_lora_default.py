"""A mixture that is everybody's default beside adapters that requests choose: each gets one."""

import pytest
from engines import assert_greedy_equals, engine, greedy, load_reference, make_pair
from loras import PATTERNS, make_lora
from vllm.lora.request import LoRARequest
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.tiny import real_prompts


def test_a_request_for_a_lora_gets_that_and_not_the_default(tmp_path):
    base, default = make_pair(tmp_path, target_modules=["q_proj", "o_proj", "up_proj"])
    make_random_adapter(base, tmp_path / "mix", num_experts=5, top_k=2, r=20, seed=9)
    references = [
        load_reference(base, default),
        load_reference(base, tmp_path / "mix"),
        make_lora(base, tmp_path / "lora", 1, **PATTERNS),
    ]
    requests = [None, *(LoRARequest(n, i, str(tmp_path / n)) for i, n in ((1, "mix"), (2, "lora")))]
    prompts = real_prompts(12)
    with engine(base, default, enable_lora=True, max_loras=2, max_lora_rank=256) as llm:
        named = [requests[i % 3] for i in range(len(prompts))]
        outputs = llm.generate(prompts, greedy(), lora_request=named, use_tqdm=False)
        alone = llm.generate(prompts[:2], greedy(), use_tqdm=False)
    for i, reference in enumerate(references):
        assert_greedy_equals(outputs[i::3], reference)
    assert_greedy_equals(alone, references[0])


@pytest.mark.parametrize("options", [{"routing": "layer_wise"}, {"router_layer": 1}])
def test_a_default_with_routers_inside_is_refused(options, tmp_path):
    from types import SimpleNamespace

    from vllm_adafuse.errors import AdapterError
    from vllm_adafuse.format.adapter import load_adapter
    from vllm_adafuse.serving.paged_model import _check_default

    _, adapter = make_pair(tmp_path, **options)
    with pytest.raises(AdapterError, match="leave out --enable-lora"):
        _check_default(SimpleNamespace(adafuse_adapter=load_adapter(adapter)))
