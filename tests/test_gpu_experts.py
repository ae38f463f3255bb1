"""Adapters with LoRA on a backbone's own experts, on a GPU: vLLM's kernels for these pairs beside ours
for the others, in bfloat16 and CUDA graphs, as close to float32 as merged weights in bfloat16 are."""

import copy

import pytest
import torch
from engines import greedy
from expert_loras import ATTENTION, MIXTRAL, QWEN, expert_linears, make_backbone, make_expert_lora
from test_gpu_engine import WIDE, gpu_engine
from test_gpu_lora import GRAPHS, LONG, PROMPTS, errors
from transformers import AutoModelForCausalLM
from vllm.lora.request import LoRARequest

pytestmark = pytest.mark.gpu

LORA = {"max_model_len": 512, "enable_lora": True, "max_loras": 4, "max_lora_rank": 16}
LORA |= {"additional_config": {"adafuse": {"lora": "both"}}}
# One rank, on either runner; and two.
RUNS = {"v1": ("0", 1), "v2": ("1", 1), "v1-tp2": ("0", 2)}


@pytest.fixture(scope="module", params=[QWEN, MIXTRAL])
def made(request, tmp_path_factory):
    """Directory and references in float32 by name."""
    root, kind = tmp_path_factory.mktemp("experts"), request.param
    sizes = {"moe_intermediate_size": 128} if kind == QWEN else {}
    base = make_backbone(root, kind, **WIDE | {"dtype": torch.bfloat16} | sizes)
    loras = {
        "few": dict.fromkeys(ATTENTION, 16),
        "all": dict.fromkeys([*ATTENTION, *expert_linears(kind)], 16),
        "part": dict.fromkeys(expert_linears(kind, experts=[1, 2], kinds=[0, 1]), 8),
    }
    references = {"base": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()}
    for seed, (name, ranks) in enumerate(loras.items()):
        references[name] = make_expert_lora(base, root / name, seed, ranks, torch.bfloat16)
    return root, {name: model.cuda() for name, model in references.items()}


@pytest.mark.parametrize("run", RUNS)
def test_base_and_adapters_are_as_close_as_merged_weights(made, run, monkeypatch):
    root, references = made
    runner, ranks = RUNS[run]
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    names, served = list(references), {name: [] for name in references}

    def generate(llm, names_here, prompts):
        every = {n: LoRARequest(n, 1 + i, str(root / n)) for i, n in enumerate(names) if n != "base"}
        named = [every.get(names_here[i % len(names_here)]) for i in range(len(prompts))]
        outputs = llm.generate(prompts, greedy(), lora_request=named, use_tqdm=False)
        for i, name in enumerate(names_here):
            served[name] += outputs[i :: len(names_here)]

    with gpu_engine(root / "base", **LORA, **GRAPHS, tensor_parallel_size=ranks) as llm:
        generate(llm, names, PROMPTS)
        generate(llm, names, LONG)
        # One token a step: vLLM's kernels ask the mapping, also in a graph of another's adapters.
        for name in ("all", "few", "all", "base", "part", "few"):
            generate(llm, [name], PROMPTS[:2])
            generate(llm, [name], PROMPTS[:1])
    all_served, all_plain = [], []
    for name, exact in references.items():
        plain = copy.deepcopy(exact).bfloat16()
        ours, theirs = errors(served[name], exact), errors(served[name], exact, plain)
        other = errors(served[name], references["base" if name != "base" else "all"]).mean().item()
        print(f"{name}: served {ours.mean():.5f}, bf16 {theirs.mean():.5f}, another {other:.5f}")
        assert ours.mean() <= 2 * theirs.mean(), name
        assert other > 3 * ours.mean(), name
        all_served.append(ours), all_plain.append(theirs)
    assert torch.cat(all_served).mean() <= 1.3 * torch.cat(all_plain).mean()
