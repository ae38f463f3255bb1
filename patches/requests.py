"""Says whose a step's tokens are, to models that route by a request's past (serving/requests.py).

The older model runner settles a batch in `_prepare_inputs`; the newer one tells a model's own state
of new requests (`add_request`) and of each step (`prepare_inputs`). Both run dummy steps by
`_dummy_run`. Where one of these is not found, such models are refused; all others are served.

Read against vLLM 0.32.0 (v1/worker/gpu_model_runner.py, v1/worker/gpu/model_runner.py).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from vllm_adafuse.patches.on_import import when_imported

_MARK = "_adafuse_wrapped"


def apply() -> None:
    """Wraps each runner's methods when its module is imported."""
    when_imported("vllm.v1.worker.gpu_model_runner", _wrap_older)
    when_imported("vllm.v1.worker.gpu.model_runner", _wrap_newer)


def _requests_of(runner: Any) -> Any:
    """The `Requests` of a runner's model; None where no router sees the past."""
    return getattr(runner.get_model(), "adafuse_requests", None)


def _wrap_older() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def make_prepare(original):
        def _prepare_inputs(self, scheduler_output, *arguments, **options):
            prepared = original(self, scheduler_output, *arguments, **options)
            requests = _requests_of(self)
            if requests is not None and not requests.wanted:
                requests.rest()
            elif requests is not None:
                if scheduler_output.finished_req_ids:
                    requests.forget(scheduler_output.finished_req_ids)
                scheduled = scheduler_output.num_scheduled_tokens
                _begin_older(requests, self.input_batch, scheduled, _true_starts(self))
            return prepared

        return _prepare_inputs

    _wrap(GPUModelRunner, "_prepare_inputs", make_prepare)
    _wrap(GPUModelRunner, "_dummy_run", _make_dummy_run)


def _true_starts(runner: Any) -> torch.Tensor | None:
    """Where the host does not wait to hear which drafts were rejected: tokens computed of each
    request of the batch, on the device."""
    if _requests_of(runner).ring == 1 or not runner.use_async_spec_decode:
        return None
    return runner.num_computed_tokens[: runner.input_batch.num_reqs]


def _begin_older(
    requests: Any, batch: Any, scheduled: dict[str, int], true_starts: torch.Tensor | None
) -> None:
    from vllm_adafuse.serving.requests import Tokens

    def tokens_of(place: int, count: int) -> Tokens:
        token_ids, given, by_id = batch.token_ids_cpu[place, :count].copy(), None, None
        if requests.embed is not None:
            given = batch.req_prompt_embeds.get(place)
            by_id = torch.asarray(batch.is_token_ids[place, :count], copy=True)
            token_ids[~by_id.numpy()] = 0  # what stands there is nobody's
        if (token_ids < 0).any():
            raise RuntimeError(
                f"vllm-adafuse: request {batch.req_ids[place]} goes on after {count} tokens of "
                "which some are not known here, so its experts cannot be chosen; run with "
                "--no-async-scheduling"
            )
        return Tokens(torch.from_numpy(token_ids), given, by_id)

    ids = batch.req_ids[: batch.num_reqs]
    starts = batch.num_computed_tokens_cpu[: batch.num_reqs]
    counts = [scheduled[request] for request in ids]
    requests.begin(ids, starts, counts, tokens_of, (true_starts, None))


def _wrap_newer() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    def make_load(original):
        def load_model(self, *arguments, **options):
            loaded = original(self, *arguments, **options)
            if _requests_of(self) is not None:
                _follow_state(self, self.model_state)
            return loaded

        return load_model

    _wrap(GPUModelRunner, "load_model", make_load)
    _wrap(GPUModelRunner, "_dummy_run", _make_dummy_run)


def _follow_state(runner: Any, state: Any) -> None:
    """Follows the requests of the newer runner, or notes that it cannot.

    Raises:
        RuntimeError: it cannot, and a router waits for it.
    """
    from vllm_adafuse.serving.attach import UNSEEN
    from vllm_adafuse.serving.requests import Tokens

    told = "all_token_ids", "num_computed_tokens_np", "num_computed_tokens"
    wanted = [(state, ("prepare_inputs", "add_request")), (runner.req_states, told)]
    if embedded := _requests_of(runner).embed is not None:
        wanted.append((getattr(state, "prompt_embeds_state", None), ("gpu_tensors",)))
    if lacking := [n for owner, names in wanted for n in names if not hasattr(owner, n)]:
        UNSEEN["newer"] = f"its newer model runner has no {', '.join(lacking)}"
        if _requests_of(runner).wanted:
            raise RuntimeError(
                f"vllm-adafuse: {UNSEEN['newer']}, so a router could not see a request's past; set "
                "VLLM_USE_V2_MODEL_RUNNER=0, or use another vLLM from 0.26 to 0.33"
            )
        return
    prepare, add = state.prepare_inputs, state.add_request
    given_of = state.prompt_embeds_state.gpu_tensors if embedded else {}

    @functools.wraps(prepare)
    def prepare_inputs(batch, req_states):
        def tokens_of(place: int, count: int) -> Tokens:
            ids = req_states.all_token_ids.gpu[int(batch.idx_mapping_np[place]), :count]
            given, by_id = given_of.get(batch.req_ids[place], (None, None))
            return Tokens(ids, given, None if by_id is None else by_id.bool())

        requests = _requests_of(runner)
        if not requests.wanted:
            requests.rest()
            return prepare(batch, req_states)
        starts = req_states.num_computed_tokens_np[batch.idx_mapping_np]
        count, on_device = batch.num_reqs, (None, None)
        if requests.ring > 1:  # what the host says are upper bounds
            true_starts = req_states.num_computed_tokens.gpu[batch.idx_mapping[:count]]
            on_device = true_starts, batch.query_start_loc[: count + 1]
        counts = batch.num_scheduled_tokens[:count]
        requests.begin(batch.req_ids[:count], starts[:count], counts, tokens_of, on_device)
        return prepare(batch, req_states)

    @functools.wraps(add)
    def add_request(req_index, new_req_data):
        _requests_of(runner).forget([new_req_data.req_id])
        return add(req_index, new_req_data)

    state.prepare_inputs, state.add_request = prepare_inputs, add_request


def _make_dummy_run(original):
    def _dummy_run(self, *arguments, **options):
        requests = _requests_of(self)
        with contextlib.nullcontext() if requests is None else requests.nobodys():
            return original(self, *arguments, **options)

    return _dummy_run


def _wrap(owner: Any, name: str, make) -> None:
    from vllm_adafuse.serving.attach import UNSEEN

    original = getattr(owner, name, None)
    if original is None:
        UNSEEN[owner.__module__] = f"{owner.__module__}.{owner.__name__} has no {name}"
    elif not getattr(original, _MARK, False):
        wrapper = functools.wraps(original)(make(original))
        setattr(wrapper, _MARK, True)
        setattr(owner, name, wrapper)
