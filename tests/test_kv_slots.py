"""Keys and values in the pages of a KV cache: what kernels leave there, against float64."""


import pytest
import torch
from ops import (
    DEVICE,
    error,
    in_whole_numbers,
    linear_truth,
    make_problem,
    whole_turns,
)
from vllm_adafuse.kernels.configs import ExpandConfig, GemmConfig
from vllm_adafuse.kernels.decode_gemm import decode_gemm_triton
from vllm_adafuse.kernels.device.epilogues import rotate_torch
from vllm_adafuse.kernels.expand import expand_raw_triton
from vllm_adafuse.kernels.kv_slots import KVSlots, kv_slots_torch
from vllm_adafuse.kernels.projection import projection
from vllm_adafuse.kernels.tma_expand import tma_expand_triton
from vllm_adafuse.kernels.tma_gemm import tma_gemm_triton

UNTOUCHED = 1024.0  # which no result is
BLOCK = 16
# From [blocks, heads, block, 2 D], vLLM's names of dimensions, to an order of memory and back.
LAYOUTS = {"NHD": (0, 2, 1, 3), "HND": (0, 1, 2, 3)}


def make_pages(tokens, heads, head_dim, dtype=torch.float32, layout="NHD", seed=0) -> KVSlots:
    """Pages for tokens at random places; every fourth token has none."""
    g = torch.Generator().manual_seed(seed)
    blocks = tokens // BLOCK + 2
    order = LAYOUTS[layout]
    shape = blocks, heads, BLOCK, 2 * head_dim
    memory = torch.full([shape[i] for i in order], UNTOUCHED, dtype=dtype, device=DEVICE)
    slots = torch.randperm(blocks * BLOCK, generator=g)[:tokens]
    slots[3::4] = -1
    # Both orders are their own inverses.
    keys, values = memory.permute(order).transpose(1, 2).split(head_dim, -1)
    return KVSlots.of(keys, values, slots.to(DEVICE))


def wanted(truth, pages, widths) -> KVSlots:
    """What is to stand in pages that are untouched elsewhere, in float64."""
    keys = torch.full(pages.keys.shape, UNTOUCHED, dtype=torch.float64, device=DEVICE)
    want = KVSlots.of(keys, keys.clone(), pages.slots)
    for t, slot in enumerate(pages.slots.tolist()):
        if slot >= 0:
            _, k, v = truth[t].split(list(widths))
            place = slot // BLOCK, slot % BLOCK
            want.keys[place] = k.view(keys.shape[2:])
            want.values[place] = v.view(keys.shape[2:])
    return want


def by_stream(p, cos_sin, pages):
    of, config = p.projection("rotary", cos_sin), GemmConfig(16, 32)
    return decode_gemm_triton(p.x, of, p.step(cos_sin), config, kv_slots=pages)


def by_tiles(p, cos_sin, pages):
    of, config = p.projection("rotary", cos_sin), GemmConfig(16, 32, shrink_split_k=2)
    return tma_gemm_triton(p.x, of, p.step(cos_sin), config, kv_slots=pages)


def products(p):
    x = p.x.double()
    y, s = x @ p.weight.double().T, x @ p.lora_a.flatten(0, 2).double().T
    return y.to(p.x.dtype), s.to(p.x.dtype)


def by_expand(p, cos_sin, pages, config=None):
    of = p.projection("rotary", cos_sin)
    return expand_raw_triton(*products(p), p.bias, of, p.step(cos_sin), config, pages)


def by_long_expand(p, cos_sin, pages):
    return by_expand(p, cos_sin, pages, ExpandConfig(16, 16, 4, 4, 2))


def by_tma_expand(p, cos_sin, pages):
    of, config = p.projection("rotary", cos_sin), ExpandConfig(16, 32, 2, 4, 2)
    return tma_expand_triton(*products(p), of, p.step(cos_sin), config, pages)


def by_op(p, cos_sin, pages):
    return projection(p.x, p.projection("rotary", cos_sin), p.step(cos_sin), pages)


