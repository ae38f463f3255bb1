"""Mixtures that see a request's past, chosen per request beside all others, in one batch."""

import pytest
import torch
from engines import (
    assert_best_beam,
    assert_greedy_equals,
    assert_logprobs_equal,
    engine,
    greedy,
    load_reference,
    make_pair,
)
from loras import FEW, make_lora, manager_of
from test_engine_company import counter
from test_engine_context import CONTEXT, prompts
from vllm.lora.request import LoRARequest
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.offline.routing import OfflineRouter
from vllm_adafuse.serving.metrics import COLLECTOR, experts_counter

MIXTURES = {
    "past": {"num_experts": 5, "r": [4, 20, 8, 33, 4], **CONTEXT},
    "wide": {
        "num_experts": 3, "top_k": 3, "r": 4, "seed": 9, "router_weights": "softmax_topk",
        **CONTEXT, "router_bias": False, "lora_alpha": [3, 9, 6], "router_context_half_life": 8.0,
    },
    "token": {"num_experts": 4, "top_k": 2, "r": 4, "seed": 5},
}  # fmt: skip
KINDS = "accepted", "draft"
NAMES = ["past", "base", "token", "wide", "lora"]


# Few blocks and few tokens a step: prompts come in chunks, and requests are preempted.
ROOM = {
    "num_gpu_blocks_override": 13, "block_size": 32, "max_num_batched_tokens": 48,
    "enable_lora": True, "max_loras": 4, "max_lora_rank": 64, "max_num_seqs": 8,
    "disable_log_stats": False,
}  # fmt: skip


def make_company(root):
    """A backbone, everybody's default, and name -> reference of all that requests can choose."""
    # Of another shape than what requests choose; a router that sees the past itself.
    default = {"num_experts": 2, "seed": 3, "router_context_half_life": 3.0}
    base, default = make_pair(root / "pair", **default, **CONTEXT)
    references = {"base": load_reference(base, default)}
    for name, options in MIXTURES.items():
        path = make_random_adapter(base, root / name, dtype=torch.float32, **{"top_k": 2} | options)
        references[name] = load_reference(base, path)
    references["lora"] = make_lora(base, root / "lora", 4, **FEW)
    return base, default, references


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    base, default, references = make_company(root)
    # The bare backbone's drafts, of which most are rejected; test_engine_context.py has none.
    drafts = {"method": "draft_model", "model": str(base), "num_speculative_tokens": 3}
    options = ROOM | {"speculative_config": drafts | {"max_model_len": 256}}
    with engine(base, default, **options) as llm:
        yield llm, root, references


def requests_of(served, names):
    root, ids = served[1], {name: 1 + NAMES.index(name) for name in NAMES}
    return [
        None if name == "base" else LoRARequest(name, ids[name], str(root / name)) for name in names
    ]


def generate(served, names, texts, **options):
    llm, _, references = served
    requests = requests_of(served, names)
    outputs = llm.generate(texts, greedy(**options), lora_request=requests, use_tqdm=False)
    for name, output in zip(names, outputs):
        assert_greedy_equals([output], references[name])
    return outputs


def test_one_batch_of_all(served):
    generate(served, NAMES, prompts(30, 20, 40, 55, 20), max_tokens=8)


def test_prefix_hits_and_others_pasts(served):
    (first,) = prompts(70, seed=1)
    ids = first["prompt_token_ids"]
    generate(served, ["past", "wide"], [first, first], max_tokens=2)
    generate(served, ["base"], [first], max_tokens=2)
    again = [{"prompt_token_ids": ids[:64] + tail} for tail in ([5, 6], [7], [8, 9, 10])]
    outputs = generate(served, ["past", "wide", "past"], again, max_tokens=8)
    assert [output.num_cached_tokens for output in outputs] == [64, 64, 64]
    (output,) = generate(served, ["base"], again[:1], max_tokens=8)
    assert output.num_cached_tokens == 64


