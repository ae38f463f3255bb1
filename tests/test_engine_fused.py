"""A model whose projections are computed together with their experts, as on a GPU: what their ops
find by a layer's name, and that `explain` says the same of them."""

import pytest
from engines import assert_greedy_equals, engine, greedy, load_reference, make_pair
from ops import DEVICE
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm_adafuse.explain import Model, shapes_of
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.pretrained import read_config
from vllm_adafuse.serving import projections, wrap
from vllm_adafuse.tiny import real_prompts


def banks(model):
    of = wrap.banks_of(model)
    return {bank.layer_name: (bank.shape, "projection" in vars(bank)) for bank in of}


@pytest.mark.skipif(DEVICE == "cuda", reason="every engine's are, there")
def test_equals_the_reference(tmp_path, monkeypatch):
    plain = lambda layer: type(layer.quant_method) is UnquantizedLinearMethod  # noqa: E731
    monkeypatch.setattr(projections, "can_fuse", plain)
    base, adapter = make_pair(tmp_path)
    with engine(base, adapter) as llm:
        outputs = llm.generate(real_prompts(6), greedy(), use_tqdm=False)
        found = llm.apply_model(banks)[0]
    assert_greedy_equals(outputs, load_reference(base, adapter))
    backbone, model = Backbone.from_path(str(base)), Model.of(read_config(str(base)))
    told = {
        f"model.layers.{layer}.{name}.adafuse": shape
        for layer, name, shape in shapes_of(backbone, model, load_adapter(adapter))
    }
    assert {name: shape for name, (shape, _) in found.items()} == told
    assert {shape.epilogue for shape in told.values()} == {"rotary", "silu", "norm"}
    assert all(made for _, made in found.values())
