"""The served model on a GPU, in bfloat16: against the reference, compiled against eager, fp8."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch
from engines import completion, engine, greedy, load_reference, logprobs_of, make_pair
from vllm_adafuse.tiny import make_tiny_backbone, real_prompts

pytestmark = pytest.mark.gpu

WIDE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512}
SEVEN_B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "num_hidden_layers": 2,
}
GRAPHS = {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 8, 64]}}
PROMPTS = real_prompts(24)


def gpu_pair(root, architecture="LlamaForCausalLM", config=WIDE, **adapter):
    config = config | {"dtype": torch.bfloat16}
    return make_pair(root, architecture, config, **{"r": 8, "dtype": torch.bfloat16} | adapter)


def gpu_engine(base, adapter=None, **options):
    # A fixed cache: tests may share the GPU (pytest -n 4).
    defaults = {
        "dtype": "bfloat16",
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 2 << 30,
    }
    return engine(base, adapter, **defaults | options)


@contextmanager
def engine_if_it_can(base, adapter=None, **options):
    """A `gpu_engine`; the test is skipped where vLLM says that it does not support this."""
    with ExitStack() as stack:
        try:
            llm = stack.enter_context(gpu_engine(base, adapter, **options))
        except ValueError as e:
            if "not yet support" not in str(e) and "not supported" not in str(e):
                raise
            pytest.skip(f"this vLLM: {e}")
        yield llm


def distances(outputs, base, adapter) -> tuple[float, float]:
    """Mean |logprob - float32 reference's|: of the served model, and of the bf16 reference."""
    exact = load_reference(base, adapter, dtype=torch.float32, device_map="cuda")
    plain = load_reference(base, adapter, dtype=torch.bfloat16, device_map="cuda")
    served, reference = [], []
    for output in outputs:
        tokens, logprobs = completion(output)
        index = torch.tensor(tokens)[:, None]
        want = logprobs_of(exact, output.prompt_token_ids, tokens).gather(1, index)[:, 0]
        have = logprobs_of(plain, output.prompt_token_ids, tokens).gather(1, index)[:, 0]
        served.append((torch.tensor(logprobs) - want).abs())
        reference.append((have - want).abs())
    return torch.cat(served).mean().item(), torch.cat(reference).mean().item()


@pytest.mark.parametrize(
    "architecture, mixture",
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"num_experts": 40}),  # a step goes through the list of active experts
        ("Gemma2ForCausalLM", {}),
        ("Phi3ForCausalLM", {}),
    ],
)
def test_logprobs_are_as_close_as_the_bf16_reference(architecture, mixture, tmp_path):
    base, adapter = gpu_pair(tmp_path, architecture, **mixture)
    with gpu_engine(base, adapter, **GRAPHS) as llm:
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    served, reference = distances(outputs, base, adapter)
    print(f"{architecture}: served {served:.5f}, bf16 reference {reference:.5f} from float32")
    assert served <= 1.2 * reference + 1e-4


def graphs(**config) -> dict:
    config = {"cudagraph_mode": "FULL", "cudagraph_capture_sizes": [24]} | config
    return {"enforce_eager": False, "compilation_config": config}


APART = """
import json, sys
sys.path.insert(0, sys.argv[1])
import conftest
from engines import completion, greedy
from test_gpu_engine import PROMPTS, gpu_engine
with gpu_engine(sys.argv[2], sys.argv[3], **json.loads(sys.argv[4])) as llm:
    outputs = llm.generate(PROMPTS, greedy(max_tokens=24, logprobs=2), use_tqdm=False)
rows = []
for output in outputs:
    best = [sorted(v.logprob for v in at.values())[-2:] for at in output.outputs[0].logprobs]
    rows.append([*completion(output), best])
print("RESULT", json.dumps(rows))
"""


