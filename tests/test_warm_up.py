"""Which kernels a model's first forward compiles: all that later steps launch; and that it runs."""

import re

import pytest
import torch
from engines import assert_greedy_equals, engine, greedy, load_reference, make_pair
from launches import MOST, kernel_modules, layer_wise, on_pages, one_decision, recording
from ops import DEVICE
from test_gpu_engine import GRAPHS, gpu_pair, run_apart
from vllm_adafuse.kernels.whole import token_counts
from vllm_adafuse.serving.warm_up import run_parts
from vllm_adafuse.tiny import real_prompts


@pytest.mark.skipif(DEVICE == "cuda", reason="counts launches once")
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("step", [one_decision, on_pages, layer_wise])
def test_every_launch_of_any_step_is_among_those_of_the_counts(step, rank):
    with recording() as found:
        run = step(rank=rank)
        for tokens in token_counts(MOST):
            run(tokens, alone=True)
        warmed = {launch.compiled for launch in found}
        assert len(warmed) > 10
        for tokens in [*range(1, 70), *range(70, 1100, 23), *range(1100, MOST, 1021)]:
            found.clear()
            run(tokens)
            new = {launch.compiled for launch in found} - warmed
            assert not new, (tokens, new)


def test_counts_end_with_the_largest_step():
    assert token_counts(1) == [1]
    assert token_counts(100)[:3] == [100, 96, 65] and token_counts(100)[-3:] == [3, 2, 1]
    assert len(token_counts(MOST)) < 60


# The adapter, and its kinds of adapted.
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
        return run_parts(model.model, [40, 3, 1], lambda tokens: model.route_any(tokens, ids, None))

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
    ours = {name for module in kernel_modules() for name in vars(module)}
    late = set(re.findall(r"JIT compilation during inference: (\w+)", log))
    assert late & ours == set()
