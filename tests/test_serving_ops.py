"""The ops that a compiled model holds: they find what they need by a layer's name."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ops import DEVICE, OneBank, delta_truth, error, linear_truth, make_problem
from test_layerwise_linear import problem as layer_problem
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, override_forward_context
from vllm_adafuse.kernels.device.epilogues import activate_torch, result_width
from vllm_adafuse.kernels.operands import Norm
from vllm_adafuse.kernels.projection import result_layout
from vllm_adafuse.serving import ops
from vllm_adafuse.serving.ops import NAME_TYPE, named

LAYER = "model.layers.0.mlp.down_proj.adafuse"


def made_known(p, epilogue="", name=LAYER, **options):
    bank = OneBank(p.projection(epilogue, **options), p.step(), name)
    bank.route = SimpleNamespace(adapts=True)
    ops.make_known(bank)
    return bank


def run(op, x, p, bank):
    """An op whose result has a layout of its own."""
    layout = result_layout(bank.shape, bank.strided_out)
    return op(x, p.gates, named(bank.layer_name), *layout)


def context(**layers):
    return ForwardContext(
        no_compile_layers=layers, attn_metadata={}, slot_mapping={},
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
    )  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the schemas and fakes once")
@pytest.mark.parametrize("epilogue", ["", "silu"])
def test_schemas_and_fakes(epilogue):
    p = make_problem(4, 64, [64, 64], 4, 2, 4)
    for in_place in (False, True):
        bank = made_known(p, epilogue, in_place=in_place)
        layout = result_layout(bank.shape, bank.strided_out)
        for op in (ops.projection, ops.page_projection):
            torch.library.opcheck(op, (p.x, p.gates, named(LAYER), *layout))
        assert error(run(ops.projection, p.x, p, bank), linear_truth(p, epilogue)) <= 1e-5
        assert bank.strided_out == (in_place and epilogue == "silu")
    bank = made_known(p, fused=False)
    for op in (ops.deltas, ops.page_deltas):
        torch.library.opcheck(op, (torch.zeros(4, 128), p.x, p.gates, named(LAYER)))
    q = make_problem(4, 64, [64], 4, 2, 4)
    bank = made_known(q, "norm", norm=Norm(torch.ones(64, device=DEVICE), 1e-5))
    arguments = q.x, torch.zeros(4, 64, device=DEVICE), q.gates, named(LAYER)
    torch.library.opcheck(ops.projection_norm, arguments)
    assert error(ops.projection_norm(*arguments)[1], linear_truth(q)) <= 1e-5
    assert bank.projection.norm.eps == 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the schemas and fakes once")
@pytest.mark.parametrize("name, epilogue", [("no-k", ""), ("gate-up", "silu")])
def test_schemas_and_fakes_of_layer_wise_ops(name, epilogue):
    x, p, layer, expected = layer_problem(name, True, epilogue)
    bank = OneBank(p, layer, LAYER)
    ops.make_known(bank)
    layout = (result_width(p.widths, p.epilogue),) * 2
    whole = x, layer.gates, named(LAYER), *layout
    found = ops.layer_projection(*whole)  # torch does not know that gates change
    wanted = activate_torch(expected, epilogue) if epilogue else expected
    assert error(found, wanted) <= 1e-5
    torch.library.opcheck(ops.layer_projection, whole)
    lora_a_out = x @ p.fused_weight[p.size_out :].T
    lora_a_out, logits = lora_a_out[:, : p.columns].contiguous(), lora_a_out[:, p.columns :][:, : p.logits].contiguous()
    decided, shape = (lora_a_out, logits, layer.gates, named(LAYER)), (p.linears, p.lora_b[0].numel())
    assert ops.layer_route(x, *decided, *shape).shape == (len(x), *shape)
    torch.library.opcheck(ops.layer_route, (x, *decided, *shape))
    torch.library.opcheck(ops.layer_deltas, (x.new_zeros(len(x), p.size_out), *decided))
    assert bank.step is layer


def test_layer_wise_ops_inside_torch_compile():
    x, p, layer, expected = layer_problem("qkv", False)
    bank = OneBank(p, layer, LAYER)
    ops.make_known(bank)
    w, *rows = p.fused_weight.split([p.size_out, p.columns, p.logits, 3])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x):
        y = F.linear(x * 1.0, w)
        ops.layer_deltas(y, x @ rows[0].T, x @ rows[1].T, layer.gates, named(LAYER))
        width = p.size_out
        return ops.layer_projection(x * 1.0, layer.gates, named(LAYER), width, width) * 1.0, y

    for found in f(x):
        assert error(found, expected.to(found.device)) <= 1e-5
    assert bank.layer_name == LAYER


@pytest.mark.parametrize("tokens", [4, 65, 300])
def test_inside_torch_compile(tokens):
    p = make_problem(tokens, 64, [64], 4, 2, 4)
    whole, added = (made_known(p, "", name, fused=fused) for name, fused in (("w", 1), ("a", 0)))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x, y):
        out = y * 1.0
        ops.deltas(out, x * 2.0, p.gates, named("a"))
        return run(ops.projection, x * 2.0, p, whole) + 1.0, out

    y = torch.randn(tokens, 64, device=DEVICE)
    found, out = f(p.x * 0.5, y)
    assert error(found - 1.0, linear_truth(p)) <= 1e-5 and whole and added
    assert error(out.double() - y.double(), delta_truth(p)) <= 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="Inductor's checks of layouts, once")
def test_compiled_down_reads_rows_with_gaps():
    up, down = make_problem(7, 64, [32, 32], 2, 1, 8), make_problem(7, 32, [64], 2, 1, 8)
    kept = made_known(up, "silu", "up", in_place=True), made_known(down, "", "down")
    first, second = kept
    compiled = torch.compile(
        lambda x: run(
            ops.projection, run(ops.projection, x * 2.0, up, first), down, second
        ) + 1.0,
        fullgraph=True, dynamic=True,
    )  # fmt: skip
    down.x = run(ops.projection, up.x, up, first)
    assert down.x.stride() == (96, 1)
    assert error(compiled(up.x * 0.5) - 1.0, linear_truth(down)) <= 1e-5


def test_a_forward_has_layers_of_its_own():
    """Two models of one process have layers of one name."""
    problems = [make_problem(3, 64, [64], 4, 2, 4, seed=seed) for seed in (1, 2)]
    banks = [made_known(p) for p in problems]
    for p, bank in zip(problems, banks):
        with override_forward_context(context(**{LAYER: bank})):
            assert error(run(ops.projection, p.x, p, bank), linear_truth(p)) <= 1e-5
    with override_forward_context(context()):
        with pytest.raises(RuntimeError, match=f"no layer {LAYER}"):
            run(ops.projection, p.x, p, bank)
    with pytest.raises(RuntimeError, match="no layer other is known"):
        ops.projection(p.x, p.gates, named("other"), 64, 64)


@pytest.mark.skipif(NAME_TYPE == "str", reason="this vLLM has no type for names")
def test_layers_of_a_kind_have_one_graph():
    """So vLLM compiles one of them: nothing in the graph of a layer says which one it is."""
    graphs, p = [], make_problem(3, 64, [64], 4, 2, 4)

    def note(graph, inputs):
        graphs.append(graph.code)
        return graph

    for name in ("model.layers.0", "model.layers.11"):
        norm = Norm(torch.ones(64, device=DEVICE), 1e-5)
        bank, normed = made_known(p, "", name), made_known(p, "norm", f"{name}.o", norm=norm)

        def layer(x, bank=bank, normed=normed):
            y = run(ops.projection, x, p, bank)
            z = ops.projection_norm(x, y, p.gates, named(normed.layer_name))[1] + 1.0
            ops.deltas(z, x, p.gates, named(bank.layer_name))
            return run(ops.page_projection, z, p, bank)

        torch._dynamo.reset()
        torch.compile(layer, fullgraph=True, backend=note)(p.x)
    assert graphs[0] == graphs[1]


def test_an_engine_has_one_layer_of_a_name():
    p = make_problem(3, 64, [64], 4, 2, 4)
    known: dict = {}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=known))
    first, second = (OneBank(p.projection(), p.step(), LAYER) for _ in range(2))
    ops.make_known(first, config)
    ops.make_known(first, config)
    assert known == {LAYER: first}
    with pytest.raises(ValueError, match=f"two layers are called {LAYER}"):
        ops.make_known(second, config)


def test_steps_without_adapters_are_left_alone():
    p = make_problem(5, 64, [32, 16, 16], 6, 2, 16)
    bank = made_known(p, fused=False)
    y = torch.randn(5, 64, device=DEVICE)
    before = y.clone()
    bank.route.adapts = False
    ops.page_deltas(y, p.x, p.gates, named(LAYER))
    assert torch.equal(y, before)
    bank.route.adapts = True
    ops.page_deltas(y, p.x, p.gates, named(LAYER))
    assert error(y.double() - before.double(), delta_truth(p)) <= 1e-5
