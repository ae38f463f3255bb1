"""The reference itself: against the formula by hand in numpy float64, and as a plain model."""

import json
import math

import numpy as np
import pytest
import torch
from engines import assert_greedy_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_adafuse.offline import reference
from vllm_adafuse.tiny import make_tiny_backbone, real_prompts

HIDDEN, EXPERTS, RANK = 128, 5, 4
LINEAR = "model.layers.1.self_attn.k_proj"  # Qwen2's has a bias
PROMPT = [17, 5, 900, 333, 42]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    names = ("Qwen2", "Gemma2", "Llama")
    root = tmp_path_factory.mktemp("bases")
    return {n: make_tiny_backbone(root / n, f"{n}ForCausalLM") for n in names}


def random_tensors(base, ranks, linears=(LINEAR,), bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    tensors = {"router.weight": torch.randn(len(ranks), HIDDEN, generator=generator) / 8}
    if bias:
        tensors["router.bias"] = torch.randn(len(ranks), generator=generator)
    for name in linears:
        size_out, size_in = weights[f"{name}.weight"].shape
        a = torch.randn(len(ranks), max(ranks), size_in, generator=generator) / math.sqrt(size_in)
        b = torch.randn(len(ranks), size_out, max(ranks), generator=generator)
        for expert, rank in enumerate(ranks):
            a[expert, rank:], b[expert, :, rank:] = 0, 0
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = a, b
    return tensors


def write(path, tensors, **config):
    """An adapter's two files, written by hand."""
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    experts = len(tensors["router.weight"])
    config = {"num_experts": experts, "top_k": 2, "r": RANK, "lora_alpha": 6} | config
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "ADAFUSE"} | config))
    return path


def load(base, adapter):
    return reference.load(base, adapter, dtype=torch.float32)


def gates_by_hand(e, norm, offset, tensors, **config):
    """Gates [E] of one token with embedding e."""
    weight = tensors["router.weight"].double().numpy()
    bias = tensors.get("router.bias", torch.zeros(len(weight))).double().numpy()
    u = e
    if config.get("router.input", "first_norm") == "first_norm":
        u = e / np.sqrt(np.mean(e * e) + 1e-6) * (offset + norm)
    z = [float(np.dot(row, u) + b) for row, b in zip(weight, bias)]
    z = [value / config.get("router.temperature", 1.0) for value in z]
    order = sorted(range(len(z)), key=lambda expert: (-z[expert], expert))
    chosen = order[: config.get("top_k", 2)]
    softmax_first = config.get("router.weights") == "softmax_topk"
    total = sum(math.exp(z[i]) for i in (order if softmax_first else chosen))
    return np.array([math.exp(z[i]) / total if i in chosen else 0.0 for i in range(len(z))])


def assert_equals_formula(base, path, tensors, ranks=(RANK,) * EXPERTS, **config):
    """Gates and one linear's output, for every token of PROMPT."""
    model = load(base, write(path, tensors, **config))
    seen = {}

    def record(module, args, y):  # registered after the reference's own hook
        seen["x"], seen["y"] = args[0][0].double().numpy(), y[0].double().numpy()

    model.get_submodule(LINEAR).register_forward_hook(record)
    with torch.no_grad():
        model(torch.tensor([PROMPT]))
    weights = {n: w.double().numpy() for n, w in load_file(base / "model.safetensors").items()}
    w, b = weights[f"{LINEAR}.weight"], weights.get(f"{LINEAR}.bias", 0.0)
    lora_a, lora_b = (tensors[f"{LINEAR}.lora_{side}"].double().numpy() for side in "AB")
    alphas = config.get("lora_alpha", 6)
    alphas = alphas if isinstance(alphas, list) else [alphas] * len(ranks)
    gemma = model.config.model_type == "gemma2"
    offset, factor = (1.0, math.sqrt(HIDDEN)) if gemma else (0.0, 1.0)
    norm = weights["model.layers.0.input_layernorm.weight"]
    for at, token in enumerate(PROMPT):
        e = weights["model.embed_tokens.weight"][token] * factor
        gates = gates_by_hand(e, norm, offset, tensors, **config)
        found = model.adafuse.gates[0, at].double().numpy()
        np.testing.assert_allclose(found, gates, rtol=1e-5, atol=1e-7)
        plain = w @ seen["x"][at] + b
        delta = np.zeros_like(plain)
        for expert, (alpha, rank) in enumerate(zip(alphas, ranks)):
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            a_x = lora_a[expert, :rank] @ seen["x"][at]
            delta += gates[expert] * scale * (lora_b[expert][:, :rank] @ a_x)
        assert np.abs(delta).max() > 0.1 * np.abs(plain).max()
        np.testing.assert_allclose(seen["y"][at], plain + delta, rtol=1e-5, atol=1e-5)
    return model.adafuse.gates[0]


