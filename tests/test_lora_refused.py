"""Adapters that a worker cannot serve by request are refused by name, with the way out."""

from types import SimpleNamespace

import pytest
from engines import make_pair
from loras import FEW, engine_config, make_lora
from transformers import AutoConfig
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.serving.hosted import Loader
from vllm_adafuse.tiny import make_tiny_backbone


def loader_of(base, family="LlamaForCausalLM", linears=None, pipelined=False, embeds=False):
    """A `Loader` whose model has these linears, and no memory for them."""
    config = AutoConfig.from_pretrained(base)
    config.architectures = [family]
    model_config = SimpleNamespace(
        hf_config=config, model=str(base), revision=None, enable_prompt_embeds=embeds
    )
    loader = Loader(SimpleNamespace(), engine_config(model_config, pipelined), [])
    loader.sizes = Backbone.from_path(str(base)).linears if linears is None else linears
    return loader


@pytest.mark.parametrize(
    "adapter, loader, message",
    [
        ({"routing": "layer_wise"}, {}, "`routing` layer_wise"),
        ({"router_layer": 2}, {}, "`router.layer` 2"),
        ({}, {"family": "OtherForCausalLM"}, "whose embedding is not known"),
        # Of images: what stands for them has no embedding among those of ids.
        *[
            (options, {"family": "LlavaForConditionalGeneration"}, "a mixture on LlavaForConditional")
            for options in ({}, {"router_context": "mean"})
        ],
    ],
)
def test_mixtures_that_are_served_alone(adapter, loader, message, tmp_path):
    base, path = make_pair(tmp_path, **adapter)
    with pytest.raises(AdapterError) as refused:
        loader_of(base, **loader).read(str(path))
    assert message in str(refused.value) and "serve it alone: --hf-overrides" in str(refused.value)


def test_linears_that_take_no_adapters(tmp_path):
    base = make_tiny_backbone(tmp_path / "base")
    make_lora(base, tmp_path / "lora", 1, **FEW)
    linears = {n: s for n, s in Backbone.from_path(str(base)).linears.items() if "q_proj" in n}
    for family in ("LlamaForCausalLM", "OtherForCausalLM"):
        with pytest.raises(AdapterError) as refused:
            loader_of(base, family, linears).read(str(tmp_path / "lora"))
        assert "v_proj" in str(refused.value) and "or let vLLM's own LoRA try it" in str(
            refused.value
        )
        assert "q_proj" not in str(refused.value)


def test_another_size_of_a_family_that_is_not_in_the_table(tmp_path):
    base = make_tiny_backbone(tmp_path / "base")
    other = make_tiny_backbone(tmp_path / "other", hidden_size=64)
    make_lora(other, tmp_path / "lora", 1, **FEW)
    with pytest.raises(AdapterError, match="64 inputs and 128 outputs, the backbone's has 128 and"):
        loader_of(base, "OtherForCausalLM").read(str(tmp_path / "lora"))


def test_a_whole_adapter_is_taken(tmp_path):
    base, mix = make_pair(tmp_path, r=[4, 20, 33, 8])
    hosted = loader_of(base, pipelined=True, embeds=True).read(str(mix))
    assert hosted.kind == "mixture" and (hosted.size.pages, hosted.size.columns) == (7, 2)
    assert hosted.experts == [0, 1, 1, 2, 2, 2, 3]
    make_random_adapter(base, tmp_path / "one", num_experts=3, top_k=1, r=16)
    assert loader_of(base).read(str(tmp_path / "one")).experts == [0, 1, 2]
