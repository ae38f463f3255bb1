"""Requests that choose their adapter on a GPU, in bfloat16 and CUDA graphs: as close to float32 as
plain transformers and PEFT in bfloat16 are."""

import pytest
import torch
from engines import completion, greedy, load_reference, logprobs_of
from loras import FEW, PATTERNS, make_lora
from test_gpu_engine import gpu_engine, gpu_pair
from vllm_adafuse.random_adapter import make_random_adapter
from vllm_adafuse.tiny import real_prompts

pytestmark = pytest.mark.gpu

PROMPTS = real_prompts(30)
NAMES = ["base", "mix", "few", "patterns", "mix8"]
LONG = [" ".join(PROMPTS[i : i + 9])[:800] for i in range(10)]
# Sizes between and beyond those that are captured run, too.
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 8, 64]}}
LORA = {"max_model_len": 512, "enable_lora": True, "max_loras": 4, "max_lora_rank": 128}


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Gemma2ForCausalLM"])
def pairs(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    base, _ = gpu_pair(root, request.param, num_experts=4, r=[8, 20, 33, 16])
    (root / "adapter").rename(root / "mix")
    make_random_adapter(base, root / "mix8", num_experts=8, top_k=3, r=16, seed=4)
    for seed, (name, config) in enumerate({"few": FEW, "patterns": PATTERNS}.items()):
        make_lora(base, root / name, seed, **config)
    return root


def reference(root, name, dtype):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if name.startswith("mix"):
        return load_reference(root / "base", root / name, dtype=dtype, device_map="cuda")
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=dtype, device_map="cuda")
    if name == "base":
        return model
    # By default PEFT computes in float32 whatever the backbone's dtype is.
    return PeftModel.from_pretrained(model, root / name, autocast_adapter_dtype=False).eval()


def distance(outputs, exact, other=None) -> float:
    """Mean |logprob - exact's| of what was served, or of another model at the same tokens."""
    found = []
    for output in outputs:
        tokens, logprobs = completion(output)
        index = torch.tensor(tokens)[:, None]
        want = logprobs_of(exact, output.prompt_token_ids, tokens).gather(1, index)[:, 0]
        have = torch.tensor(logprobs)
        if other is not None:
            have = logprobs_of(other, output.prompt_token_ids, tokens).gather(1, index)[:, 0]
        found.append((have - want).abs())
    return torch.cat(found).mean().item()


def generate(llm, root, names, prompts=PROMPTS):
    from vllm.lora.request import LoRARequest

    every = [
        None if name == "base" else LoRARequest(name, 1 + NAMES.index(name), str(root / name))
        for name in names
    ]
    requests = [every[i % len(every)] for i in range(len(prompts))]
    return llm.generate(prompts, greedy(), lora_request=requests, use_tqdm=False)


def assert_close(outputs, root, names):
    for i, name in enumerate(names):
        exact = reference(root, name, torch.float32)
        served = distance(outputs[i :: len(names)], exact)
        plain = distance(outputs[i :: len(names)], exact, reference(root, name, torch.bfloat16))
        print(f"{name}: served {served:.5f}, bf16 reference {plain:.5f} from float32")
        assert served <= 1.2 * plain + 1e-4, name


@pytest.mark.parametrize("runner", ["0", "1"], ids=["v1", "v2"])
def test_a_mixed_batch_is_as_close_as_bf16_references(pairs, runner, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    with gpu_engine(pairs / "base", **LORA, **GRAPHS) as llm:
        outputs = generate(llm, pairs, NAMES)
        few = generate(llm, pairs, ["patterns", "base"], PROMPTS[:3])
        alone = {name: generate(llm, pairs, [name], PROMPTS[:1]) for name in NAMES}
        long = generate(llm, pairs, NAMES, LONG)
    assert_close(outputs, pairs, NAMES)
    assert_close(few, pairs, ["patterns", "base"])
    assert_close(long, pairs, NAMES)
    for name, output in alone.items():
        assert_close(output, pairs, [name])


def test_adapters_come_and_go_under_graphs(pairs):
    small = LORA | {"max_loras": 1, "max_cpu_loras": 2}
    with gpu_engine(pairs / "base", **small, **GRAPHS) as llm:
        for name in [*NAMES, *reversed(NAMES)]:
            assert_close(generate(llm, pairs, [name], PROMPTS[:4]), pairs, [name])


def test_requests_of_the_base_get_what_an_engine_without_lora_says(pairs):
    with gpu_engine(pairs / "base", max_model_len=512, **GRAPHS) as llm:
        stock = llm.generate(PROMPTS[:8], greedy(), use_tqdm=False)
    with gpu_engine(pairs / "base", **LORA, **GRAPHS) as llm:
        generate(llm, pairs, NAMES)
        ours = generate(llm, pairs, ["base"], PROMPTS[:8])
    same = sum(completion(a)[0] == completion(b)[0] for a, b in zip(stock, ours))
    assert same >= 6  # near ties of bfloat16 may fall either way
    assert_close(ours, pairs, ["base"])


def test_a_quantised_backbone(pairs):
    """Logprobs of fp8 with adapters differ from float32 about as those without do."""
    with gpu_engine(pairs / "base", quantization="fp8", **LORA, **GRAPHS) as llm:
        outputs = generate(llm, pairs, NAMES)
    bare = distance(outputs[0 :: len(NAMES)], reference(pairs, "base", torch.float32))
    for i, name in enumerate(NAMES[1:], 1):
        exact = reference(pairs, name, torch.float32)
        assert distance(outputs[i :: len(NAMES)], exact) <= 3 * bare, name

