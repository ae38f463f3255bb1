"""Routers that see a request's past, where prompts are embeddings: everybody's default and mixtures
that requests choose, in one batch with prompts of token ids."""

import pytest
import torch
from engines import MAX_LOGPROB_ERROR, TIE, engine, greedy
from test_engine_company import counter
from test_engine_context import model_of, prompts
from test_engine_context_pages import NAMES, ROOM, make_company, requests_of
from vllm_adafuse.serving.metrics import COLLECTOR, experts_counter


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("embeds")
    base, default, references = make_company(root)
    with engine(base, default, **ROOM, enable_prompt_embeds=True) as llm:
        yield llm, root, references


def embedding(served):
    return served[2]["base"].get_input_embeddings()


def given(served, *lengths, seed=0):
    """Prompts of embeddings: every third is a token's, others are none's."""
    found, draw = [], torch.Generator().manual_seed(seed)
    for text in prompts(*lengths, seed=seed):
        rows = embedding(served)(torch.tensor(text["prompt_token_ids"])).detach()
        noise = torch.randn(rows.shape, generator=draw) * rows.std()
        noise[::3] = 0
        found.append({"prompt_embeds": rows + noise})
    return found


def mixed(served, *lengths, seed=0):
    """Prompts whose first and last quarters are ids, as a chat has them around embeddings."""
    found = given(served, *lengths, seed=seed)
    for prompt, text in zip(found, prompts(*lengths, seed=seed)):
        count = len(prompt["prompt_embeds"])
        by_id = [not count // 4 <= at < count - count // 4 for at in range(count)]
        prompt["prompt_embeds"][by_id] = 0.0
        prompt |= text | {"prompt_is_token_ids": by_id}
    return found


def rows_of(served, prompt):
    """Embeddings [T, H] of a prompt."""
    rows, ids = prompt.get("prompt_embeds"), prompt.get("prompt_token_ids")
    if ids is None:
        return rows
    own = embedding(served)(torch.tensor(ids)).detach()
    return own if rows is None else torch.where(torch.tensor(prompt["prompt_is_token_ids"])[:, None], own, rows)


@torch.no_grad()
def check(served, name, prompt, output, drawn=False):
    """Every token is the reference's own choice after what stands before it, unless it was drawn; its
    logprob is the reference's."""
    rows = rows_of(served, prompt)
    for sequence in output.outputs:
        tokens = torch.tensor(sequence.token_ids)
        whole = torch.cat([rows, embedding(served)(tokens)])[None]
        logits = served[2][name](inputs_embeds=whole).logits[0, len(rows) - 1 : -1]
        expected = torch.log_softmax(logits.float(), -1)
        chosen = expected.gather(1, tokens[:, None])[:, 0]
        assert drawn or (expected.amax(-1) - chosen).max() <= TIE, name
        found = [at[token].logprob for token, at in zip(tokens.tolist(), sequence.logprobs)]
        torch.testing.assert_close(torch.tensor(found), chosen, rtol=0, atol=MAX_LOGPROB_ERROR)


def generate(served, names, texts, **options):
    requests = requests_of(served, names)
    outputs = served[0].generate(texts, greedy(**options), lora_request=requests, use_tqdm=False)
    for name, text, output in zip(names, texts, outputs, strict=True):
        check(served, name, text, output, drawn="temperature" in options)
    return outputs


def test_alone(served):
    for at, name in enumerate(NAMES):
        generate(served, [name], given(served, 20 + at, seed=at), max_tokens=6)


def test_one_batch_of_all_in_chunks(served):
    texts = given(served, 30, 70, 40, 100, 20) + prompts(60, 5, 20, 33, 9)
    generate(served, NAMES * 2, texts, max_tokens=8)
    generate(served, NAMES, mixed(served, 70, 30, 20, 100, 9), max_tokens=8)


def test_prefix_hits(served):
    """Of requests that go on in another way after the same 64 embeddings, ids, and some of both."""
    names = ["past", "wide", "base"]
    for (first,) in (given(served, 80, seed=1), prompts(80, seed=1), mixed(served, 80, seed=1)):
        generate(served, names, [first] * 3, max_tokens=2)
        outputs = generate(served, names, [{k: rows[:70] for k, rows in first.items()}] * 3, max_tokens=8)
        assert [output.num_cached_tokens for output in outputs] == [64, 64, 64]


def test_preempted_requests_go_on(served):
    before = counter(served[0], "vllm:num_preemptions")
    names = ["past", "base", "wide", "past", "base"]
    texts = given(served, 33, 33, 33, seed=2) + prompts(33, 33, seed=2)
    generate(served, names, texts, max_tokens=80)
    assert counter(served[0], "vllm:num_preemptions") > before


def test_samples_of_one_prompt(served):
    names = ["past", "base", "wide"]
    outputs = generate(served, names, given(served, 20, 50, 40, seed=4), max_tokens=8, n=2, temperature=1.0)
    assert all(len({tuple(s.token_ids) for s in output.outputs}) == 2 for output in outputs)


def test_warm_up_asks_the_default_as_steps_do(served, monkeypatch):
    model, asked = model_of(served[0]), []
    monkeypatch.setattr(model.adafuse_router, "forward", lambda *given: asked.append(given))
    model.route_any(3, None, torch.zeros(1, 128))
    model.route_any(3, torch.ones(1, dtype=torch.int32), None)
    (ids, rows), (others, none) = asked
    assert ids is None and none is None and rows.shape == (3, 128) and others.tolist() == [0, 0, 0]


def test_what_has_no_ids_is_not_counted(served):
    """Of everybody's default, whose table of ids there is: a prompt of ids is."""

    def told():
        COLLECTOR.flush()
        return sum(experts_counter().labels("adapter", str(e))._value.get() for e in range(2))

    before = told()
    generate(served, ["base"] * 2, given(served, 20, seed=6) + mixed(served, 20, seed=6), max_tokens=3)
    assert told() == before
    generate(served, ["base"], prompts(20, seed=6), max_tokens=3)
    assert told() == before + 2 * 23
