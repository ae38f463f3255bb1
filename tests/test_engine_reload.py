"""Other weights under a running engine: routes are those of the weights that are there."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from engines import assert_greedy_equals, engine, greedy, load_reference, make_pair
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.digest import content_hash
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.serving import models
from vllm_adafuse.tiny import make_tiny_backbone, real_prompts

PROMPTS = real_prompts(4)
EMBEDDING = "model.embed_tokens.weight"
ADAPTER = {"num_experts": 4, "top_k": 2, "r": 4, "dtype": torch.float32}


def assert_serves(llm, model):
    llm.reset_prefix_cache()
    assert_greedy_equals(llm.generate(PROMPTS, greedy(), use_tqdm=False), model)


def reload(llm, **options):
    llm.collective_rpc("reload_weights", kwargs=options)


def replace_values(adapter, other):
    """As a careful trainer does: the new file takes the place of the old one at once."""
    shutil.copy(other / "adapter_model.safetensors", adapter / "tmp")
    os.replace(adapter / "tmp", adapter / "adapter_model.safetensors")


def in_place(llm, weight):
    """Values copied straight into the parameter, which has rows for padding."""
    (rows,) = llm.apply_model(lambda model: len(model.get_parameter(EMBEDDING)))
    weight = torch.nn.functional.pad(weight, (0, 0, 0, rows - len(weight)))
    reload(llm, weights_iterator=[(EMBEDDING, weight)], is_checkpoint_format=False)


def by_the_model(llm, weight):
    """As trainers call it that know nothing of `reload_weights`."""
    llm.apply_model(lambda model: model.load_weights([(EMBEDDING, weight)]))


def by_a_session(llm, weight):
    """A weight transfer that patches parameters itself."""

    def transfer(wrapper):
        worker = wrapper.worker
        worker.weight_transfer_engine = SimpleNamespace(
            start_weight_update=lambda: None,
            update_weights=lambda info: worker.get_model()
            .get_parameter(EMBEDDING)
            .data[: len(weight)]
            .copy_(info["weight"]),
            finish_weight_update=lambda: None,
            reset_weight_update_target=lambda: None,
            shutdown=lambda: None,
        )
        worker.start_weight_update()
        worker.update_weights({"weight": weight})
        worker.finish_weight_update()

    llm.collective_rpc(transfer)


@pytest.mark.parametrize(
    "options",
    [{"router_layer": 1}, {"routing": "layer_wise"}],
    ids=["at a later layer", "layer-wise"],
)
def test_another_checkpoint(options, tmp_path):
    base, adapter = make_pair(tmp_path, **options)
    other = make_tiny_backbone(tmp_path / "other", seed=5)
    with engine(base, adapter) as llm:
        reload(llm, weights_path=str(other))
        assert_serves(llm, load_reference(other, adapter))
        reload(llm, weights_path=str(base))
        assert_serves(llm, load_reference(base, adapter))


def test_weights_and_adapter_by_every_way(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(models.logger, "info", lambda text, *values: said.append(text % values))
    base, adapter = make_pair(tmp_path)
    other = make_tiny_backbone(tmp_path / "other", seed=5)
    better = make_random_adapter(base, tmp_path / "better", seed=9, **ADAPTER)
    wider = make_random_adapter(base, tmp_path / "wider", **ADAPTER | {"r": 8})
    model = load_reference(base, adapter)
    with engine(base, adapter) as llm:
        assert_serves(llm, model)
        for seed, write in enumerate([in_place, by_the_model, by_a_session]):
            weight = torch.randn(model.model.embed_tokens.weight.shape) * 0.02 * (seed + 1)
            model.model.embed_tokens.weight.data.copy_(weight)
            write(llm, weight)
            assert_serves(llm, model)

        replace_values(adapter, better)
        reload(llm, weights_path=str(other))
        assert f"values have changed, content {content_hash(adapter)}" in said[-1]
        assert_serves(llm, load_reference(other, better))

        # One that cannot take its place: weights and routes are new, the adapter is the old one.
        kept = shutil.copytree(adapter, tmp_path / "kept")
        for damage, words in (
            (lambda: replace_values(adapter, wider), "shape"),
            (lambda: shutil.copy(wider / "adapter_config.json", adapter), "old values are still"),
            (lambda: os.remove(adapter / "adapter_model.safetensors"), "adapter_model.safetensors"),
        ):
            damage()
            with pytest.raises(AdapterError) as error:
                reload(llm, weights_path=str(base))
            assert words in str(error.value)
            assert_serves(llm, load_reference(base, kept))
        shutil.copytree(better, adapter, dirs_exist_ok=True)
        reload(llm)
        assert_serves(llm, load_reference(base, better))


@pytest.mark.parametrize("forgets", [True, False], ids=["forgets adapters", "keeps them"])
def test_mixtures_of_requests(forgets, tmp_path, monkeypatch):
    """vLLM 0.32 forgets all adapters after a reload, which then are read again; 0.26 does not."""
    from vllm.lora.request import LoRARequest
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    if not forgets:
        monkeypatch.setattr(LoRAModelRunnerMixin, "reset_lora_state", lambda self: None, False)
    base, adapter = make_pair(tmp_path)
    other = make_tiny_backbone(tmp_path / "other", seed=5)
    request = LoRARequest("mixture", 1, str(adapter))
    with engine(base, enable_lora=True, max_loras=1, max_lora_rank=64) as llm:
        for now in (base, other):
            reload(llm, weights_path=str(now))
            llm.reset_prefix_cache()
            outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False, lora_request=request)
            assert_greedy_equals(outputs, load_reference(now, adapter))


def test_workers_refuse_values_that_the_front_end_did_not_see(tmp_path, monkeypatch):
    """The same shapes, other values: another machine's copy of the adapter, say."""
    from vllm_adafuse.serving import attach

    base, adapter = make_pair(tmp_path)
    monkeypatch.setattr(attach, "content_hash", lambda path: "0" * 64)
    with pytest.raises(AdapterError, match="content hash .* expected 0{64}: its values differ"):
        with engine(base, adapter):
            pass


def test_a_seam_that_has_moved_is_loud(monkeypatch):
    import vllm.model_executor.model_loader.reload.layerwise as layerwise
    from vllm_adafuse.patches import reload

    reload.wrap()
    reload.wrap()
    assert not hasattr(layerwise.finalize_layerwise_processing.__wrapped__, "__wrapped__")
    monkeypatch.delattr(layerwise, "finalize_layerwise_processing")
    with pytest.raises(RuntimeError, match="no finalize_layerwise_processing"):
        reload.wrap()
