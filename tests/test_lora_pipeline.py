"""Requests choose their adapter with pipeline parallelism: the first stage routes for all."""

import pytest
import torch
from engines import assert_greedy_equals, engine, greedy, load_reference, make_pair
from loras import PATTERNS, make_lora
from vllm.lora.request import LoRARequest
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.patches.lora_requests import versions_of
from vllm_adafuse.serving.versions import AdapterRefused
from vllm_adafuse.tiny import real_prompts

PAST = {"router_context": "mean", "router_context_scale": 4.0, "top_k": 2, "num_experts": 3}
MIXTURES = {
    "mix": {"num_experts": 4, "top_k": 2, "r": [4, 20, 33, 8]},
    "past": {"r": 4, "seed": 2, **PAST},
    "late": {"num_experts": 5, "top_k": 3, "r": 4, "seed": 5},
}


def test_two_pipeline_stages(tmp_path, monkeypatch):
    def make_room(worker):
        """What vLLM does in the dummy run that it leaves out on a CPU without compilation."""
        runner = worker.model_runner
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            runner.max_num_tokens, runner.model_config.dtype, runner.device
        )

    def spoil(worker):
        """The last stage cannot read adapters."""
        from vllm_adafuse.errors import AdapterError

        def read(path):
            raise AdapterError(f"adapter {path}", ["spoilt"])

        if worker.rank == 1:
            worker.model_runner.lora_manager.loader.read = read

    def mend(worker):
        if worker.rank == 1:
            del worker.model_runner.lora_manager.loader.read

    def stamp_slowly(worker):
        """A few token ids at a time."""
        from vllm_adafuse.serving import hosted, routes

        hosted.PIECES_AT_ONCE, routes.PASSPORT_CHUNK = 1, 32

    def is_ready(worker, adapter):
        return adapter in worker.model_runner.lora_manager.hosted

    def lose(worker, adapter):
        """The first stage has given it up in a step."""
        lost = worker.model_runner.lora_manager.lost
        if worker.rank == 0 and lost.pop(adapter, None) is None:
            lost[adapter] = "it could not be read"

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    # A default that sees the past itself.
    base, default = make_pair(tmp_path, r=4, seed=9, **PAST)
    references = {"base": load_reference(base, default)}
    references["lora"] = make_lora(base, tmp_path / "lora", 1, **PATTERNS)
    for name, options in MIXTURES.items():
        path = make_random_adapter(base, tmp_path / name, dtype=torch.float32, **options)
        references[name] = load_reference(base, path)
    requests = {
        name: LoRARequest(name, i, str(tmp_path / name)) if i else None
        for i, name in enumerate(references)
    }
    prompts, options = real_prompts(10), {"max_loras": 4, "max_lora_rank": 128}
    with engine(base, default, pipeline_parallel_size=2, enable_lora=True, **options) as llm:
        llm.collective_rpc(make_room)

        def check(names):
            named = [requests[names[i % len(names)]] for i in range(len(prompts))]
            outputs = llm.generate(prompts, greedy(), lora_request=named, use_tqdm=False)
            for i, name in enumerate(names):
                assert_greedy_equals(outputs[i :: len(names)], references[name])

        check(["base", "lora", "mix", "past"])
        llm.collective_rpc(spoil)
        with pytest.raises(AdapterRefused, match="spoilt"):
            llm.llm_engine.add_lora(requests["late"])
        assert llm.collective_rpc("list_loras") == [{1, 2, 3}] * 2
        llm.collective_rpc(mend)
        llm.collective_rpc(lose, args=(4,))
        with pytest.raises(AdapterRefused, match="another rank has lost it"):
            llm.llm_engine.add_lora(requests["late"])
        llm.collective_rpc(lose, args=(4,))
        # Weights are loaded anew when the last stage, which stamps nothing, has all of an adapter.
        llm.collective_rpc(stamp_slowly)
        stamped = versions_of(llm.llm_engine).stamp(requests["late"])
        while llm.collective_rpc(is_ready, args=(4,)) != [False, True]:
            assert not llm.llm_engine.engine_core.add_lora(stamped)
        llm.collective_rpc("reload_weights")
        assert llm.llm_engine.add_lora(requests["late"])
        check(list(references))
