"""Who writes the KV cache: the projection where it is certain to be right, or vLLM's update."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from ops import DEVICE, OneBank, in_whole_numbers, make_problem, whole_turns
from vllm.config import CUDAGraphMode
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import unified_kv_cache_update
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm_adafuse.kernels import projection
from vllm_adafuse.serving import kv_cache, ops
from vllm_adafuse.serving.kv_cache import can_write
from vllm_adafuse.serving.wrap.hooks import take_cache

NAME, HEADS, SIZE, TOKENS, BLOCK = "model.layers.0.self_attn.attn", 2, 32, 5, 16


class OtherImpl(FlashAttentionImpl):
    pass


class OtherAttention(Attention):
    pass


def make_attention(kind=Attention, impl_kind=FlashAttentionImpl, impl=None, **attributes):
    """vLLM's attention layer without a GPU, and its updates in `updates`."""
    own = object.__new__(impl_kind)
    updates = []
    own.__dict__ |= {
        "attn_type": AttentionType.DECODER, "dcp_world_size": 1, "pcp_world_size": 1,
        "do_kv_cache_update": lambda *arguments: updates.append(arguments), **(impl or {}),
    }  # fmt: skip
    attention = kind.__new__(kind)
    torch.nn.Module.__init__(attention)
    defaults = {
        "impl": own, "attn_backend": FlashAttentionBackend, "attn_type": AttentionType.DECODER,
        "kv_sharing_target_layer_name": None, "kv_cache_dtype": "auto", "head_size": SIZE,
        "head_size_v": SIZE, "num_kv_heads": HEADS, "layer_name": NAME, "updates": updates,
        "kv_cache": make_cache(),
    }  # fmt: skip
    for name, value in (defaults | attributes).items():
        setattr(attention, name, value)
    return attention


def make_cache(dtype=torch.float32, heads=HEADS):
    """[blocks, heads, block, 2 D] as vLLM's layout NHD has it in memory."""
    return torch.zeros(3, BLOCK, heads, 2 * SIZE, dtype=dtype, device=DEVICE).transpose(1, 2)


def make_context(attention, **fields):
    defaults = {
        "no_compile_layers": {NAME: attention}, "attn_metadata": {NAME: object()},
        "slot_mapping": {NAME: torch.arange(TOKENS, device=DEVICE)},
    }  # fmt: skip
    return ForwardContext(**defaults | fields)


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    monkeypatch.setattr(kv_cache, "current_platform", SimpleNamespace(is_cuda=lambda: True))


REFUSED = {
    "another kind of attention": {"kind": OtherAttention},
    "another backend": {"impl_kind": OtherImpl},
    "an encoder": {"attn_type": AttentionType.ENCODER_ONLY},
    "an encoder's backend": {"impl": {"attn_type": AttentionType.ENCODER}},
    "a cache of another layer": {"kv_sharing_target_layer_name": "model.layers.1.attn"},
    "scales": {"kv_cache_dtype": "fp8"},
    "scales to be found": {"calculate_kv_scales": True},
    "other sizes of values": {"head_size_v": 16},
    "decode context parallelism": {"impl": {"dcp_world_size": 2}},
    "prefill context parallelism": {"impl": {"pcp_world_size": 2}},
    "an update within attention": {
        "attn_backend": SimpleNamespace(forward_includes_kv_cache_update=True)
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_layer_must_be(name):
    assert can_write(make_attention()) and not can_write(make_attention(**REFUSED[name]))
    assert not can_write(None)


@pytest.mark.parametrize("name", ["scales", "another kind of attention"])
def test_a_layer_that_is_another_keeps_its_update(name):
    attention = make_attention(**REFUSED[name])
    update = attention.impl.do_kv_cache_update
    assert take_cache(attention) is None and attention.impl.do_kv_cache_update is update


def test_other_devices_are_left_alone(monkeypatch):
    monkeypatch.setattr(kv_cache, "current_platform", SimpleNamespace(is_cuda=lambda: False))
    assert not can_write(make_attention())


def update(attention):
    """vLLM's own op, run for keys of the step."""
    key = torch.zeros(TOKENS, HEADS, SIZE, device=DEVICE)
    unified_kv_cache_update(key, key, NAME)


def slots(*shape, dtype=torch.int64):
    return {"slot_mapping": {NAME: torch.zeros(*shape, dtype=dtype, device=DEVICE)}}


# Fields of the forward context; or the layer's cache.
LEFT = {
    "a piecewise graph": {"cudagraph_runtime_mode": CUDAGraphMode.PIECEWISE},
    "a profile run": {"attn_metadata": None},
    "metadata of adapted": {"attn_metadata": [{NAME: object()}]},
    "metadata of other layers": {"attn_metadata": {}},
    "a step in parts": {"ubatch_slices": [slice(0, 2), slice(2, 5)]},
    "fewer slots": slots(TOKENS - 1),
    "more slots": slots(TOKENS + 3),
    "slots of another type": slots(TOKENS, dtype=torch.int32),
    "slots with gaps": {"slot_mapping": {NAME: torch.zeros(2 * TOKENS, dtype=torch.int64)[::2]}},
    "no cache yet": torch.tensor([]),
    "a cache of another type": make_cache(torch.bfloat16),
    "a cache of other heads": make_cache(heads=4),
    "a cache of two halves": torch.zeros(2, 3, BLOCK, HEADS, SIZE),
    "a cache of odd rows": torch.zeros(3, HEADS, BLOCK, 2 * SIZE + 8)[..., : 2 * SIZE],
    "columns with gaps": torch.zeros(3, HEADS, BLOCK, 4 * SIZE)[..., ::2],
}


@pytest.mark.parametrize("name", LEFT)
def test_when_vllm_updates_the_cache(name):
    attention = make_attention()
    cache, odd = take_cache(attention), LEFT[name]
    if isinstance(odd, torch.Tensor):
        attention.kv_cache, odd = odd, {}
    with override_forward_context(make_context(attention, **odd)):
        assert cache.claim(TOKENS, torch.float32) is None
        attention.impl.do_kv_cache_update(attention, None, None, None, None)
    assert len(attention.updates) == 1 and cache.claims == 0


def test_without_a_forward_nothing_is_claimed():
    assert take_cache(make_attention()).claim(TOKENS, torch.float32) is None


def test_another_models_layer_of_the_same_name_is_left_alone():
    cache, other = take_cache(make_attention()), make_attention()
    with override_forward_context(make_context(other)):
        assert cache.claim(TOKENS, torch.float32) is None


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.FULL])
def test_a_claim_stands_for_one_update_of_its_forward(mode):
    attention = make_attention()
    cache = take_cache(attention)
    context = make_context(attention, cudagraph_runtime_mode=mode)
    with override_forward_context(context):
        pages = cache.claim(TOKENS, torch.float32)
        assert pages.slots is context.slot_mapping[NAME] and pages.block_size == BLOCK
        assert pages.keys.data_ptr() == attention.kv_cache.data_ptr()
        assert pages.values.data_ptr() == attention.kv_cache[..., SIZE:].data_ptr()
        update(attention)
        assert not attention.updates
        update(attention)  # nobody claimed this one
    assert len(attention.updates) == 1 and cache.claims == 1


