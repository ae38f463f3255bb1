"""`explain`: the shapes of a served model without a GPU, and the plans that serving asks for."""

from types import SimpleNamespace

import pytest
from cli_fixtures import adapter, base, run  # noqa: F401 (fixtures)
from loras import make_lora
from vllm_adafuse.cli.cmd_explain import ranges
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.explain import Model, device_named, explain, shapes_of, shapes_on_pages
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.kernels.dispatch import plan
from vllm_adafuse.kernels.plans import DECODE_GEMM, SHRINK, TMA_EXPAND, TMA_GEMM, Shape
from vllm_adafuse.tiny import tiny_config

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def seven_b(name="LlamaForCausalLM", modules=MODULES, **changed):
    """Backbone, Model, and an adapter of 8 experts of rank 16 on all layers."""
    config = tiny_config(
        name, hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, num_hidden_layers=2, **changed,
    )  # fmt: skip
    backbone, model = Backbone.from_hf_config(config, "a 7B"), Model.of(config)
    on = [n for n in backbone.linears if n.rsplit(".", 1)[1] in modules]
    mixture = SimpleNamespace(num_experts=8, rank=16)
    return backbone, model, SimpleNamespace(projections=on, config=mixture)


def found(*given, ranks=1):
    return {name: shape for layer, name, shape in shapes_of(*given, ranks) if layer == 1}


def test_projections_are_packed_and_followed_as_they_are_served():
    backbone, model, on = seven_b()
    model = Model("silu", 128, 32, 32)
    qkv = Shape(4096, (4096,) * 3, (0, 1, 2), 8, 16, 2, "rotary", 128)
    assert found(backbone, model, on) == {
        "self_attn.qkv_proj": qkv,
        "self_attn.o_proj": Shape(4096, (4096,), (0,), 8, 16, 2, "norm"),
        "mlp.gate_up_proj": Shape(4096, (11008, 11008), (0, 1), 8, 16, 2, "silu"),
        "mlp.down_proj": Shape(11008, (4096,), (0,), 8, 16, 2, "norm"),
    }
    halves = found(backbone, model, on, ranks=2)
    assert halves["self_attn.qkv_proj"].widths == (2048,) * 3
    assert halves["mlp.down_proj"] == Shape(5504, (4096,), (0,), 8, 16, 2)
    with pytest.raises(AdapterError, match="expected a multiple of 7 ranks"):
        found(backbone, model, on, ranks=7)


@pytest.mark.parametrize(
    "name, follows, biased",
    [
        ("Qwen2ForCausalLM", ("rotary", "norm", "silu"), True),
        ("Qwen3ForCausalLM", ("", "norm", "silu"), False),
        ("Gemma2ForCausalLM", ("rotary", "", "gelu_tanh"), False),
        ("Phi3ForCausalLM", ("rotary", "norm", "silu"), False),
    ],
)
def test_families(name, follows, biased):
    modules = [*MODULES, "qkv_proj", "gate_up_proj"]
    shapes = found(*seven_b(name, modules))
    assert tuple(s.epilogue for s in shapes.values())[:3] == follows
    assert shapes["self_attn.qkv_proj"].has_bias == biased
    one = name == "Phi3ForCausalLM"
    assert shapes["self_attn.qkv_proj"].adapted == ((0,) * 3 if one else (0, 1, 2))


def test_linears_without_experts_and_quantised_ones():
    backbone, model, on = seven_b(modules=["q_proj", "v_proj", "down_proj"])
    shapes = found(backbone, model, on)
    assert shapes["self_attn.qkv_proj"].adapted == (0, -1, 1)
    assert set(shapes) == {"self_attn.qkv_proj", "mlp.down_proj"}
    quantised = Model("silu", 128, 32, 32, quantised=True)
    down = found(backbone, quantised, on)["mlp.down_proj"]
    assert not down.fused and not down.epilogue
    assert plan(down, 40, device_named("NVIDIA H200")).kernel == SHRINK