ANY = [by_stream, by_tiles, by_expand, by_long_expand, by_op]
WHOLE = [by_tma_expand]  # every part has experts, no bias
HALF_DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def check(run, tokens, widths, head_dim, layout, dtype=torch.float32, adapted=(0, 1, 2), rank=4):
    rank = 16 if run in WHOLE else rank
    p = make_problem(
        tokens, 48, widths, 4, 2, rank, dtype=dtype, adapted=list(adapted), bias=run not in WHOLE
    )
    g = torch.Generator().manual_seed(1)
    cos_sin = torch.randn(tokens + 2, head_dim, generator=g).to(DEVICE, dtype)
    rotated = widths[0] + widths[1]
    truth = rotate_torch(linear_truth(p), cos_sin.double(), rotated)
    limit = 1e-5
    if dtype != torch.float32:
        limit = 1.2 * error(rotate_torch(linear_truth(p, dtype=dtype), cos_sin, rotated), truth)
    pages = make_pages(tokens, widths[1] // head_dim, head_dim, dtype, layout)
    out = run(p, cos_sin, pages)
    want = wanted(truth, pages, widths)
    assert error(out[:, : widths[0]], truth[:, : widths[0]]) <= limit
    for have, expected in ((pages.keys, want.keys), (pages.values, want.values)):
        there = expected != UNTOUCHED
        assert torch.equal(have != UNTOUCHED, there)
        assert error(have[there], expected[there]) <= limit


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("widths,head_dim", [([128, 64, 64], 64), ([96, 32, 32], 32)])
@pytest.mark.parametrize("run", ANY + WHOLE)
def test_equals_float64(run, widths, head_dim, layout):
    check(run, 21, widths, head_dim, layout)


@pytest.mark.parametrize("adapted", [[0, -1, 1], [-1, 0, -1], [0, 0, 0]])
@pytest.mark.parametrize("run", ANY)
def test_parts_without_experts(run, adapted):
    check(run, 9, [128, 64, 64], 32, "NHD", adapted=adapted)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("run", [run for run in ANY + WHOLE if run is not by_op])
def test_pages_hold_to_the_last_bit_what_the_result_would(run, layout, dtype):
    widths, head_dim = [128, 64, 64], 64
    rank, bias = (16, False) if run in WHOLE else (4, True)
    p = in_whole_numbers(make_problem(21, 48, widths, 4, 2, rank, dtype=dtype, bias=bias))
    cos_sin = whole_turns(23, head_dim, dtype)
    pages, again = (make_pages(21, 1, head_dim, dtype, layout) for _ in range(2))
    out, left = run(p, cos_sin, pages), run(p, cos_sin, None)
    kv_slots_torch(left, again, widths)
    assert torch.equal(again.keys, pages.keys) and torch.equal(again.values, pages.values)
    assert torch.equal(left[:, : widths[0]], out[:, : widths[0]])
    if dtype == torch.float32:
        truth = rotate_torch(linear_truth(p), cos_sin.double(), widths[0] + widths[1])
        assert torch.equal(left.double(), truth)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("run", ANY + WHOLE)
def test_half_precision_is_no_worse_than_plain_torch(run, dtype):
    check(run, 21, [256, 128, 128], 64, "NHD", dtype)


def test_what_has_no_slot_is_written_nowhere():
    pages = make_pages(5, 2, 32)
    pages.slots.fill_(-1)
    p = make_problem(5, 48, [64, 64, 64], 4, 2, 4)
    by_stream(p, torch.randn(5, 32, device=DEVICE), pages)
    assert (pages.keys == UNTOUCHED).all() and (pages.values == UNTOUCHED).all()


def test_keys_and_values_must_be_laid_out_alike():
    pages = make_pages(5, 2, 32)
    with pytest.raises(ValueError, match="the same ones"):
        KVSlots.of(pages.keys, pages.values.contiguous(), pages.slots)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [1, 8, 33, 100, 300, 2500])
def test_every_kernel_that_a_number_of_tokens_selects(tokens, layout):
    check(by_op, tokens, [1024, 256, 256], 64, layout, torch.bfloat16, rank=16)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_slots():
    p = make_problem(8, 512, [256, 128, 128], 4, 2, 8, dtype=torch.bfloat16)
    cos_sin = torch.randn(8, 64, device=DEVICE).bfloat16()
    pages = make_pages(8, 2, 64, torch.bfloat16)
    of, buffers = p.projection("rotary", cos_sin), p.step(cos_sin)

    def step():
        of.semaphore.zero_()
        return decode_gemm_triton(p.x, of, buffers, kv_slots=pages)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for first in (5, 17):
        pages.keys.fill_(UNTOUCHED), pages.values.fill_(UNTOUCHED)
        pages.slots.copy_(torch.arange(first, first + 8)), pages.slots[2].fill_(-1)
        graph.replay()
        written = (pages.keys != UNTOUCHED).flatten(2).any(-1).flatten().nonzero().flatten()
        assert written.tolist() == [s for s in range(first, first + 8) if s != first + 2]
