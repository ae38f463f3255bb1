"""Layer-wise adapters and later routers on a GPU, in bfloat16: as `test_gpu_engine` for one
decision per token."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from engines import greedy
from test_gpu_engine import GRAPHS, PROMPTS, distances, gpu_engine, gpu_pair, graphs, run_apart
from vllm_adafuse.tiny import real_prompts

pytestmark = pytest.mark.gpu

MIXLORA = {"router_scope": "block", "mix": "ffn_output"}
ADAPTERS = {
    "linear": {"routing": "layer_wise"},
    "abs, shared, always on": {
        "routing": "layer_wise",
        "router_logits": "abs",
        "shared_A": True,
        "always_r": 12,
        "always_alpha": 12,
        # With one expert at the entrance a tie there, of a token that every prompt has, decided the
        # test: merely rounding norms once moved the distance of bf16 by factors of 0.6 to 1.9.
        "top_k": [2, 3, 1],
        "router_temperature": 0.25,
    },
    "blocks": {"routing": "layer_wise", "router_scope": "block", "top_k": 3},
    "MixLoRA": {"routing": "layer_wise", "always_r": 4, "always_alpha": 8, **MIXLORA},
    "later router": {"router_layer": 1},
}
# A most likely token is so by the served model's own error too: where routes flip and errors are
# large, that alone is most of the distance. In a sampled one it is an error's square.
SAMPLED = greedy(temperature=1.0, seed=0)


@pytest.mark.parametrize("name", ADAPTERS)
def test_logprobs_are_as_close_as_the_bf16_reference(name, tmp_path):
    base, adapter = gpu_pair(tmp_path, **ADAPTERS[name])
    with gpu_engine(base, adapter, **GRAPHS) as llm:
        outputs = llm.generate(real_prompts(48), SAMPLED, use_tqdm=False)
    served, reference = distances(outputs, base, adapter)
    print(f"{name}: served {served:.5f}, bf16 reference {reference:.5f} from float32")
    assert served <= 1.2 * reference + 1e-4


@pytest.mark.parametrize("name", ["linear", "MixLoRA", "later router"])
def test_eager_compiled_and_captured_agree(name, tmp_path):
    base, adapter = gpu_pair(tmp_path, **ADAPTERS[name])
    modes = [{"enforce_eager": True}, graphs(mode=0), graphs(mode=3, backend="eager")]
    with ThreadPoolExecutor(len(modes)) as pool:
        runs = list(pool.map(lambda options: run_apart(base, adapter, options)[0], modes))
    assert runs[1] == runs[0] and runs[2] == runs[0]


def test_fp8_backbone(tmp_path):
    base, adapter = gpu_pair(tmp_path, **ADAPTERS["linear"])
    with gpu_engine(base, adapter, quantization="fp8", **GRAPHS) as llm:
        outputs = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    served, _ = distances(outputs, base, adapter)
    with gpu_engine(base, None, quantization="fp8", **GRAPHS) as llm:
        bare = llm.generate(PROMPTS, greedy(), use_tqdm=False)
    without, _ = distances(bare, base, adapter)
    print(f"fp8: served {served:.5f}, without the adapter {without:.5f} from float32")
    assert served < 0.5 * without
