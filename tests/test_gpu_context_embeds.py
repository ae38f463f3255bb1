"""Routers that see a request's past, where prompts are embeddings, on a GPU: captured graphs, both
model runners, everybody's default and a mixture that requests choose in one batch. What stands on the
device at the end is what the tokens add up to."""

from importlib.util import find_spec

import pytest
import torch
from engines import greedy
from test_engine_context import CONTEXT, prompts
from test_gpu_context import LENGTHS, RUNNERS
from test_gpu_engine import WIDE, gpu_engine, gpu_pair, graphs
from vllm.lora.request import LoRARequest
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.kernels.context_routes import faded_sums, fading_of

pytestmark = pytest.mark.gpu

HALF_LIFE = 40.0
ENGINES = [
    pytest.param(runner, marks=pytest.mark.xdist_group(f"{runner}-embeds")) for runner in RUNNERS
]


@pytest.fixture(scope="module", params=ENGINES)
def served(request, tmp_path_factory):
    number, mode = RUNNERS[request.param]
    if number == "1" and find_spec("vllm.v1.worker.gpu.model_states.prompt_embeds") is None:
        pytest.skip("this vLLM's newer model runner takes no prompt embeddings")
    root = tmp_path_factory.mktemp("embeds")
    memory = {"router_context_half_life": HALF_LIFE}
    base, default = gpu_pair(root, num_experts=3, top_k=2, **CONTEXT, **memory)
    own = make_random_adapter(base, root / "past", num_experts=5, top_k=2, r=8, seed=4, **CONTEXT)
    options = {"max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 32}
    options |= {"async_scheduling": True, "enable_prompt_embeds": True}
    options |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": 128}
    options |= graphs(mode=0, cudagraph_mode=mode, cudagraph_capture_sizes=[1, 8, 32])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", number)
        with gpu_engine(base, default, **options) as llm:
            yield llm, LoRARequest("past", 1, str(own))


def texts_of(seed):
    """By turns embeddings [T, H] that are no token's, and ids."""
    draw, found = torch.Generator().manual_seed(seed), prompts(*LENGTHS, seed=seed)
    for text in found[::2]:
        shape = len(text.pop("prompt_token_ids")), WIDE["hidden_size"]
        text["prompt_embeds"] = (torch.randn(shape, generator=draw) * 0.02).bfloat16()
    return found


def generate(served, texts, tokens):
    """Half of them by the default, half by the mixture that they choose."""
    llm, own = served
    requests = [own if i % 4 < 2 else None for i in range(len(texts))]
    return requests, llm.generate(texts, greedy(tokens), lora_request=requests, use_tqdm=False)


def farthest(llm, texts, requests, outputs):
    """How far the nearest sum on the device is from what a request adds up to, of all the most."""
    asked = [
        (text.get("prompt_embeds"), text.get("prompt_token_ids", []), named is not None,
         list(output.outputs[0].token_ids)[:-1])  # the last was never computed with
        for text, named, output in zip(texts, requests, outputs, strict=True)
    ]  # fmt: skip
    default = fading_of(HALF_LIFE)

    def look(worker):  # in the worker's process: what it refers to is pickled, and what it returns
        model, most = worker.get_model(), 0.0
        router, step, embed = model.adafuse_router, model.adafuse_step, model.adafuse_requests.embed
        for rows, ids, named, answer in asked:
            hidden = embed(torch.tensor(ids + answer, device=step.slots.device, dtype=torch.int64))
            if rows is not None:
                hidden = torch.cat([rows.to(hidden), hidden])
            if named:
                own, fading = next(iter(step._seeing.values()))
                said, sums = step.routers.said(hidden)[list(own)], step.sums
            else:
                said, sums, fading = router._terms(hidden)[1], router.sums, default
            expected = faded_sums(said.t(), fading)[-1]
            off = (sums.flatten(0, 1)[:, : len(expected)] - expected).abs().amax(1).min()
            most = max(most, off.item())
        return most

    return llm.collective_rpc(look)[0]


def test_sums_of_embeddings(served):
    """In chunks and graphs, then from the prefix cache."""
    texts = texts_of(0)
    for tokens in (24, 16):
        requests, outputs = generate(served, texts, tokens)
        assert farthest(served[0], texts, requests, outputs) < 1e-4
    assert sum(output.num_cached_tokens for output in outputs) > 1000
    other = texts_of(1)  # other embeddings of these lengths
    assert farthest(served[0], other, requests, outputs) > 1e-2


def test_embeddings_of_ids_say_what_ids_say(served):
    llm, own = served
    texts = prompts(*LENGTHS[:12], seed=2)
    ids = [text["prompt_token_ids"] for text in texts]

    def embed(worker):
        model = worker.get_model()
        device, embed = model.adafuse_step.slots.device, model.adafuse_requests.embed
        return [embed(torch.tensor(own, device=device)).detach().cpu() for own in ids]

    rows = [{"prompt_embeds": own} for own in llm.collective_rpc(embed)[0]]
    for named in (own, None):
        said = [
            llm.generate(given, greedy(12), lora_request=named, use_tqdm=False) for given in (texts, rows)
        ]
        for one, other in zip(*said, strict=True):
            assert one.outputs[0].token_ids[:1] == other.outputs[0].token_ids[:1]
            best, found = (o.outputs[0].logprobs[0] for o in (one, other))
            token = one.outputs[0].token_ids[0]
            assert abs(best[token].logprob - found[token].logprob) < 0.05
