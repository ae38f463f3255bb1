"""Broken adapters of format version 2: each is refused with a message that names the fault."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from broken_adapters import add, edit_config, edit_tensors, make_backbones, swap
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import check_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import AdapterConfig, parse_config
from vllm_adafuse.format.random_adapter import make_random_adapter

Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"
MLP = "model.layers.0.mlp"
# Every linear a router; every block one, with parts that are always on; one, above layer 1.
GOOD = {
    "linear": {"routing": "layer_wise", "layer_experts": [2, 4, 4], "router_bias": True},
    "block": {
        "routing": "layer_wise",
        "router_scope": "block",
        "mix": "ffn_output",
        "always_r": 3,
        "always_alpha": 6,
        "r": 4,
    },
    "entrance": {"router_layer": 1},
}


def drop(*names):
    return edit_tensors(lambda tensors: [tensors.pop(name) for name in names])


def only_always(tensors):
    for name in list(tensors):
        if "always" not in name:
            del tensors[name]


def grown_block_router(tensors):
    tensors[f"{MLP}.router.weight"] = torch.zeros(5, 128)


CASES = {
    # Which good adapter, how it is damaged, what the message says.
    "scope": ("linear", edit_config(router__scope="layer"), ("`router.scope`", "'linear', 'bl")),
    "logits": ("linear", edit_config(router__logits="cos"), ("`router.logits`", "'linear', 'abs'")),
    "mix": ("linear", edit_config(mix="output"), ("`mix` is \"output\"", "ffn_output")),
    "shared_A a number": ("linear", edit_config(shared_A=1), ("`shared_A` is 1", "true or false")),
    "shared_A with ranks": ("linear", edit_config(shared_A=True), ("`r` is [4, 2, 4, 4]", "one")),
    "router.input": (
        "linear",
        edit_config(router__input="first_norm"),
        ("`router.input`", '"pre_gated" only', "leave it out"),
    ),
    "router.layer of layers": (
        "linear", edit_config(router__layer=1), ("`router.layer` is 1", '"pre_gated" only')
    ),
    "ffn_output by linear": (
        "linear", edit_config(mix="ffn_output"), ("`mix`", '`router.scope` "block"')
    ),
    "ffn_output, softmax first": (
        "block",
        edit_config(router__weights="softmax_topk"),
        ("`mix`", '`router.weights` "topk_softmax"', "sum to 1"),
    ),
    "always_r alone": (
        "block", edit_config(always_alpha=None), ("`always_r` is 3", "`always_alpha` beside it")
    ),
    "always_r missing": (
        "block",
        edit_config(always_alpha=None, always_r=None),
        ("always_A", "expected `always_r` and `always_alpha`"),
    ),
    "always_r for nothing": (
        "linear",
        edit_config(always_alpha=1, always_r=2),
        ("`always_r` is 2", "no always_A / always_B pair"),
    ),
    "always_r of another size": (
        "block", edit_config(always_r=2), ("always_A", "shape [3, 128]", "expected [2, 128]")
    ),
    "top_k of too few blocks": (
        "block", edit_config(top_k={"mlp": 1}), ("`top_k`", "self_attn and mlp")
    ),
    "top_k of a block above E": (
        "block", edit_config(top_k={"mlp": 1, "self_attn": 5}), ("`top_k`", "num_experts (4)")
    ),
    "top_k of too few layers": (
        "linear", edit_config(top_k=[1, 2]), ("`top_k` has 2 entries", "expected 3")
    ),
    "top_k above a layer's experts": (
        "linear",
        edit_config(top_k=3),
        ("model.layers.0.", "2 rows", "expected at least 3", "`top_k`"),
    ),
    "top_k a list, pre-gated": (
        "entrance", edit_config(top_k=[1, 2, 1]), ("`top_k` is [1, 2, 1]", "expected an integer")
    ),
    "version 1": (
        "linear",
        edit_config(format_version=1),
        ('`routing` is "layer_wise"', "version 1", "`router.scope` belongs to format version 2"),
    ),
    "router.layer in version 1": (
        "entrance", edit_config(format_version=1), ("`router.layer` belongs to format version 2",)
    ),
    "router.layer beyond": (
        "entrance", edit_config(router__layer=3), ("`router.layer` is 3", "expected 0 to 2")
    ),
    "tensors below router.layer": (
        "entrance",
        edit_config(router__layer=2),
        ("model.layers.1.", "below layer 2", "`router.layer`"),
    ),
    "keys of layers, pre-gated": (
        "entrance",
        edit_config(router__scope="block"),
        ("`router.scope`", 'goes with `routing` "layer_wise" only'),
    ),
    "num_experts too large": (
        "block",
        edit_config(num_experts=6, expert_names=None),
        ("`num_experts` is 6", "expected 4", "largest router"),
    ),
    "routers of the other scope": (
        "linear",
        edit_config(router__scope="block"),
        ("down_proj.router.weight", "unknown name", "{block}.router.weight", "scope` block"),
    ),
    "a router at the entrance": (
        "linear", edit_tensors(add("router.weight", 4, 128)), ("router.weight", "unknown name")
    ),
    "a linear without its router": (
        "linear",
        drop(f"{Q}.router.weight", f"{Q}.router.bias"),
        (f"{Q}.lora_A", "has no router", "{block}.{module}.router.weight of its linear"),
    ),
    "a block without its router": (
        "block",
        drop(f"{MLP}.router.weight"),
        (f"{MLP}.down_proj.lora_A", "has no router", "{block}.router.weight of its block"),
    ),
    "a router of nothing": (
        "linear",
        drop(f"{UP}.lora_A", f"{UP}.lora_B"),
        (f"{UP}.router.weight", "serves no expert", "leave it out"),
    ),
    "a bias of no router": (
        "block", edit_tensors(add(f"{Q}.router.bias", 4)), (f"{Q}.router.bias", "unknown name")
    ),
    "a bias alone": (
        "linear",
        drop(f"{Q}.router.weight"),
        (f"{Q}.router.bias", "belongs to no router", f"expected {Q}.router.weight"),
    ),
    "shape of a bias": (
        "linear",
        edit_tensors(swap(f"{Q}.router.bias", lambda t: t[:3])),
        (f"{Q}.router.bias", "shape [3]", "expected [4]"),
    ),
    "shape of a linear's router": (
        "linear",
        edit_tensors(swap(f"{UP}.router.weight", lambda t: t[:, :100])),
        (f"{UP}.router.weight", "[4, 100]", "expected [experts, 128]"),
    ),
    "fewer experts than the router": (
        "linear",
        edit_tensors(swap(f"{Q}.lora_A", lambda t: t[:3])),
        (f"{Q}.lora_A", "shape [3, 4, 128]", "expected [4, 4, 128]"),
    ),
    "more rows than num_experts": (
        "block", edit_tensors(grown_block_router), (f"{MLP}.router.weight", "5 rows", "1 to num")
    ),
    "half of an always-on pair": (
        "block", drop(f"{Q}.always_B"), (f"{Q}.always_A", "half a pair", f"{Q}.always_B")
    ),
    "always on, but no experts": (
        "block", edit_tensors(only_always), ("no tensor but the router's", "at least one lora_A")
    ),
    "A of each expert, but shared": (
        "block", edit_config(shared_A=True), ("lora_A", "[4, 4, 128]", "expected [1, 4, 128]")
    ),
    "NaN in a router": (
        "block",
        edit_tensors(swap(f"{MLP}.router.weight", lambda t: t * float("nan"))),
        (f"{MLP}.router.weight", "NaN", "expected finite"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone():
    with tempfile.TemporaryDirectory(prefix="bad_layer_wise_") as root:
        yield make_backbones(Path(root))["llama"]


@pytest.fixture(scope="module")
def good(backbone):
    options = {"num_experts": 4, "top_k": 2, "r": [4, 2, 4, 4], "dtype": torch.float32}
    return {
        name: make_random_adapter(backbone, backbone.parent / name, **options | own)
        for name, own in GOOD.items()
    }


@pytest.mark.parametrize("name", GOOD)
def test_good_adapters_pass(name, good, backbone):
    adapter, problems = check_adapter(good[name], Backbone.from_path(str(backbone)))
    assert problems == []
    assert check_adapter(good[name])[1] == []
    config = adapter.config
    assert parse_config(config.to_json()) == (config, [])
    assert config.format_version == config.to_json()["format_version"] == 2


@pytest.mark.parametrize("case", CASES)
def test_refused(case, good, backbone, tmp_path, capfd):
    from vllm.engine.arg_utils import EngineArgs
    from vllm_adafuse.cli.main import main

    which, damage, words = CASES[case]
    path = Path(shutil.copytree(good[which], tmp_path / "adapter"))
    assert damage(path) is None
    said = "\n".join(check_adapter(path, Backbone.from_path(str(backbone)))[1])
    assert not [word for word in words if word not in said], said
    assert "Traceback" not in said and said.replace("\n", "").isprintable()
    assert main(["check", str(path), "--base", str(backbone)]) == 1
    printed = "".join("".join(capfd.readouterr()).split())
    assert all("".join(word.split()) in printed for word in words)
    with pytest.raises(ValueError) as caught:  # vLLM's front end, before any weight
        EngineArgs(
            str(backbone), hf_overrides={"adafuse_adapter": str(path)}
        ).create_model_config()
    assert all(word in str(caught.value) for word in words)


def test_a_broken_config_does_not_hide_the_tensors(good, tmp_path):
    path = Path(shutil.copytree(good["linear"], tmp_path / "adapter"))
    edit_config(router__scope="layer")(path)
    edit_tensors(add("extra.weight", 3))(path)
    problems = check_adapter(path)[1]
    assert len(problems) == 2 and "router.scope" in problems[0] and "extra.weight" in problems[1]


def test_version_1_is_written_where_it_says_everything(backbone, tmp_path):
    path = make_random_adapter(backbone, tmp_path / "plain", num_experts=2, top_k=1)
    raw = check_adapter(path)[0].config.to_json()
    assert raw["format_version"] == 1
    assert not [key for key in raw if key in ("router.layer", "router.scope", "mix", "always_r")]


@pytest.mark.parametrize(
    "top_k, expected", [(2, [2, 2]), ({"mlp": 1, "self_attn": 2}, [2, 1]), ([1, 2, 1], [2, 2])]
)
def test_k_of_a_router(top_k, expected, backbone, tmp_path):
    options = {"num_experts": 2, "routing": "layer_wise", "r": 2}
    path = make_random_adapter(backbone, tmp_path / "a", top_k=top_k, **options)
    config: AdapterConfig = check_adapter(path)[0].config
    assert [config.k_of(1, block) for block in ("self_attn", "mlp")] == expected
    assert config.top_k == 2
    raw = config.to_json()["top_k"]
    assert raw == top_k


def test_random_adapter_explains_bad_options(backbone, tmp_path):
    with pytest.raises(AdapterError, match="layer_experts.*expected 3 numbers from 1 to 2"):
        make_random_adapter(backbone, tmp_path / "a", num_experts=2, layer_experts=[1, 3, 2])
    with pytest.raises(AdapterError, match="o_proj is not among the target modules"):
        make_random_adapter(
            backbone, tmp_path / "b", target_modules=["q_proj"], expert_modules=["o_proj"]
        )