CASES = {
    "defaults": {},
    "softmax_topk": {"router.weights": "softmax_topk"},
    "embedding": {"router.input": "embedding"},
    "embedding softmax_topk": {"router.input": "embedding", "router.weights": "softmax_topk"},
    "hot": {"router.temperature": 4.0},
    "cold": {"router.temperature": 0.3, "router.weights": "softmax_topk"},
    "one": {"top_k": 1},
    "one softmax_topk": {"top_k": 1, "router.weights": "softmax_topk"},
    "all": {"top_k": EXPERTS, "router.temperature": 2.0},
    "rslora": {"use_rslora": True},
    "alphas": {"lora_alpha": [3, 6, 2.5, 7, 11]},
}


@pytest.mark.parametrize("family", ["Qwen2", "Gemma2"])
@pytest.mark.parametrize("case", CASES)
def test_formula(case, family, bases, tmp_path):
    base = bases[family]
    tensors = random_tensors(base, [RANK] * EXPERTS)
    gates = assert_equals_formula(base, tmp_path / "adapter", tensors, **CASES[case])
    assert len({tuple(row.nonzero()[:, 0].tolist()) for row in gates}) > 1 or case == "all"


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_of_their_own(use_rslora, bases, tmp_path):
    ranks = [1, 4, 2, 3, 1]
    tensors = random_tensors(bases["Qwen2"], ranks)
    config = {"r": ranks, "lora_alpha": [2, 6, 3, 5, 4], "top_k": 4, "use_rslora": use_rslora}
    assert_equals_formula(bases["Qwen2"], tmp_path / "adapter", tensors, ranks, **config)


@pytest.mark.parametrize("weights", ["topk_softmax", "softmax_topk"])
def test_router_bias(weights, bases, tmp_path):
    tensors = random_tensors(bases["Qwen2"], [RANK] * EXPERTS, bias=True)
    config = {"router.weights": weights, "router.temperature": 0.7}
    with_bias = assert_equals_formula(bases["Qwen2"], tmp_path / "a", tensors, **config)
    del tensors["router.bias"]
    without = assert_equals_formula(bases["Qwen2"], tmp_path / "b", tensors, **config)
    assert (with_bias - without).abs().max() > 0.1


def test_router_keys_in_an_object(bases, tmp_path):
    tensors = random_tensors(bases["Qwen2"], [RANK] * EXPERTS)
    router = {"input": "embedding", "weights": "softmax_topk", "temperature": 0.2}
    flat = {f"router.{key}": value for key, value in router.items()}
    flat = assert_equals_formula(bases["Qwen2"], tmp_path / "flat", tensors, **flat)
    model = load(bases["Qwen2"], write(tmp_path / "nested", tensors, router=router))
    model(torch.tensor([PROMPT]))
    torch.testing.assert_close(model.adafuse.gates[0], flat)


