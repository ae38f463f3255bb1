"""Which kernels a model's first forward compiles: all that later steps launch; and that it runs."""

import importlib
import pkgutil
import re

import pytest
import torch
import vllm_adafuse.kernels
from engines import assert_greedy_equals, engine, greedy, load_reference, make_pair
from ops import DEVICE
from test_gpu_engine import GRAPHS, gpu_pair, run_apart
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_adafuse.kernels import blocks, dense_expand, expand, launch, linear_norm, residual_norm
from vllm_adafuse.kernels.ffn_down import ffn_down
from vllm_adafuse.kernels.ffn_mix import ffn_mix
from vllm_adafuse.kernels.gather_routes import gather_routes
from vllm_adafuse.kernels.layer_linear import layer_linear
from vllm_adafuse.kernels.layer_sgmm import layer_sgmm
from vllm_adafuse.kernels.linear import linear
from vllm_adafuse.kernels.order_routes import Order, order_routes
from vllm_adafuse.kernels.paged_cache import Pages, register_source
from vllm_adafuse.kernels.route_layer import LayerGate
from vllm_adafuse.kernels.scratch import Scratch
from vllm_adafuse.kernels.sgmm import sgmm
from vllm_adafuse.kernels.spread_routes import spread_routes
from vllm_adafuse.serving.warm_up import run_parts, token_counts
from vllm_adafuse.tiny import real_prompts

KERNELS = "vllm_adafuse.kernels"
MOST = 16384
CPU = torch.device("cpu")


class Recorder:
    """Stands for a kernel and notes what Triton would compile anew."""

    def __init__(self, kernel, seen: set):
        self.kernel, self.seen, self.fn = kernel, seen, self
        self.plain = set(kernel.kwargs["do_not_specialize"] or ())

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        kinds = [
            None if name in self.plain else self.kind(value)
            for name, value in zip(self.kernel.arg_names, arguments)
        ]
        self.seen.add((self.kernel.__name__, *kinds, *sorted(options.items())))

    @staticmethod
    def kind(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, TensorDescriptor):
            return value.base.dtype, tuple(value.block_shape)
        return (value == 1, value % 16 == 0) if isinstance(value, int) else type(value)


@pytest.fixture
def launched(monkeypatch):
    """The set of launches, on tensors of a GPU that is not there and without their memory."""
    seen: set = set()
    keep_no_kernel()
    monkeypatch.setattr(launch, "_bound", {})
    for info in pkgutil.iter_modules(vllm_adafuse.kernels.__path__):
        module = importlib.import_module(f"{KERNELS}.{info.name}")
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(value, seen))
        if hasattr(module, "_run"):  # else torch would run what is registered for fakes
            monkeypatch.setattr(module, "_op", module._run)
    monkeypatch.setattr(FakeTensor, "is_cuda", True)
    begins = lambda self: self.storage_offset() * self.element_size()  # noqa: E731
    monkeypatch.setattr(FakeTensor, "data_ptr", begins)
    monkeypatch.setattr(blocks, "_is_hopper", lambda device: True)
    monkeypatch.setattr(blocks, "_capability", lambda device: 9)
    with FakeTensorMode():
        yield seen
    keep_no_kernel()


def keep_no_kernel() -> None:
    """Plans hold kernels with their constants."""
    for module in (dense_expand, expand, residual_norm):
        module._plan.cache_clear()


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)


class Paged:
    """A source of pages, in either of vLLM's layouts, as `LayerCache` is for a served layer."""

    def claim(self, tokens, dtype):
        self.turn = not getattr(self, "turn", False)
        shape = (9, 64, 8, 256) if self.turn else (9, 8, 64, 256)
        pages = empty(*shape, dtype=dtype)
        pages = pages if self.turn else pages.transpose(1, 2)
        return Pages.of(*pages.split(128, -1), empty(tokens, dtype=torch.int64))


def one_decision(rank: int):
    """tokens, and whether parts run alone, as warm-up has them: down on rows without gaps -> the
    launches of a step with one decision for all layers."""
    experts, top_k, i32, f32 = 8, 2, torch.int32, torch.float32
    ids, weights = empty(MOST, top_k, dtype=i32), empty(MOST, top_k, dtype=f32)
    gates, present = empty(MOST, experts, dtype=f32), empty(2 + experts, dtype=torch.int64)
    table, counters = empty(32000, top_k, dtype=i32), empty(9, 4, dtype=i32)
    table_weights = empty(32000, top_k, dtype=f32)
    scratch = Scratch.make(1 << 30, 1 << 30, 1 << 20, CPU)
    order = Order.make(MOST, experts, rank, CPU)
    banks = gates, present, counters
    source = Paged()
    register_source("paged", source)

    def run(tokens: int, alone: bool = False) -> None:
        assert source  # which is known while it lives
        gather_routes(empty(tokens, dtype=i32), table, table_weights, ids, weights)
        spread_routes(ids, weights, gates, present, counters, tokens)
        order_routes(ids, order, tokens, experts)
        for widths, act in (([4096, 1024, 1024], "rotary"), ([11008] * 2, "silu"), ([4096], "")):
            parts = list(range(len(widths)))
            joint = empty(sum(widths) + len(widths) * experts * rank, 4096)
            b, cos_sin = empty(sum(widths), experts, rank), empty(MOST, 128)
            x = empty(tokens, 4096)
            for cache in ("", "paged") if act == "rotary" else ("",):
                shared = scratch, order, parts, widths, act, cos_sin, cache
                linear(x, joint, None, b, *banks, 0, *shared, in_place=act == "silu")
            a = joint[sum(widths) :].view(len(widths), experts, rank, 4096)
            y = empty(tokens, sum(widths))
            sgmm(y, x, a, b, gates, present, scratch, parts, widths)
        for size_in in (4096, 11008):
            joint, b = empty(4096 + experts * rank, size_in), empty(4096, experts, rank)
            x, residual, weight = empty(tokens, size_in), empty(tokens, 4096), empty(4096)
            if size_in == 11008 and not alone:
                x = empty(tokens, 2 * (size_in + experts * rank))[:, :size_in]
            linear_norm.linear_norm(x, joint, residual, weight, 1e-5, b, *banks, 0, scratch)

    return run