def test_preempted_requests_go_on(served):
    names = ["past", "past", "wide", "lora", "base"]
    generate(served, names, prompts(*[33] * 5, seed=2), max_tokens=70)


def test_samples_of_one_prompt(served):
    names = ["past", "base", "wide"]
    outputs = served[0].generate(
        prompts(20, 30, 40, seed=4), greedy(8, n=3, temperature=1.0),
        lora_request=requests_of(served, names), use_tqdm=False,
    )  # fmt: skip
    for name, output in zip(names, outputs, strict=True):
        assert len({tuple(sequence.token_ids) for sequence in output.outputs}) == 3
        assert_logprobs_equal(output, served[2][name])


def test_beams(served):
    from vllm.sampling_params import BeamSearchParams

    names, texts = ["past", "wide"], prompts(20, 20, seed=5)
    params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    outputs = served[0].beam_search(texts, params, lora_request=requests_of(served, names))
    for name, text, output in zip(names, texts, outputs, strict=True):
        assert_best_beam(output, served[2][name], text["prompt_token_ids"], 5)


def test_drafts_are_accepted_and_rejected(served, monkeypatch):
    seeds = []
    monkeypatch.setattr("vllm_adafuse.serving.past.seed_ring", lambda *given: seeds.append(given))
    monkeypatch.setattr("vllm_adafuse.serving.page_step.seed_ring", lambda *given: seeds.append(given))
    before = [counter(served[0], f"vllm:spec_decode_num_{kind}_tokens") for kind in KINDS]
    generate(served, ["past", "base", "wide", "token"], prompts(9, 40, 7, 20, seed=3), max_tokens=40)
    after = [counter(served[0], f"vllm:spec_decode_num_{kind}_tokens") for kind in KINDS]
    accepted, drafts = (b - a for a, b in zip(before, after))
    assert 3 <= accepted < drafts / 2
    assert not seeds  # they go on from within the ring


def test_requests_are_followed_only_where_a_router_needs_it(served):
    step = manager_of(served[0]).step
    assert step.follows and step.requests.wanted
    assert [type(f).__name__ for f in step.requests.followers] == ["PastRouter", "PageStep"]


@pytest.mark.parametrize("section, option, value, said", [
    ("parallel_config", "prefill_context_parallel_size", 2, "of prefills (PCP)"),
    ("parallel_config", "decode_context_parallel_size", 2, "of decodes (DCP)"),
])  # fmt: skip
def test_options_that_cannot_be_had(served, section, option, value, said):
    from copy import copy

    from vllm_adafuse.serving.attach import options_problem

    config = copy(served[0].llm_engine.vllm_config)
    assert options_problem(config) is None
    changed = copy(getattr(config, section))
    object.__setattr__(changed, option, value)
    object.__setattr__(config, section, changed)
    assert f"{said} yet; leave it out" in options_problem(config)


def test_tokens_of_experts_are_counted_when_requests_end(served):
    """Of pages and of the default, of routers that see the past and of one that does not."""
    llm, root, references = served

    def told(name):
        COLLECTOR.flush()
        return [int(experts_counter().labels(name, str(e))._value.get()) for e in range(6)]

    names = ["past", "base", "token", "wide", "lora"]
    shown = {"base": "adapter", **{name: name for name in names if name != "base"}}
    before = {name: told(shown[name]) for name in names}
    outputs = generate(served, names, prompts(30, 20, 40, 55, 20, seed=11), max_tokens=8)
    for name, output in zip(names, outputs):
        grown = [now - then for now, then in zip(told(shown[name]), before[name])]
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        expected = torch.zeros(0, dtype=torch.long)
        if name != "lora":
            folder = root / "pair" / "adapter" if name == "base" else root / name
            router = OfflineRouter(load_adapter(folder), root / "pair" / "base")
            expected = router.routes(torch.tensor(ids))[0].flatten()
        assert grown == torch.bincount(expected, minlength=6).tolist(), name