@pytest.mark.parametrize("top_k", [1, 2, 3, 20])
def test_ties_go_to_the_lower_expert(top_k, bases, tmp_path):
    experts = 64
    tensors = random_tensors(bases["Qwen2"], [RANK] * experts)
    best = [60, 7, 33]  # equal rows are equal logits; among the others all are equal too
    tensors["router.weight"][:] = 0
    tensors["router.bias"] = torch.zeros(experts)
    tensors["router.bias"][best] = 1.5
    ranks = [RANK] * experts
    gates = assert_equals_formula(
        bases["Qwen2"], tmp_path / "adapter", tensors, ranks, top_k=top_k
    )
    others = [expert for expert in range(experts) if expert not in best]
    expected = sorted((sorted(best) + others)[:top_k])
    for row in gates:
        assert row.nonzero()[:, 0].tolist() == expected
        assert len(row[row > 0].unique()) == (2 if top_k > len(best) else 1)


def every_linear(base) -> list[str]:
    names = load_file(base / "model.safetensors")
    return [n.removesuffix(".weight") for n in names if n.endswith("_proj.weight")]


@torch.no_grad()
def test_all_experts_are_the_dense_mixture(bases, tmp_path):
    """k = E and a router that reads nothing: the mixture can be merged into the weights."""
    base, linears = bases["Llama"], every_linear(bases["Llama"])
    tensors = random_tensors(base, [RANK] * EXPERTS, linears, bias=True)
    tensors["router.weight"][:] = 0
    model = load(base, write(tmp_path / "adapter", tensors, top_k=EXPERTS))
    merged = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    shares = torch.softmax(tensors["router.bias"].double(), 0) * 6 / RANK
    for name in linears:
        a, b = (tensors[f"{name}.lora_{side}"].double() for side in "AB")
        merged.get_submodule(name).weight += torch.einsum("e,eor,eri->oi", shares, b, a).float()
    ids = torch.tensor([PROMPT])
    found, expected = model(ids).logits, merged(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert (plain(ids).logits - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.fixture(scope="module")
def adapted(bases, tmp_path_factory):
    base = bases["Llama"]
    tensors = random_tensors(base, [RANK] * EXPERTS, every_linear(base))
    return load(base, write(tmp_path_factory.mktemp("adapted") / "adapter", tensors))


@torch.no_grad()
def test_batch_and_padding_change_nothing(adapted, bases):
    tokenizer = AutoTokenizer.from_pretrained(bases["Llama"])
    prompts = [text[: 20 + 40 * i] for i, text in enumerate(real_prompts(4))]
    for side in ("left", "right"):
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side=side)
        mask = batch.attention_mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        together = adapted(batch.input_ids, mask, positions).logits
        gates = adapted.adafuse.gates
        assert len(set(mask.sum(-1).tolist())) == len(prompts)
        for row, prompt in enumerate(prompts):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            alone = adapted(ids).logits[0]
            assert torch.equal(batch.input_ids[row][mask[row].bool()], ids[0])
            difference = (together[row][mask[row].bool()] - alone).abs().max()
            assert difference <= 1e-5 * alone.abs().max()
            torch.testing.assert_close(gates[row][mask[row].bool()], adapted.adafuse.gates[0])


def test_generate_in_a_padded_batch(adapted, bases):
    tokenizer = AutoTokenizer.from_pretrained(bases["Llama"], padding_side="left")
    prompts = real_prompts(3) + ["import"]

    def generate(texts):
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        inputs = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
        out = adapted.generate(**inputs, max_new_tokens=10, min_new_tokens=10, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    for prompt, tokens in zip(prompts, generate(prompts), strict=True):
        ids = tokenizer(prompt).input_ids
        assert_greedy_tokens(adapted, ids, tokens)
        assert_greedy_tokens(adapted, ids, generate([prompt])[0])


def test_saving_saves_the_backbone_as_it_was(adapted, bases, tmp_path):
    base = bases["Llama"]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert adapted.state_dict().keys() == plain.state_dict().keys()
    adapted.save_pretrained(tmp_path)
    saved, before = load_file(tmp_path / "model.safetensors"), load_file(base / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], before[name]) for name in before)
    configs = [json.loads((path / "config.json").read_text()) for path in (tmp_path, base)]
    assert configs[0] == configs[1]