def test_a_claim_of_a_forward_that_broke_off_is_forgotten():
    attention = make_attention()
    cache = take_cache(attention)
    with override_forward_context(make_context(attention)):
        assert cache.claim(TOKENS, torch.float32)
    # A replayed piecewise graph: the projection is not run in Python, the update is.
    with override_forward_context(make_context(attention)):
        update(attention)
    assert len(attention.updates) == 1


def test_a_cache_that_vllm_gives_up_is_not_kept():
    attention = make_attention()
    cache = take_cache(attention)
    with override_forward_context(make_context(attention)):
        assert cache.claim(TOKENS, torch.float32)
        update(attention)
    held = weakref.ref(attention.kv_cache)
    attention.kv_cache = torch.tensor([])
    gc.collect()
    assert held() is None


def test_rehearsals_get_pages_of_the_same_kind_and_no_step_sees_them():
    attention = make_attention(kv_cache=torch.tensor([]))
    cache = take_cache(attention)
    with cache.rehearsal(7, torch.float16, torch.device(DEVICE)):
        pages = cache.claim(7, torch.float16)
    assert pages.keys.dtype == torch.float16 and (pages.slots == -1).all()
    assert pages.slots.shape == (7,) and not any(stride % 16 for stride in pages[3:])
    assert cache.claim(7, torch.float16) is None
    with override_forward_context(make_context(attention)):
        update(attention)
    assert len(attention.updates) == 1 and cache.claims == 0


def test_a_step_of_the_op_writes_the_cache_that_vllm_would():
    attention = make_attention()
    cache = take_cache(attention)
    p = in_whole_numbers(make_problem(TOKENS, 48, [128, 64, 64], 4, 2, 4, bias=True))
    cos_sin = whole_turns(TOKENS, SIZE)
    mapping = torch.tensor([40, 3, -1, 17, 0], device=DEVICE)
    bank = OneBank(p.projection("rotary", cos_sin), p.step(cos_sin), "layer", cache)

    def step():
        return ops.projection(p.x, p.gates, ops.named("layer"), 256, 256)

    y = projection.projection(p.x, bank.projection, bank.step)
    context = make_context(attention, slot_mapping={NAME: mapping})
    context.no_compile_layers["layer"] = bank
    with override_forward_context(context):
        q = step()[:, :128]
        update(attention)
    assert torch.equal(q, y[:, :128]) and not attention.updates and cache.claims == 1
    want = torch.zeros(3, BLOCK, HEADS, 2 * SIZE, device=DEVICE)
    _, k, v = y.split([128, 64, 64], 1)
    for token, slot in enumerate(mapping.tolist()):
        if slot >= 0:
            rows = k[token].view(HEADS, SIZE), v[token].view(HEADS, SIZE)
            want[slot // BLOCK, slot % BLOCK] = torch.cat(rows, -1)
    assert torch.equal(attention.kv_cache.transpose(1, 2), want)