def run_apart(base, adapter, options, **env) -> tuple[list, str]:
    """[tokens, logprobs, two best logprobs] of every prompt from a process of its own; its log.

    One process for the engine and its front end: which prompts share a step is then no accident.
    """
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "INFO"} | env
    arguments = [os.path.dirname(__file__), str(base), str(adapter), json.dumps(options)]
    command = [sys.executable, "-P", "-c", APART, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT ")), done.stdout + done.stderr


def assert_same_until_a_tie(ours, others, margin=0.07):
    """Equal tokens; a difference only where the two best were two bf16 steps of a logit apart."""
    ties = 0
    for (tokens, _, best), (other_tokens, _, _) in zip(ours, others, strict=True):
        differ = [at for at, (a, b) in enumerate(zip(tokens, other_tokens)) if a != b]
        if differ:
            low, high = best[differ[0]]
            assert high - low < margin, (differ[0], low, high)
            ties += 1
    assert ties <= len(ours) // 2


def test_eager_compiled_and_captured_agree(tmp_path):
    base, adapter = gpu_pair(tmp_path)
    modes = {
        "eager": {"enforce_eager": True},
        # The same kernels, replayed: token for token, to the last bit of the logprobs.
        "captured": graphs(mode=0),
        "compiled": graphs(mode=3, backend="eager"),
        # Inductor fuses norms and activations, and rounds less often.
        "inductor": graphs(mode=3),
    }
    with ThreadPoolExecutor(len(modes)) as pool:
        started = [pool.submit(run_apart, base, adapter, options) for options in modes.values()]
    runs = {name: run.result()[0] for name, run in zip(modes, started)}
    assert runs["captured"] == runs["eager"]
    assert runs["compiled"] == runs["eager"]
    assert_same_until_a_tie(runs["inductor"], runs["eager"])


@pytest.mark.parametrize("runner", ["0", "1"])
def test_both_model_runners(runner, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    base, adapter = gpu_pair(tmp_path)
    with gpu_engine(base, adapter, **GRAPHS) as llm:
        worker = llm.collective_rpc(lambda worker: type(worker.model_runner).__module__)[0]
        assert (".gpu.model_runner" in worker) == (runner == "1")
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    served, reference = distances(outputs, base, adapter)
    assert served <= 1.2 * reference + 1e-4


def test_a_second_start_uses_the_compile_cache(tmp_path):
    base, adapter = gpu_pair(tmp_path)
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    (first, _), (second, log) = [run_apart(base, adapter, GRAPHS, **cache) for _ in range(2)]
    assert first == second
    assert "Directly load" in log


def add_reference_deltas(model, adapter: str) -> None:
    """Hooks the format's formulas onto a stock vLLM model, in eager mode."""
    from safetensors.torch import load_file
    from vllm_adafuse.format.adapter import load_adapter

    config = load_adapter(adapter).config
    tensors = {k: v.cuda() for k, v in load_file(f"{adapter}/adapter_model.safetensors").items()}
    router, state = tensors.pop("router.weight").float(), {}
    layers = model.model.layers
    norm = layers[0].input_layernorm

    def decide(module, args, kwargs):
        e = (args[1] if len(args) > 1 else kwargs["hidden_states"]).float()
        u = e * torch.rsqrt(e.square().mean(-1, keepdim=True) + norm.variance_epsilon)
        top, chosen = torch.topk(u * norm.weight.float() @ router.T, config.top_k)
        gates = torch.zeros(e.shape[0], config.num_experts, device=e.device)
        state["gates"] = gates.scatter(1, chosen, torch.softmax(top, -1)) * config.scales[0]

    layers[0].register_forward_pre_hook(decide, with_kwargs=True)
    packed = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            block, _, leaf = name.rpartition(".")
            if leaf not in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
                continue
            prefix = f"model.layers.{index}.{block}"
            names = [f"{prefix}.{part}" for part in packed.get(leaf, (leaf,))]

            def hook(module, args, out, names=names):
                x = args[0].float()
                delta = [
                    torch.einsum(
                        "te,ter,eor->to",
                        state["gates"],
                        torch.einsum("ti,eri->ter", x, tensors[f"{n}.lora_A"].float()),
                        tensors[f"{n}.lora_B"].float(),
                    )
                    for n in names
                ]
                y, bias = out
                return (y.float() + torch.cat(delta, -1)).to(y.dtype), bias

            module.register_forward_hook(hook)


def llm_tokens(base, prompt: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)(prompt).input_ids


def test_fp8_backbone(tmp_path, monkeypatch):
    """Our deltas on vLLM's fp8 linears against the formulas' deltas on the same fp8 backbone."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # hooks need the model here
    base, adapter = gpu_pair(tmp_path)
    params = greedy(max_tokens=1, prompt_logprobs=0)

    def prompt_logprobs(llm):
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        values = [
            at[token].logprob
            for output in outputs
            for token, at in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:])
        ]
        return torch.tensor(values)

    with gpu_engine(base, adapter, quantization="fp8", enforce_eager=True) as llm:
        served = prompt_logprobs(llm)
    with gpu_engine(base, quantization="fp8", enforce_eager=True) as llm:
        bare = prompt_logprobs(llm)
        llm.apply_model(lambda model: add_reference_deltas(model, str(adapter)))
        llm.reset_prefix_cache()
        expected = prompt_logprobs(llm)
    exact = load_reference(base, adapter, dtype=torch.float32, device_map="cuda")
    truth = []
    for prompt in PROMPTS:
        ids = llm_tokens(base, prompt)
        rows = logprobs_of(exact, ids[:1], ids[1:])
        truth.append(rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    truth = torch.cat(truth)
    # Fp8 amplifies roundings: what counts is that ours is no further from float32.
    ours, formulas, without = (
        (values - truth).abs().mean().item() for values in (served, expected, bare)
    )
    print(f"fp8: served {ours:.4f}, formulas {formulas:.4f}, no adapter {without:.4f} from float32")
    assert ours <= 1.2 * formulas
    assert without > 3 * ours


def test_a_reload_leaves_nothing_of_the_old_weights(tmp_path):
    """Graphs have been captured over [W; A] and the passports of the weights before."""
    base, adapter = gpu_pair(tmp_path)
    config = WIDE | {"dtype": torch.bfloat16}
    other = make_tiny_backbone(tmp_path / "other", seed=5, **config)
    with gpu_engine(base, adapter, **GRAPHS) as llm:
        for weights in (other, base, other):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights)})
            llm.reset_prefix_cache()
            outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
            served, reference = distances(outputs, weights, adapter)
            print(f"reloaded: served {served:.5f}, bf16 reference {reference:.5f} from float32")
            assert served <= 1.2 * reference + 1e-4


@pytest.mark.parametrize("batch", [1, 64])
def test_seven_b_shape(batch, tmp_path):
    base, adapter = gpu_pair(tmp_path, config=SEVEN_B, num_experts=8, r=16)
    prompts = real_prompts(64)
    with gpu_engine(base, adapter, **GRAPHS) as llm:
        outputs = []
        for start in range(0, len(prompts), batch):
            some = prompts[start : start + batch]
            outputs += llm.generate(some, greedy(), use_tqdm=False)
    served, reference = distances(outputs, base, adapter)
    print(f"7B shape, batch {batch}: served {served:.5f}, bf16 reference {reference:.5f}")
    assert served <= 1.2 * reference + 1e-4
