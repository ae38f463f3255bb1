"""Gates of pages are the same whether a stage looks routes up by id, hears of them from the stage
before, or decides them by embeddings."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.sequence import IntermediateTensors
from vllm_adafuse.format.context_keys import CONTEXT_WEIGHT
from vllm_adafuse.kernels.gate import Gate, gate
from vllm_adafuse.serving.page_routers import PageRouters
from vllm_adafuse.serving.page_step import LOST, NO_ADAPTER, PageStep
from vllm_adafuse.serving.past import PastRouter
from vllm_adafuse.serving.pool import Place, Size
from vllm_adafuse.serving.requests import Requests, Tokens
from vllm_adafuse.serving.routes import PAGE_ROUTES
from vllm_adafuse.serving.wrap import steps

VOCAB, HIDDEN, ROWS, EPS = 50, 24, 40, 1e-5
# Experts' pages, then columns among the passports.
PLACES = {
    "two": Place((0, 1, 2, 3, 4), (2, 0)), "all": Place((6, 7, 8), (1, 3)), "one": Place((9, 10), (4,)),
}  # fmt: skip
EXPERTS = {"two": [0, 0, 1, 2, 2], "all": [0, 1, 2], "one": [0, 1]}
CONFIGS = {
    "two": {"num_experts": 3, "top_k": 2, "scales": (2.1, 0.5, 1.0), "temperature": 0.3},
    "all": {
        "num_experts": 3, "top_k": 2, "scales": (1.0, 4.0, 0.5), "router_weights": "softmax_topk",
    },
    "one": {"num_experts": 2, "top_k": 1, "scales": (3.0, 1.5), "router_input": "embedding"},
}  # fmt: skip
LORA = Place((5, 11))


DEFAULTS = {
    "temperature": 1.0, "router_weights": "topk_softmax", "router_input": "first_norm",
    "router_context": "", "context_half_life": None, "context_scale": 1.0,
}  # fmt: skip


def config(name):
    return SimpleNamespace(**DEFAULTS | CONFIGS[name])


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


EMBEDDING, NORM = draw(VOCAB, HIDDEN), draw(HIDDEN) + 1
ROUTERS = {name: draw(c["num_experts"], HIDDEN) + i for i, (name, c) in enumerate(CONFIGS.items())}
BIAS = draw(3)


def tensors(name):
    own = {"router.weight": ROUTERS[name]}
    return own | ({"router.bias": BIAS} if name == "two" else {})


def passports(name):
    own = config(name)
    norm = NORM if own.router_input == "first_norm" else None
    bias = tensors(name).get("router.bias")
    made = Gate(
        ROUTERS[name], bias, norm, torch.tensor(own.scales), EPS, own.temperature, own.top_k,
        own.router_weights == "softmax_topk",
    )  # fmt: skip
    return gate(EMBEDDING, made)


def new_step(vocab_size, routers=None):
    step = PageStep(ROWS, Size(12, 8), ROWS if routers else vocab_size, Requests(8, embed=embed))
    step.reserve(1, [(1, 1, 1)])
    step.routers = routers
    for name, place in PLACES.items():
        step.list(place, EXPERTS[name], 1.0, config(name))
        if vocab_size:
            for column, ids, weights in zip(place.columns, *(t.t() for t in passports(name))):
                step.table_ids[column, :VOCAB], step.table_weights[column, :VOCAB] = ids, weights
    step.list(LORA, [0, 0], 0.75)
    return step


def name(step, lost=()):
    """Seven requests of 40 tokens, one of them of no adapter."""
    slots = [PLACES["two"].slot, LORA.slot, PLACES["one"].slot, NO_ADAPTER, PLACES["all"].slot]
    slots += [PLACES["one"].slot, PLACES["two"].slot]
    slots = [LOST if i in lost else slot for i, slot in enumerate(slots)]
    step.has_adapters.fill_(True)
    step.name(np.array(slots, dtype=np.int32), np.array([9, 3, 4, 5, 8, 1, 10]))
    return step


def embed(ids):
    return EMBEDDING[ids]


IDS = torch.randint(VOCAB, (ROWS,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def first():
    step = name(new_step(VOCAB))
    step.route(IDS)
    assert (step.gates != 0).sum(1).tolist()[:9] != [0] * 9
    return step


def test_a_later_stage_is_told(first):
    first.hand_on()
    middle, last = name(new_step(0)), name(new_step(0))
    middle.hand_on()
    middle.receive(*first.sent(ROWS))
    last.receive(*middle.sent(ROWS))
    for step in (middle, last):
        assert torch.equal(step.gates, first.gates) and torch.equal(step.active, first.active)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_adapter_lost_at_one_stage_is_lost_at_the_last(stage):
    steps = [name(new_step(V), lost=[4] if i == stage else []) for i, V in enumerate((VOCAB, 0, 0))]
    steps[0].route(IDS)
    for before, step in zip(steps, steps[1:]):
        before.hand_on()
        step.receive(*before.sent(ROWS))
    lost = steps[2].slots == LOST
    assert lost.nonzero().flatten().tolist() == list(range(21, 29))
    assert not steps[2].gates[lost].any() and steps[2].gates[:3].any()


def test_steps_without_adapters_pass_nothing_on(first):
    first.hand_on()
    told = [tensor.clone() for tensor in first.sent(ROWS)]
    first.has_adapters.fill_(False)
    first.table_weights.zero_()
    assert all(torch.equal(*both) for both in zip(told, first.sent(ROWS)))


class Stage(torch.nn.Module):
    """A model of which a pipeline stage is here; keeps what its forward is given."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def make_empty_intermediate_tensors(self, batch_size, dtype, device):
        return IntermediateTensors({"hidden_states": torch.zeros(batch_size, HIDDEN)})

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        self.given = intermediate_tensors and set(intermediate_tensors.tensors)
        hidden = torch.ones(len(positions), HIDDEN)
        return hidden if self.last else IntermediateTensors({"hidden_states": hidden})


