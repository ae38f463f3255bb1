"""Routers that see a request's past, on a GPU, where drafts of tokens are rejected: by either model
runner, with scheduling that waits for the word on drafts and with one that does not."""

import pytest
from engines import greedy
from test_engine_context import CONTEXT, prompts
from test_gpu_context import check_sums
from test_gpu_engine import engine_if_it_can, gpu_pair
from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.gpu

LENGTHS = [1, 5, 17, 64, 65, 130, 300, 411]
NGRAM = {"num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


@pytest.fixture(scope="module", params=["older-ngram", "older-ngram_gpu", "older-draft_model",
                                        "newer-ngram_gpu", "newer-draft_model"])  # fmt: skip
def served(request, tmp_path_factory):
    runner, method = request.param.split("-")
    base, adapter = gpu_pair(tmp_path_factory.mktemp("drafts"), num_experts=5, top_k=2, **CONTEXT)
    drafts = {"method": method} | NGRAM
    if method == "draft_model":  # what the mixture says otherwise is rejected
        drafts = {"method": method, "model": str(base), "num_speculative_tokens": 3}
    options = {
        "enforce_eager": False, "max_model_len": 512, "max_num_batched_tokens": 512,
        "compilation_config": {"cudagraph_capture_sizes": [1, 8, 32]}, "max_num_seqs": 8,
        "enable_lora": True, "max_loras": 2, "max_lora_rank": 128, "speculative_config": drafts,
        "async_scheduling": False if method == "ngram" else True,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(runner == "newer")))
        with engine_if_it_can(base, None, **options) as llm:
            yield llm, LoRARequest("past", 1, str(adapter))


def test_sums_are_those_of_what_was_accepted(served):
    llm, named = served
    texts = prompts(*LENGTHS)
    for text in texts:
        text["prompt_token_ids"] = (text["prompt_token_ids"][:40] * 3)[: len(text["prompt_token_ids"])]
    for _ in range(2):  # again: from the prefix cache
        check_sums(served, llm.generate(texts, greedy(60), lora_request=named, use_tqdm=False))
