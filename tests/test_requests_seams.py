"""What the newer model runner says of its requests, by a stand-in: it needs a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_requests import Told
from vllm_adafuse.patches import requests as patch
from vllm_adafuse.serving.requests import Requests


class State:
    """A model's own state, as the newer runner has it."""

    def prepare_inputs(self, batch, req_states):
        return {"prepared": batch}

    def add_request(self, req_index, new_req_data):
        return req_index


class RequestStates:
    """Of its requests."""

    num_computed_tokens_np = np.array([0, 3, 0, 6])
    num_computed_tokens = SimpleNamespace(gpu=torch.tensor([0, 2, 0, 4]))
    all_token_ids = SimpleNamespace(gpu=torch.arange(40).view(4, 10))


@pytest.fixture
def runner():
    model = SimpleNamespace(adafuse_requests=Requests(4))
    model.adafuse_requests.followers.append(Told())
    states = RequestStates()
    return SimpleNamespace(
        get_model=lambda: model, requests=model.adafuse_requests, req_states=states
    )


def batch_of(*requests):
    """(name, place in the runner's state, tokens of the step) each."""
    names, places, counts = zip(*requests)
    return SimpleNamespace(
        req_ids=list(names), num_reqs=len(names), idx_mapping_np=np.array(places),
        idx_mapping=torch.tensor(places), num_scheduled_tokens=np.array(counts),
        query_start_loc=torch.tensor([0, 1, *[2] * len(names)]),
    )  # fmt: skip


def test_steps_and_new_requests_of_the_newer_runner(runner):
    state, told = State(), runner.requests.followers[0]
    patch._follow_state(runner, state)
    states = runner.req_states
    batch = batch_of(("b", 3, 2), ("a", 1, 1))
    assert state.prepare_inputs(batch, states) == {"prepared": batch}
    rows = {name: row for name, (_, row, _) in zip(("b", "a"), told.seeds)}
    assert [ids for _, _, ids in told.seeds] == [[30, 31, 32, 33, 34, 35], [10, 11, 12]]
    assert runner.requests.table[:, :2].tolist() == [[rows["b"], rows["a"]], [6, 3], [0, 2]]
    told.seeds.clear()
    states.num_computed_tokens_np = np.array([0, 4, 0, 8])
    state.prepare_inputs(batch_of(("b", 3, 1), ("a", 1, 1)), states)
    assert not told.seeds
    # Another request of the same name, at a place where the old one would go on.
    assert state.add_request(3, SimpleNamespace(req_id="b")) == 3
    states.num_computed_tokens_np = np.array([0, 5, 0, 9])
    state.prepare_inputs(batch_of(("b", 3, 1), ("a", 1, 1)), states)
    assert [len(ids) for _, _, ids in told.seeds] == [9]
    told.follows = False
    state.prepare_inputs(batch_of(("b", 3, 1)), states)
    assert not runner.requests.table.any()


def test_prompts_of_embeddings_of_the_newer_runner(runner):
    state, told, rows = State(), runner.requests.followers[0], torch.ones(5, 2)
    by_id = torch.tensor([1, 0, 0, 0, 1], dtype=torch.uint8)
    state.prompt_embeds_state = SimpleNamespace(gpu_tensors={"b": (rows, by_id), "a": (rows, None)})
    runner.requests.embed = lambda ids: ids
    given = {}
    told.seed = lambda place, row, tokens: given.update({"ba"[place]: tokens})
    patch._follow_state(runner, state)
    state.prepare_inputs(batch_of(("b", 3, 2), ("a", 1, 1)), runner.req_states)
    assert given["b"].given is rows and given["a"].given is rows and given["a"].by_id is None
    assert given["b"].by_id.tolist() == [True, False, False, False, True]
    assert given["b"].ids.tolist() == [30, 31, 32, 33, 34, 35]
    state.prompt_embeds_state.gpu_tensors.clear()  # later ones are of ids
    runner.requests.forget()
    state.prepare_inputs(batch_of(("b", 3, 2)), runner.req_states)
    assert given["b"].given is None and given["b"].by_id is None


def test_prompts_of_embeddings_of_the_older_runner():
    """Where an embedding stands the ids are another's, who was there before."""
    requests, rows, given = Requests(4, embed=lambda ids: ids), torch.ones(3, 2), {}
    follower = Told()
    follower.seed = lambda place, row, tokens: given.update({place: tokens})
    requests.followers.append(follower)
    batch = SimpleNamespace(
        req_ids=["a", "b"], num_reqs=2, num_computed_tokens_cpu=np.array([4, 3]),
        token_ids_cpu=np.array([[-1, 7, -1, 9, 5], [1, 2, 3, 4, 5]]), req_prompt_embeds={0: rows},
        is_token_ids=np.array([[False, True, False, True, True], [True] * 5]),
    )  # fmt: skip
    patch._begin_older(requests, batch, {"a": 1, "b": 1}, None)
    assert given[0].ids.tolist() == [0, 7, 0, 9] and given[0].given is rows
    assert given[0].by_id.tolist() == [False, True, False, True]
    assert given[1].ids.tolist() == [1, 2, 3] and given[1].given is None
    batch.token_ids_cpu[0, 3] = -1
    requests.forget()
    with pytest.raises(RuntimeError, match="some are not known here"):
        patch._begin_older(requests, batch, {"a": 1, "b": 1}, None)


def test_what_the_device_knows_of_rejected_drafts(runner):
    """The host's are upper bounds: of starts, and of the tokens of those whose drafts were cut."""
    state = State()
    runner.requests.ring = 3
    patch._follow_state(runner, state)
    state.prepare_inputs(batch_of(("b", 3, 2), ("a", 1, 3)), runner.req_states)
    assert runner.requests.table[1].tolist() == [4, 2, 0, 0, 0]
    assert runner.requests.table[2].tolist() == [0, 1, 2, 2, 2]
    own = SimpleNamespace(
        get_model=runner.get_model, use_async_spec_decode=True,
        num_computed_tokens=torch.tensor([7, 8, 9]), input_batch=SimpleNamespace(num_reqs=2),
    )  # fmt: skip
    assert patch._true_starts(own).tolist() == [7, 8]
    own.use_async_spec_decode = False
    assert patch._true_starts(own) is None


def test_dummy_runs_of_either_runner(runner):
    seen = []

    def dummy_run(self, tokens):
        self.requests.begin(["dummy"], np.array([2]), np.array([tokens]), None)
        seen.append(self.requests.table.any().item())
        return tokens

    assert patch._make_dummy_run(dummy_run)(runner, 5) == 5 and seen == [False]
    bare = SimpleNamespace(get_model=SimpleNamespace)
    assert patch._make_dummy_run(lambda self, n: n)(bare, 3) == 3


def test_a_runner_without_the_seam_is_named(runner, monkeypatch):
    from vllm_adafuse.serving import attach

    monkeypatch.setattr(attach, "UNSEEN", {})
    patch._wrap(SimpleNamespace, "_prepare_inputs", None)
    assert "has no _prepare_inputs" in next(iter(attach.UNSEEN.values()))
    with pytest.raises(RuntimeError, match="no prepare_inputs, add_request, so a router could not"):
        patch._follow_state(runner, object())
    runner.requests.embed = lambda ids: ids
    with pytest.raises(RuntimeError, match="model runner has no gpu_tensors, so a router could not"):
        patch._follow_state(runner, State())
    runner.requests.embed, runner.requests.followers[0].follows = None, False
    attach.UNSEEN.clear()
    patch._follow_state(runner, object())  # all others are served
    assert "prepare_inputs" in attach.UNSEEN["newer"]