@pytest.mark.parametrize(
    "tokens, kernel, expand",
    [(1, DECODE_GEMM, "none"), (40, TMA_GEMM, "none"), (9000, "cublas", TMA_EXPAND)],
)
def test_plans_are_those_of_serving(tokens, kernel, expand):
    backbone, _, on = seven_b()
    device, model = device_named("NVIDIA H200"), Model("silu", 128, 32, 32)
    lines = explain(shapes_of(backbone, model, on), tokens, device)
    assert [line.layers for line in lines] == [(0, 1)] * 4
    qkv = lines[0]
    assert qkv.plan == plan(qkv.shape, tokens, device)
    assert (qkv.plan.kernel, qkv.plan.expand) == (kernel, expand)


def test_pages_are_experts_of_all_linears():
    backbone, model, on = seven_b(modules=["q_proj"])
    assert set(found(backbone, model, on)) == {"self_attn.qkv_proj"}
    shapes = {name: s for _, name, s in shapes_on_pages(backbone, model, 9, 2)}
    assert len(shapes) == 4 and shapes["self_attn.qkv_proj"].adapted == (0, 1, 2)
    assert {(s.num_experts, s.rank) for s in shapes.values()} == {(9, 16)}
    assert all(s.tile_blocks for s in shapes.values())
    assert not any(s.tile_blocks for *_, s in shapes_on_pages(backbone, model, 8))
    assert not any(s.fp8 for s in shapes.values())
    assert all(s.fp8 for *_, s in shapes_on_pages(backbone, model, 9, fp8=True))


def test_devices_and_layers_by_name():
    assert device_named("NVIDIA H100 80GB HBM3").hopper and device_named("NVIDIA B200").hopper
    assert not device_named("NVIDIA A100-SXM4-80GB").hopper
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8" and ranges((3,)) == "3"


def test_the_command(base, adapter, capsys):
    options = "--tokens", 40, "--device", "NVIDIA H200"
    code, out, err = run(capsys, "explain", base, adapter, *options)
    assert code == 0, err
    first, head, *rows = out.splitlines()
    assert first == "40 tokens, NVIDIA H200, 4 experts" and head.split()[0] == "layers"
    assert [row.split()[:3] for row in rows] == [
        ["0,2", "self_attn.qkv_proj", "rotary"], ["0,2", "mlp.gate_up_proj", "silu"],
    ]  # fmt: skip
    code, _, err = run(capsys, "explain", base, adapter, "--tokens", 0, "--device", "x")
    assert code == 1 and "--tokens is 0, expected a number from 1 to" in err


@pytest.fixture(scope="module")
def lora(base, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("lora")
    make_lora(base, path, 0, r=24, target_modules=["q_proj"])
    return path


def test_many_adapters_lie_on_pages(base, adapter, lora, capsys):  # noqa: F811
    device = "--device", "NVIDIA H200"
    code, out, err = run(capsys, "explain", base, adapter, lora, "--max-lora-rank", 32, *device)
    assert code == 0, err
    first, _, *rows = out.splitlines()
    pages = "4 pages of 16 ranks; steps without adapters take cuBLAS"
    assert first == f"1 tokens, NVIDIA H200, {pages}"
    assert [row.split()[:3] for row in rows] == [
        ["0-2", "self_attn.qkv_proj", "rotary"], ["0-2", "self_attn.o_proj", "norm"],
        ["0-2", "mlp.gate_up_proj", "silu"], ["0-2", "mlp.down_proj", "norm"],
    ]  # fmt: skip
    code, out, err = run(capsys, "explain", base, lora, "--lora-dtype", "fp8", "--max-lora-rank", 24,
                         "--tokens", 100, *device)  # fmt: skip
    assert code == 0 and out.startswith("100 tokens, NVIDIA H200, 2 pages of 16 ranks in fp8; "), err
    assert out.count("fp8_shrink of A, cublas of W") == 4
    code, out, err = run(capsys, "explain", base, lora, "--max-loras", 3, *device)
    assert code == 0 and "3 pages of 16 ranks" in out, err
    code, _, err = run(capsys, "explain", base, adapter, lora, *device)
    assert code == 1 and f"adapter {adapter}" in err and "takes 4 pages of 16 ranks" in err
    code, _, err = run(capsys, "explain", base, lora, "--max-loras", 0, *device)
    assert code == 1 and "--max-loras is 0, expected a number from 1 to" in err
