"""Tuning: the products of a model, candidates that fit, the best one kept, and its command."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig
from vllm_adafuse import tuning
from vllm_adafuse.cli import cmd_tune
from vllm_adafuse.cli.main import main
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.explain import Model
from vllm_adafuse.format.architectures import ARCHITECTURES
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.kernels.configs import GemmConfig, configs_file
from vllm_adafuse.kernels.dispatch import default_config, serves
from vllm_adafuse.kernels.plans import Shape
from vllm_adafuse.tiny import make_tiny_backbone, tiny_config
from vllm_adafuse.tuning import Product, Trial, TuningJob, candidates, products_of, tune


def product(name, size_in, widths, epilogue="", head_dim=0, experts=8, rank=16, **more):
    itemsize = more.pop("itemsize", 2)
    adapted = tuple(range(len(widths)))
    shape = Shape(size_in, widths, adapted, experts, rank, itemsize, epilogue, head_dim)
    return Product(name, shape, **more)


SEVEN_B = [
    product("qkv", 4096, (4096, 4096, 4096)),
    product("qkv", 4096, (4096, 1024, 1024), "rotary", 128, behind_norm=True),
    product("o", 4096, (4096,), "norm"),
    product("gate_up", 4096, (11008, 11008), "silu", behind_norm=True),
    product("down", 11008, (4096,), "norm"),
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_are_packed_as_vllm_packs_them(name):
    config = tiny_config(name)
    backbone = Backbone.from_hf_config(config, name)
    found = {p.name: p.shape for p in products_of(backbone, Model.of(config), 8, 16, ranks=2)}
    hidden, inter = config.hidden_size, config.intermediate_size
    assert found.keys() == {"qkv", "o", "gate_up", "down"}
    assert found["gate_up"].widths == (inter // 2, inter // 2)
    assert found["gate_up"].epilogue == ("gelu_tanh" if "Gemma" in name else "silu")
    assert found["down"] == Shape(inter // 2, (hidden,), (0,), 8, 16)
    assert found["qkv"].size_in == hidden
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    assert found["qkv"].size_out == heads * config.head_dim // 2
    turned = name != "Qwen3ForCausalLM"
    epilogue = ("rotary", 32) if turned else ("", 0)
    assert (found["qkv"].epilogue, found["qkv"].head_dim) == epilogue
    assert found["qkv"].tiled_rows == found["qkv"].size_out // (2 if turned else 1)


LLAMA = Model.of(tiny_config("LlamaForCausalLM"))


def test_widths_that_cannot_be_shared_out_are_refused():
    backbone = Backbone.from_hf_config(tiny_config("LlamaForCausalLM"), "tiny")
    with pytest.raises(AdapterError, match="expected a multiple of 7 ranks"):
        products_of(backbone, LLAMA, 8, 16, ranks=7)


@pytest.mark.parametrize("product", SEVEN_B, ids=lambda p: p.name + p.shape.epilogue)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("tokens", [1, 32, 128])
def test_candidates_are_many_but_not_too_many_and_begin_with_the_default(product, tokens, tma):
    configs = list(candidates(product, tokens, tma=tma))
    s = product.shape
    assert configs[0] == default_config(tokens, s.size_in, s.tiled_rows, s.epilogue, 2, tma)
    assert len(set(configs)) == len(configs) <= 70
    assert len(configs) >= (5 if tma or tokens <= 32 else 1)
    assert tokens <= 32 or None in configs
    assert all(config is None or serves(config, tokens, tma) for config in configs)
    assert s.epilogue in ("", "norm") or all(c is None or c.split_k == 1 for c in configs)


def test_products_stand_before_norms_or_behind_them():
    backbone = Backbone.from_hf_config(tiny_config("LlamaForCausalLM"), "tiny")
    found = {p.name: p for p in products_of(backbone, LLAMA, 8, 16)}
    norms = [p.shape.epilogue == "norm" for p in found.values()]
    assert norms == [name in ("o", "down") for name in found]
    assert [p.behind_norm for p in found.values()] == [not norm for norm in norms]


def test_the_norm_in_front_is_part_of_a_trial(monkeypatch):
    norms = []
    norm = tuning.add_norm_triton
    monkeypatch.setattr(
        tuning, "add_norm_triton", lambda *args: norms.append(1) or norm(*args)
    )
    for behind_norm in (False, True):
        one = product("gate_up", 64, (64, 64), "silu", 0, 4, 4, itemsize=4, behind_norm=behind_norm)
        trial = Trial(one, 2, torch.float32, 2, "cpu", 3)
        trial.run(trial.step(3), GemmConfig(16, 64))
        assert len(norms) == 2 * behind_norm


def test_the_fastest_is_kept(monkeypatch):
    one = product("o", 64, (64,), "", 0, 4, 4, itemsize=4)
    configs = [GemmConfig(16, 64), GemmConfig(32, 64), GemmConfig(64, 64)]
    times = iter([[9.0, 8.0, 9.0], [5.0], [7.0]])
    monkeypatch.setattr(tuning, "candidates", lambda product, tokens, tma: iter(configs))
    on_cpu = torch.float32, 1, "cpu"
    monkeypatch.setattr(tuning, "Trial", lambda *a, tokens: Trial(*a, *on_cpu, tokens))

    def timed(function, calls):
        function()
        return next(times)

    monkeypatch.setattr(tuning, "time_us", timed)
    heard = []
    (outcome,) = tune(TuningJob((one,), (3,), 2), heard.append)
    assert outcome.best == (5.0, configs[1]) and outcome.default == 9.0 and sum(heard) == 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(make_tiny_backbone(tmp_path_factory.mktemp("base") / "base"))


def test_the_command_writes_what_it_found(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Test GPU")
    monkeypatch.setattr(tuning, "has_accelerator", lambda: True)
    best = GemmConfig(32, 64, 1, 4, 2)

    def measured(job, device):
        return [
            tuning.Outcome(product, tokens, ((5.0, best if tokens < 64 else None),), 6.0)
            for product in job.products
            for tokens in job.tokens
        ]

    monkeypatch.setattr(cmd_tune, "measured", measured)
    assert main(["tune", base, "--tokens", "1,16,64"]) == 0
    out = capsys.readouterr().out
    content = json.loads(Path(configs_file("Test GPU")).read_text())
    assert "gate_up" in out and "tiles-Test-GPU.json" in out and "32 x 64" in out
    config = AutoConfig.from_pretrained(base)
    key = f"{config.hidden_size}x{config.intermediate_size} silu 2"
    assert content["configs"][key]["16"]["rows"] == 32 and content["configs"][key]["64"] is None
    assert f"{config.intermediate_size}x{config.hidden_size} norm 2" in content["configs"]
    assert content["how"]["us"]["down 1"] == [6.0, 5.0]


@pytest.mark.parametrize(
    "options,said",
    [
        (["--tokens", "1,129"], "--tokens is 129, expected a number from 1 to 128"),
        (["--num-experts", "65"], "--num-experts is 65"),
        (["--top-k", "9"], "--top-k is 9, expected a number from 1 to 8"),
        ([], "no GPU is visible here"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(base, options, said, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", base, *options]) == 1
    assert said in capsys.readouterr().err