def staged(monkeypatch, last):
    model, step = Stage(last), new_step(0 if last else VOCAB)
    stages = SimpleNamespace(world_size=2, is_last_rank=last)
    monkeypatch.setattr(steps, "get_pp_group", lambda: stages)
    steps.watch(model, step)
    return model, step


def test_routes_travel_beside_hidden_states_in_all_steps(monkeypatch):
    (one, first), (other, last) = (staged(monkeypatch, is_last) for is_last in (False, True))
    positions, expected = torch.arange(ROWS), {"hidden_states", *PAGE_ROUTES}
    made = other.make_empty_intermediate_tensors(ROWS, torch.float32, "cpu")
    for adapters in (False, True):
        if adapters:
            name(first), name(last, lost=[4])
        sent = one(input_ids=IDS, positions=positions)
        assert one.given is None and set(sent.tensors) == expected
        for key in expected:
            assert (made[key].shape, made[key].dtype) == (sent[key].shape, sent[key].dtype)
        hidden = other(input_ids=None, positions=positions, intermediate_tensors=sent)
        assert other.given == {"hidden_states"}
        assert hidden.all(1).sum() == ROWS - 8 * adapters  # those lost at the last stage say nothing
    kept = last.slots != LOST
    assert torch.equal(last.gates[kept], first.gates[kept]) and last.gates.any()


def test_a_stage_without_tables_follows_nobody():
    past = SimpleNamespace(**DEFAULTS | CONFIGS["one"] | {"router_context": "mean"})
    step, own = new_step(0), new_step(VOCAB)
    for each in (step, own):
        each.list(Place((9, 10), (4, 5)), EXPERTS["one"], 1.0, past)
    assert own.follows and not step.follows
    for vocab_size in (0, VOCAB):
        route = SimpleNamespace(expert_ids=torch.zeros(ROWS, 1, dtype=torch.int32))
        router = PastRouter(past, route, HIDDEN, vocab_size, EPS, Requests(4))
        assert router.follows == (vocab_size > 0)


def embedded_step():
    step = name(new_step(0, PageRouters(ROWS, 12, HIDDEN, EPS)))
    step.routers.norm_weight.copy_(NORM)
    for adapter, place in PLACES.items():
        pages = torch.tensor(place.pages)
        step.routers.put(pages, EXPERTS[adapter], config(adapter), tensors(adapter))
    return step


