"""Adapters that also have LoRA on a backbone's own experts: those pairs are vLLM's own, beside what
is ours. vLLM's kernels for them run on GPUs alone (`test_gpu_experts.py`); here plain torch stands in
for them, with their slots and their mapping."""

import pytest
import torch
from engines import assert_greedy_equals, completion, engine, greedy
from expert_loras import ATTENTION, QWEN, expert_linears, make_backbone, make_expert_lora
from loras import manager_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.serving import expert_loras, rest
from vllm_adafuse.serving.adapters import open_adapter
from vllm_adafuse.serving.plain_loras import BOTH_LORA, VLLM_LORA
from vllm_adafuse.tiny import real_prompts

PROMPTS = real_prompts(8, words=12)
LORAS = {
    "few": dict.fromkeys(ATTENTION, 8),
    "all": dict.fromkeys([*ATTENTION, *expert_linears(QWEN)], 8),
    # No linear of ours, experts and linears that it leaves alone, ranks of their own.
    "part": dict.fromkeys(expert_linears(QWEN, experts=[1, 3], layers=[1], kinds=[1]), 4)
    | dict.fromkeys(expert_linears(QWEN, experts=[2], layers=[0], kinds=[0]), 7),
}
NAMES = ["base", *LORAS]


def apply(self, *, output, hidden_states, w1, w2, topk_weights, topk_ids, **options):
    """What vLLM's kernels compute of T tokens, each by k experts."""
    lora, ids = self._lora_context, topk_ids.long()
    slots = lora.punica_wrapper.token_lora_indices[: len(hidden_states)][:, None]
    has = (slots >= 0) & lora.adapter_enabled[slots].bool()

    def add(a, b, x):  # [T, k, in]
        low = torch.einsum("tkri,tki->tkr", a[slots, ids], x)
        return torch.einsum("tkor,tkr->tko", b[slots, ids], low) * has[..., None]

    x = hidden_states[:, None].expand(-1, ids.shape[1], -1)
    both = torch.einsum("tkoi,tki->tko", w1[ids], x).chunk(2, -1)
    pairs = zip(lora.w13_lora_a_stacked, lora.w13_lora_b_stacked, strict=True)
    gate, up = (own + add(a, b, x) for own, (a, b) in zip(both, pairs, strict=True))
    x = torch.nn.functional.silu(gate) * up
    y = torch.einsum("tkoi,tki->tko", w2[ids], x)
    y += add(lora.w2_lora_a_stacked[0], lora.w2_lora_b_stacked[0], x)
    output.copy_((topk_weights[..., None] * y).sum(1))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts

    root = tmp_path_factory.mktemp("experts")
    base = make_backbone(root, QWEN)
    references = {"base": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()}
    for seed, (name, ranks) in enumerate(LORAS.items()):
        references[name] = make_expert_lora(base, root / name, seed, ranks)
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 16, "max_cpu_loras": 4}
    options["additional_config"] = {"adafuse": {"lora": "both"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TritonExperts, "apply", apply)
        with engine(base, **options) as llm:
            yield llm, root, references


def check(served, *names, prompts=PROMPTS):
    """One batch; prompts and names in turns."""
    llm, root, references = served
    every = [None, *(LoRARequest(n, i + 1, str(root / n)) for i, n in enumerate(LORAS))]
    named = [every[NAMES.index(names[i % len(names)])] for i in range(len(prompts))]
    outputs = llm.generate(prompts, greedy(4), lora_request=named, use_tqdm=False)
    for i, name in enumerate(names):
        assert_greedy_equals(outputs[i :: len(names)], references[name])
    return outputs


def test_one_batch(served):
    check(served, "base", "all", "part")
    said = [completion(check(served, name, prompts=PROMPTS[:1])[0])[1] for name in NAMES]
    assert len({tuple(logprobs) for logprobs in said}) == len(NAMES)  # every adapter matters


def test_they_come_and_go(served):
    for pair in (("few", "all"), ("part", "few"), ("all", "base"), ("part", "all")):
        check(served, *pair, prompts=PROMPTS[:4])
        manager = manager_of(served[0])
        placed = {a for a in manager.pool.placed if manager.hosted[a].rest is not None}
        assert placed == {a for a in manager.rest._modules.lora_index_to_id if a}


def test_steps_without_such_adapters_are_told_so_once(served, monkeypatch):
    check(served, "all", prompts=PROMPTS[:2])
    check(served, "few", "base", prompts=PROMPTS[:2])
    monkeypatch.setattr(rest._Modules, "map", None)
    check(served, "few", "base")


def test_slots_are_zero_where_an_adapter_has_nothing(served):
    check(served, "all", "part", prompts=PROMPTS[:2])
    manager = manager_of(served[0])
    slot = manager.rest._modules.lora_index_to_id.index(1 + list(LORAS).index("part"))
    first, second = (manager.rest._modules.modules[f"model.layers.{i}.mlp.experts"] for i in (0, 1))
    (gate, up), down = first.w13_lora_b_stacked, first.w2_lora_b_stacked[0]
    used = [tensor[slot].flatten(1).any(1).tolist() for tensor in (gate, up, down)]
    assert used == [[False, False, True, False], [False] * 4, [False] * 4]
    assert second.w2_lora_a_stacked[0][slot].flatten(1).any(1).tolist() == [False, True, False, True]
    assert not second.w13_lora_a_stacked[0][slot].any()
    assert manager.hosted[1 + list(LORAS).index("part")].size.rests == 1


def test_nobody_is_where_kernels_ask_whose_a_token_is(served, monkeypatch):
    """vLLM returns from a mapping of nobody before it writes this."""
    from types import SimpleNamespace

    check(served, "all", prompts=PROMPTS[:1])
    meta = SimpleNamespace(token_lora_mapping=torch.tensor([0, 1, 0]))
    here = manager_of(served[0]).rest
    [wrapper] = here._modules.punica_wrapper_mapping.values()
    monkeypatch.setattr(wrapper, "token_mapping_meta", meta, raising=False)
    here.clear()
    assert meta.token_lora_mapping.tolist() == [-1, -1, -1]


def change(path, rewrite):
    file = path / "adapter_model.safetensors"
    save_file({new: t for k, v in load_file(file).items() for new, t in rewrite(k, v)}, file)


REFUSED = {
    "no such expert": (
        lambda k, v: [(k.replace("experts.3", "experts.4"), v)],
        ["experts.4.down_proj", "takes no adapter of vLLM's beside ours here", VLLM_LORA],
    ),
    "wide": (
        lambda k, v: [(k, v.repeat(1, 2) if "lora_A" in k else v)],
        ["adapts 128 inputs and 128 outputs, the backbone's has 64 and 128"],
    ),
    "together": (
        lambda k, v: [(k, v), (k.replace("experts.3.down_proj", "experts"), v.clone())],
        ["experts.lora_A.weight", "own experts in one tensor", VLLM_LORA],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(served, case, tmp_path):
    rewrite, expected = REFUSED[case]
    linears = expert_linears(QWEN, experts=[3], layers=[1], kinds=[1])
    make_expert_lora(served[1] / "base", tmp_path / "bad", 1, dict.fromkeys(linears, 4))
    change(tmp_path / "bad", rewrite)
    with pytest.raises(AdapterError) as refused:
        served[0].llm_engine.add_lora(LoRARequest("bad", 99, str(tmp_path / "bad")))
    assert all(part in str(refused.value) for part in expected), str(refused.value)
    check(served, "all", "base", prompts=PROMPTS[:2])


def test_the_option_is_named(served):
    with pytest.raises(AdapterError, match="adapts an expert of the backbone's own") as refused:
        open_adapter(served[1] / "all")
    assert BOTH_LORA in str(refused.value) and VLLM_LORA in str(refused.value)


def test_pairs_are_completed():
    sizes = {"a": (3, 5), "b": (5, 3), "c": (3, 5)}
    pairs = {
        "a": (torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(5, 2), 2.0),
        "b": (torch.ones(4, 5), torch.ones(3, 4), 1.0),
    }
    found = expert_loras.completed(pairs, sizes)
    assert list(found) == list(sizes)
    assert {n: (tuple(a.shape), tuple(b.shape)) for n, (a, b, _) in found.items()} == {
        n: ((4, size_in), (size_out, 4)) for n, (size_in, size_out) in sizes.items()
    }
    a, b, scale = found["a"]
    assert scale == 2 and a.sum() == 6 and b.sum() == 10 and a[2:].any() == b[:, 2:].any() == False  # noqa: E712
    assert not found["c"][0].any() and found["c"][2] == 1


@pytest.mark.parametrize("shown, takes", [
    ({"is_monolithic": True, "supports_internal_mk": True, "kernel": True}, False),
    ({"supports_internal_mk": True, "moe_kernel": None}, False),
    ({"supports_internal_mk": True, "kernel": False}, False),
    ({"supports_internal_mk": True, "kernel": True}, True),
    ({"select_gemm_impl": object()}, True),
    ({}, False),
])  # fmt: skip
def test_experts_whose_kernel_computes_no_lora_are_left_alone(shown, takes, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(expert_loras, "MoERunner", SimpleNamespace)
    shown = {"is_monolithic": False} | shown
    if (kernel := shown.pop("kernel", None)) is not None:
        shown["moe_kernel"] = SimpleNamespace(supports_lora=lambda: kernel)
    runner = SimpleNamespace(routed_experts=SimpleNamespace(quant_method=SimpleNamespace(**shown)))
    assert expert_loras.takes_lora(runner) is takes
    assert not expert_loras.takes_lora(torch.nn.Linear(1, 1))
