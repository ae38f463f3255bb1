"""Routers that see a request's past on a GPU: captured graphs, both model runners, prefix hits,
chunks. What stands on the device at the end is what the tokens add up to, and says the routes."""

import pytest
import torch
from engines import greedy
from test_engine_context import CONTEXT, prompts
from test_gpu_engine import gpu_engine, gpu_pair, graphs
from vllm.lora.request import LoRARequest
from vllm_adafuse.kernels.context_routes import choose_by_past, faded_sums

pytestmark = pytest.mark.gpu

LENGTHS = [1, 5, 17, 64, 65, 130, 300, 411, 33, 90, 250, 8] * 2


# Graphs without torch.compile: routes and sums are made outside of what it compiles. V1's graphs of
# mixed steps are vLLM's fault in 0.26: docs/testing.md.
RUNNERS = {"older": ("0", "FULL_DECODE_ONLY"), "newer": ("1", "FULL")}
# An engine for each: pytest -n 4 --dist loadgroup starts each in a process of its own, and once.
ENGINES = [
    pytest.param((runner, where), id=f"{runner}-{where}", marks=pytest.mark.xdist_group(f"{runner}-{where}"))
    for runner in RUNNERS for where in ("pinned", "pages")
]  # fmt: skip


@pytest.fixture(scope="module", params=ENGINES)
def served(request, tmp_path_factory):
    runner, where = request.param
    number, mode = RUNNERS[runner]
    memory = {"router_context_half_life": 40.0} if where == "pages" else {}
    base, adapter = gpu_pair(tmp_path_factory.mktemp("past"), num_experts=5, top_k=2, **CONTEXT, **memory)
    options = {"max_model_len": 512, "max_num_batched_tokens": 512, "max_num_seqs": 32}
    # A step is scheduled before the tokens of the last are known; on a CPU vLLM does not do that.
    options |= {"async_scheduling": True, "enable_sleep_mode": True}
    options |= graphs(mode=0, cudagraph_mode=mode, cudagraph_capture_sizes=[1, 8, 32])
    if where == "pages":
        options |= {"enable_lora": True, "max_loras": 2, "max_lora_rank": 128}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", number)
        with gpu_engine(base, None if where == "pages" else adapter, **options) as llm:
            named = LoRARequest("past", 1, str(adapter)) if where == "pages" else None
            yield llm, named


def on_device(served, sequences):
    """How far the nearest sum is from what each of these sequences of token ids adds up to; the
    route of the last step, what it is to be for the last of them, and how far its weights are."""
    pinned = served[1] is None

    def look(worker):  # in the worker's process: what it refers to is pickled, and what it returns
        model = worker.get_model()
        if pinned:
            router = model.adafuse_router
            w, c, sums, fading = router.w, router.c, router.sums, 0.0
            found_ids, found = router.route.expert_ids[0], router.route.weights[0]
        else:
            step = model.adafuse_step
            columns, fading = next(iter(step._seeing.values()))
            columns, behind = list(columns), step.vocab_size
            w = step.table_ids.view(torch.float32)[columns, :behind]
            c, sums = step.table_weights[columns, :behind], step.sums
            found_ids, found = step.table_ids[:2, behind], step.table_weights[:2, behind]
        offs = []
        for ids in sequences:
            expected = faded_sums(c[:, ids].t(), fading)[-1]
            offs.append((sums.flatten(0, 1)[:, : len(expected)] - expected).abs().amax(1).min().item())
        scales = torch.full((5,), 2.0, device=w.device)  # alpha 2 r
        ids = sequences[-1]
        expected_ids, expected = choose_by_past(w[:, ids].t(), c[:, ids].t(), scales, 2, False, fading)
        off = (found - expected[-1]).abs().max().item()
        return offs, found_ids.tolist(), expected_ids[-1].tolist(), off

    return served[0].collective_rpc(look)[0]


def computed(output) -> list[int]:
    """All token ids of a request but the last, which was never computed with."""
    return [*output.prompt_token_ids, *output.outputs[0].token_ids][:-1]


def generate(served, texts, tokens):
    return served[0].generate(texts, greedy(tokens), lora_request=served[1], use_tqdm=False)


def check_sums(served, outputs):
    offs, *_ = on_device(served, [computed(output) for output in outputs])
    assert max(offs) < 1e-8, offs


def test_chunks_and_graphs(served):
    check_sums(served, generate(served, prompts(*LENGTHS), 24))


def test_prefix_hits(served):
    texts = prompts(*LENGTHS, seed=1)
    generate(served, texts, 2)
    again = [{"prompt_token_ids": text["prompt_token_ids"][:-1] + [7, 8]} for text in texts]
    outputs = generate(served, again, 24)
    assert sum(output.num_cached_tokens for output in outputs) > 1000
    check_sums(served, outputs)


def test_routes_of_the_last_step(served):
    (output,) = generate(served, prompts(200, seed=2), 40)
    _, found_ids, expected_ids, off = on_device(served, [computed(output)])
    assert list(found_ids) == list(expected_ids)
    assert off < 1e-5


def test_after_a_sleep(served):
    """Level 1 keeps what is on the device on the host, level 2 keeps buffers."""
    llm = served[0]
    llm.sleep(level=1), llm.wake_up()
    check_sums(served, generate(served, prompts(*LENGTHS, seed=3), 12))
    llm.sleep(level=2), llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    check_sums(served, generate(served, prompts(*LENGTHS, seed=3), 12))
    (output,) = generate(served, prompts(90, seed=4), 9)
    _, found_ids, expected_ids, off = on_device(served, [computed(output)])
    assert list(found_ids) == list(expected_ids)
    assert off < 1e-5