def test_embeddings_are_routed_as_their_ids(first):
    step = embedded_step()
    step.decide(EMBEDDING[IDS])
    assert torch.equal(step.gates != 0, first.gates != 0)
    torch.testing.assert_close(step.gates, first.gates, rtol=1e-6, atol=1e-7)
    assert torch.equal(step.active, first.active)
    step.hand_on()
    later = name(new_step(0))
    later.receive(*step.sent(ROWS))
    assert torch.equal(later.gates, step.gates)


def test_numbers_of_routers_are_not_rounded_to_the_models_dtype():
    """vLLM loads with the model's dtype for the default."""
    plain = embedded_step().routers
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = embedded_step().routers
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in plain.named_buffers():
        if name not in ("w", "c"):
            assert torch.equal(dict(found.named_buffers())[name], tensor), name


def as_given(ids, kind):
    """A request's tokens, as ids, as embeddings, or as both: the last one is an answer's."""
    if kind == "ids":
        return Tokens(ids)
    if kind == "embeddings":
        return Tokens(torch.zeros_like(ids), embed(ids).double())
    by_id = torch.arange(len(ids) - 1) % 3 == 0
    kept = torch.cat([by_id, torch.ones(1, dtype=torch.bool)])
    return Tokens(ids * kept, embed(ids[:-1]) * ~by_id[:, None], by_id)


@pytest.mark.parametrize("read", ["first_norm", "embedding"])
def test_pasts_of_embeddings_are_those_of_their_ids(monkeypatch, read):
    """From their first tokens on, in the next step, and where all are seeded; other mixtures beside them
    are routed as without."""
    monkeypatch.setattr("vllm_adafuse.serving.requests.CHUNK", 4)
    monkeypatch.setattr("vllm_adafuse.serving.page_routers.CHUNK", 8)
    changes = {"router_context": "mean", "context_scale": 3.0, "context_half_life": 2.0}
    past = SimpleNamespace(**vars(config("two")) | changes | {"router_input": read})
    place = Place(PLACES["two"].pages, (2, 6, 5))
    own = tensors("two") | {CONTEXT_WEIGHT: draw(3, HIDDEN + 1)[:, 1:]}
    by_ids, step = name(new_step(VOCAB)), embedded_step()
    router = PastRouter(past, None, HIDDEN, VOCAB, EPS, None)
    router.load(own.__getitem__, True)
    list(router.stamp(embed, SimpleNamespace(weight=NORM), 0.0))
    for column, w, c in zip(place.columns, *router.columns):
        by_ids.table_ids[column, :VOCAB], by_ids.table_weights[column, :VOCAB] = w, c
    step.routers.put(torch.tensor(place.pages), EXPERTS["two"], past, own)
    for each in (by_ids, step):
        each.list(place, EXPERTS["two"], 1.0, past)
    counts = np.array([9, 3, 4, 5, 8, 1, 10])
    texts = IDS.split(counts.tolist())
    for starts, kind in ((0, ""), (1, ""), (1, "ids"), (1, "embeddings"), (1, "both")):
        for each, how in ((by_ids, "ids"), (step, kind)):
            if kind:
                each.requests.forget()
            each.requests.begin(
                list("abcdefg"), starts * counts, counts,
                lambda at, count, how=how: as_given(texts[at][:count], how),
            )  # fmt: skip
        by_ids.route(IDS)
        step.decide(embed(IDS))
        assert torch.equal(step.gates != 0, by_ids.gates != 0)
        torch.testing.assert_close(step.gates, by_ids.gates, rtol=1e-5, atol=1e-6)
        for at in (0, 6):
            sums = [each.sums[each.requests.table[0, at], 0, :3] for each in (step, by_ids)]
            torch.testing.assert_close(*sums, rtol=1e-6, atol=1e-6)
            assert sums[0].any()


def test_embeddings_that_nobody_announced_are_refused():
    past = SimpleNamespace(**DEFAULTS | CONFIGS["one"] | {"router_context": "mean"})
    route = SimpleNamespace(expert_ids=torch.zeros(ROWS, 1, dtype=torch.int32))
    router = PastRouter(past, route, HIDDEN, VOCAB, EPS, Requests(4))
    with pytest.raises(RuntimeError, match="expected token ids: start with --enable-prompt-embeds"):
        router(None, torch.zeros(3, HIDDEN))
