"""Where vLLM's LoRA manager is replaced: late, loudly, and not where vLLM's own is asked for."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from vllm_adafuse.patches import lora_manager, on_import
from vllm_adafuse.serving import vllm_api
from vllm_adafuse.serving.pool import Pool, Size

MODULE = "json.tool"  # which nothing here imports


def test_a_patch_waits_for_the_import_and_runs_once(monkeypatch):
    calls = []
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    on_import.when_imported(MODULE, lambda: calls.append(sys.modules[MODULE].__name__))
    on_import.when_imported(MODULE, lambda: calls.append("again"))
    assert not calls
    import json.tool

    assert calls == [MODULE] and json.tool.main
    on_import.when_imported(MODULE, lambda: calls.append("there"))
    assert calls == [MODULE, "there"]
    assert not any(isinstance(f, on_import._Finder) and f.name == MODULE for f in sys.meta_path)


def test_the_plugin_imports_no_worker():
    code = (
        "import sys; from vllm_adafuse.plugin import register; register(); register(); "
        f"assert {lora_manager._SEAM!r} not in sys.modules; "
        "import vllm.v1.worker.lora_model_runner_mixin as m; "
        "assert m.LoRAModelRunnerMixin.load_lora_model._adafuse_wrapped"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_seam_that_moved_is_an_error(monkeypatch):
    import vllm.v1.worker.lora_model_runner_mixin as seam

    monkeypatch.setattr(seam, "LoRAModelRunnerMixin", SimpleNamespace(load_lora_model=print))
    with pytest.raises(RuntimeError, match="no longer makes its LoRA manager"):
        lora_manager.wrap()


def config(extra):
    return SimpleNamespace(additional_config=extra)


def test_the_option_that_gives_lora_back_to_vllm():
    assert vllm_api.lora_option(config({})) == "adafuse"
    assert vllm_api.lora_option(config({"adafuse": {"lora": "vllm"}, "other": 1})) == "vllm"
    with pytest.raises(ValueError, match="adafuse.lora 'yes', expected"):
        vllm_api.lora_option(config({"adafuse": {"lora": "yes"}}))
    with pytest.raises(ValueError, match="adafuse 'vllm', expected an object"):
        vllm_api.lora_option(config({"adafuse": "vllm"}))


def test_graphs_of_another_pool_are_others():
    one = config({"adafuse": {"lora": "adafuse"}})
    vllm_api.mark_compiled(one, "pages 4 8")
    assert one.additional_config["adafuse"] == {"lora": "adafuse", "graph": "pages 4 8"}
    assert vllm_api.lora_option(one) == "adafuse"


def request(name, adapter):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, adapter, "/nowhere")


def told(calls):
    return [
        ([r.lora_int_id for r in found], list(ids), list(counts), list(rows))
        for found, ids, counts, rows in calls
    ]


def test_the_newer_runner_tells_of_adapters_per_request():
    from vllm.v1.worker.gpu.lora_utils import LoraState

    runner, calls = SimpleNamespace(lora_state=LoraState(4)), []
    runner.prepare_inputs = lambda logits: SimpleNamespace(cu_num_logits_np=np.array(logits))
    vllm_api.name_steps_by_request(runner, lambda *arguments: calls.append(arguments))
    state = runner.lora_state
    # Two contents of one name: LoRARequest calls them equal.
    for at, lora in enumerate([request("x", 7), None, request("x", 9)]):
        state.add_request("abc"[at], at, lora)
    for logits in ([0, 1, 2, 3], [0, 3, 4, 6]):  # without drafts, and with
        assert list(runner.prepare_inputs(logits).cu_num_logits_np) == logits
        inputs = state.make_lora_inputs(["a", "c", "b"], np.array([0, 2, 1]), np.array([5, 1, 2]))
        runner._set_active_loras(*inputs)
    # As dummy runs say it: of samples, of tokens.
    runner._set_active_loras((1, 2), (1, 1, 2), {request("d", 1)}, None)
    assert told(calls) == [
        ([7, 9], [7, 9, 0], [5, 1, 2], [7, 9, 0]),
        ([7, 9], [7, 9, 0], [5, 1, 2], [7, 7, 7, 9, 0, 0]),
        ([1], [1, 1, 2], [1, 1, 1], [1, 2]),
    ]  # fmt: skip


def test_the_older_runner_tells_of_adapters_per_request():
    runner, calls = SimpleNamespace(), []
    vllm_api.name_steps_by_request(runner, lambda *arguments: calls.append(arguments))
    batch = SimpleNamespace(
        request_lora_mapping=np.array([7, 0, 9, 99]), num_reqs=3,
        lora_id_to_lora_request={7: request("x", 7), 9: request("x", 9)},
    )  # fmt: skip
    runner.set_active_loras(batch, np.array([5, 1, 2]))
    runner.set_active_loras(batch, np.array([5, 1, 2]), np.array([2, 1, 3]))
    assert told(calls) == [
        ([7, 9], [7, 0, 9], [5, 1, 2], [7, 0, 9]),
        ([7, 9], [7, 0, 9], [5, 1, 2], [7, 7, 0, 9, 9, 9]),
    ]


@pytest.mark.parametrize("name", ["drafter", "speculator"])
def test_drafts_are_made_with_the_backbones_embedding(name):
    from torch import nn
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
    from vllm_adafuse.serving.wrap.vllm_lora import draft_without_lora

    class Drafter:
        model = None

        def load_model(self, target):
            self.model = nn.Module()
            self.model.inner = nn.Module()
            self.model.inner.embed_tokens, self.model.head = target.embed_tokens, target.head
            return "loaded"

    target, base = nn.Module(), nn.Linear(2, 2)
    target.embed_tokens, target.head = VocabParallelEmbeddingWithLoRA(base), nn.Linear(2, 2)
    wrapper, runner = target.embed_tokens, SimpleNamespace(**{name: Drafter()})
    draft_without_lora(runner)
    drafter = getattr(runner, name)
    assert drafter.load_model(target) == "loaded"
    assert drafter.model.inner.embed_tokens is base and drafter.model.head is target.head
    assert target.embed_tokens is wrapper
    # Of n-grams there is nothing to load, and no model.
    ngrams = SimpleNamespace(load_model=lambda target: None)
    draft_without_lora(SimpleNamespace(drafter=ngrams))
    ngrams.load_model(target)
    draft_without_lora(SimpleNamespace())


def test_one_kind_of_graph_with_adapters():
    older = SimpleNamespace(cudagraph_dispatcher=SimpleNamespace(specialize_lora_count=True))
    vllm_api.capture_one_kind_of_lora(older)
    assert older.cudagraph_dispatcher.specialize_lora_count is False
    newer = SimpleNamespace(lora_capture_cases=[0, 1, 2, 4, 5])
    vllm_api.capture_one_kind_of_lora(newer)
    assert newer.lora_capture_cases == [0, 5]


def test_all_are_forgotten_and_those_that_are_half_loaded():
    from vllm_adafuse.serving.manager import AdapterManager

    manager = AdapterManager.__new__(AdapterManager)
    manager.dummies, manager.hosted, manager.pool = set(), {}, Pool(Size(1))
    manager.coming, manager.reads = {7: (None, None)}, SimpleNamespace(forget=id)
    manager.meter = SimpleNamespace(forgot=id)
    manager.remove_all_adapters()
    assert not manager.coming


def test_ranks_that_share_layers_take_an_adapter_in_together(monkeypatch):
    """One writes its table; stamping, which a reload asks for again, is a matter of all of them."""
    from vllm_adafuse.serving.manager import AdapterManager

    manager = AdapterManager.__new__(AdapterManager)
    manager.loader = SimpleNamespace(stamp=lambda hosted: iter(()))
    manager.meter = SimpleNamespace(leave_table=lambda *_: SimpleNamespace(done=lambda: True))
    monkeypatch.setattr(vllm_api, "everywhere", lambda ok, in_step=False: not in_step)
    request = SimpleNamespace(lora_int_id=7, lora_path="/a")
    assert next(manager._take_in(request, None, in_step=False)) is None