def layer_wise(rank: int):
    """tokens -> the launches of projections that are routed in their layers."""
    experts, f32 = 8, torch.float32
    scales, present = empty(experts, dtype=f32), empty(1, dtype=torch.int64)
    widths, parts, columns = [4096, 1024, 1024], [0, 1, 2], 3 * experts * rank
    gates, block = empty(MOST, 3, experts, dtype=f32), empty(MOST, 1, experts, dtype=f32)
    rule, of_block = LayerGate(2, (experts,) * 3), LayerGate(2, (experts,), plain=True)

    def run(tokens: int, alone: bool = False) -> None:
        x, b = empty(tokens, 4096), empty(sum(widths), experts, rank)
        joint = empty(sum(widths) + columns + 3 * experts + 8, 4096)
        shared = None, scales, gates, present, b, parts, widths
        layer_linear(x, joint, columns, 3 * experts, None, *shared, "", rule)
        low, z = empty(tokens, columns, dtype=f32), empty(tokens, 3 * experts, dtype=f32)
        layer_sgmm(empty(tokens, sum(widths)), low, z, *shared, rule)
        layer_sgmm(empty(tokens, 4096), low[:, : columns // 3], z[:, :experts], None, scales, block,
                   present, b[:4096], [0], [4096], of_block)  # fmt: skip
        both = empty(tokens, 2 * 11008 + 2 * experts * rank)
        up = empty(2 * 11008, experts, rank)
        ffn_mix(both, block, up, [0, 1], 11008, 2, "silu")
        low = empty(3 * tokens, experts * rank, dtype=f32)
        ffn_down(
            empty(tokens, 4096), low, block, scales, present, empty(4096, experts, rank), 0, False
        )

    return run


@pytest.mark.skipif(DEVICE == "cuda", reason="counts launches once")
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("step", [one_decision, layer_wise])
def test_every_launch_of_any_step_is_among_those_of_the_counts(step, rank, launched):
    run = step(rank)
    for tokens in token_counts(MOST):
        run(tokens, alone=True)
    warmed = set(launched)
    assert len(warmed) > 10
    for tokens in [*range(1, 70), *range(70, 1100, 23), *range(1100, MOST, 1021)]:
        run(tokens)
        assert launched == warmed, (tokens, launched - warmed)


def test_counts_end_with_the_largest_step():
    assert token_counts(1) == [1]
    assert token_counts(100)[:3] == [100, 96, 65] and token_counts(100)[-3:] == [3, 2, 1]
    assert len(token_counts(MOST)) < 60


# The adapter, and its kinds of parts.
ADAPTERS = {
    "one decision": ({}, 4),
    "MixLoRA": ({"routing": "layer_wise", "router_scope": "block", "mix": "ffn_output"}, 3),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="engines there are in other processes")
@pytest.mark.parametrize("name", ADAPTERS)
def test_parts_of_a_served_model_run_alone_and_leave_no_trace(name, tmp_path):
    options, kinds = ADAPTERS[name]
    base, adapter = make_pair(tmp_path, **options)

    def warm(model) -> int:
        ids = torch.zeros(1, dtype=torch.int32)
        return run_parts(model.model, [40, 3, 1], lambda tokens: model.route_any(tokens, ids))

    with engine(base, adapter) as llm:
        assert llm.apply_model(warm) == [kinds]
        outputs = llm.generate(real_prompts(6), greedy(), use_tqdm=False)
    assert_greedy_equals(outputs, load_reference(base, adapter))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ADAPTERS)
def test_no_request_waits_for_the_compiler(name, tmp_path):
    base, adapter = gpu_pair(tmp_path, **ADAPTERS[name][0])
    # An empty cache: what is not compiled before the first request is compiled after it.
    _, log = run_apart(base, adapter, GRAPHS, TRITON_CACHE_DIR=str(tmp_path / "triton"))
    assert "AdaFuse: kernels of" in log
    modules = [info.name for info in pkgutil.iter_modules(vllm_adafuse.kernels.__path__)]
    ours = {n for m in modules for n in vars(importlib.import_module(f"{KERNELS}.{m}"))}
    late = set(re.findall(r"JIT compilation during inference: (\w+)", log))
    assert late & ours == set()
