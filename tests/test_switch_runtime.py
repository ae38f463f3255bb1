"""One stream with a fused switch per token says what the unmerged mixture says."""

import json
import shutil

import pytest
import torch
from engines import assert_greedy_tokens, load_reference, make_pair
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.offline import reference
from vllm_adafuse.offline.switch_runtime import SwitchRuntime, switch_memory
from vllm_adafuse.tiny import real_prompts

PAIRS = {
    "llama": ("LlamaForCausalLM", {}),
    "gemma2-embedding": ("Gemma2ForCausalLM", {"router_input": "embedding", "layers": [0, 2]}),
    "phi3-ranks": ("Phi3ForCausalLM", {"r": [2, 4, 1, 3], "router_weights": "softmax_topk"}),
    "later-layer": ("Gemma2ForCausalLM", {"router_layer": 1, "router_bias": True}),
    "later-state": ("LlamaForCausalLM", {"router_layer": 2, "router_input": "embedding"}),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory):
    architecture, options = PAIRS[request.param]
    return make_pair(tmp_path_factory.mktemp("switch"), architecture, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("switch"))


def prompts(base, count=3) -> list[torch.Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return [tokenizer(text, return_tensors="pt").input_ids for text in real_prompts(count)]


def load(base, adapter, **options) -> SwitchRuntime:
    return SwitchRuntime.load(base, adapter, **{"dtype": torch.float32} | options)


def generated(runtime, ids, **options):
    return runtime.generate(ids, **options, return_dict_in_generate=True, output_logits=True)


def assert_says(truth, ids, found):
    """The logits after which each token was chosen are those of another model after the same."""
    with torch.no_grad():
        expected = truth(found.sequences).logits[:, ids.shape[1] - 1 : -1]
    logits = torch.stack(found.logits, 1)
    assert logits.shape == expected.shape
    assert ((logits - expected).norm(dim=-1) <= 1e-5 * expected.norm(dim=-1)).all()


def test_greedy_tokens_and_logits_equal_the_mixture(pair):
    truth, runtime = load_reference(*pair), load(*pair)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    for ids in prompts(pair[0]):
        found = generated(runtime, ids, **options)
        assert_says(truth, ids, found)
        assert_greedy_tokens(truth, ids[0].tolist(), found.sequences[0, ids.shape[1] :].tolist())
    assert runtime.switches == 3 * 15  # the first token of each comes from the prompt's pass
    runtime.close()
    bare = runtime.model.generate(ids, **options)
    assert not torch.equal(bare, found.sequences)  # the adapter matters


def test_generate_of_the_reference_knows_both_modes(llama):
    ids = prompts(llama[0])[0]
    options = {"model_options": {"dtype": torch.float32}, "max_new_tokens": 8}
    for mode in ("switch", "mixture"):
        found = reference.generate(*llama, ids, mode=mode, **options)
        tokens = found[0, ids.shape[1] :].tolist()
        assert len(tokens) == 8
        assert_greedy_tokens(load_reference(*llama), ids[0].tolist(), tokens)
    with pytest.raises(ValueError, match="mode is 'fast', expected mixture or switch"):
        reference.generate(*llama, ids, mode="fast")


def test_sampling_and_other_caches(llama):
    truth, runtime = load_reference(*llama), load(*llama)
    ids = prompts(llama[0])[1]
    for cache in ("dynamic", "static"):
        found = generated(
            runtime, ids, max_new_tokens=12, do_sample=True, top_k=20, temperature=0.8,
            cache_implementation=cache, disable_compile=True,
        )  # fmt: skip
        assert_says(truth, ids, found)


def test_a_batch_runs_unmerged_and_streams_may_change(llama):
    truth, runtime = load_reference(*llama), load(*llama)
    first, second = prompts(llama[0], 2)
    batch = torch.cat([first[:, :9], second[:, :9]])
    options = {"max_new_tokens": 6, "do_sample": False}
    for ids in (first, batch, second[:, :1], first):
        found = runtime.generate(ids, **options)
        for row in found.tolist():
            assert_greedy_tokens(truth, row[: ids.shape[1]], row[ids.shape[1] :])
    assert runtime.switches == 5 + 0 + 6 + 5


def test_equal_routes_in_a_row_are_merged_once(tmp_path):
    base, adapter = make_pair(tmp_path, num_experts=2, top_k=1)
    runtime = load(base, adapter)
    expert = runtime.passports[0][:, 0]
    one, two = (expert == 0).nonzero()[:2, 0].tolist()
    other = (expert == 1).nonzero()[0].item()
    with torch.no_grad():
        runtime.model(torch.tensor([[one]]))
        kept = [w.clone() for w in runtime.plan.live]
        runtime.plan.live[0].fill_(7.0)
        runtime.model(torch.tensor([[two]]))  # nothing is written
        assert (runtime.plan.live[0] == 7).all()
        runtime.model(torch.tensor([[other]]))
        token = torch.tensor([[one]])
        runtime.model(token)
        for w, before in zip(runtime.plan.live, kept):
            assert (w - before).norm() <= 1e-6 * before.norm()
        token.fill_(other)  # the same memory, another token
        runtime.model(token)
        assert not torch.equal(runtime.plan.live[0], kept[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_is_as_close_as_the_reference(llama, device):
    ids = prompts(llama[0])[0].to(device)
    truth = load_reference(*llama, device_map=device)
    plain = load_reference(*llama, dtype=torch.bfloat16, device_map=device)
    runtime = load(*llama, dtype=torch.bfloat16, device_map=device)
    with torch.no_grad():
        want = truth(ids).logits[0]
        distances = []
        for model in (plain, runtime.model):
            cache, rows = None, []
            for token in ids[0]:  # one by one, so that every step switches
                out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                rows.append(out.logits[0, -1].float())
            distances.append((torch.stack(rows) - want).norm().item())
    assert runtime.switches == ids.shape[1]
    assert distances[1] <= 1.2 * distances[0]


def test_memory_is_stated_and_given_back(llama):
    from transformers import AutoModelForCausalLM

    base, adapter = llama
    runtime = load(base, adapter)
    backbone = Backbone.from_path(str(base))
    stated = switch_memory(backbone, load_adapter(adapter, backbone), torch.float32)
    assert stated == runtime.memory()
    assert stated.passports == 1003 * 2 * 8
    linears = {id(w) for w in runtime.plan.pristine}
    assert stated.pristine == sum(w.nbytes for w in runtime.plan.live) and len(linears) == 21
    assert stated.total == stated.pristine + stated.experts + stated.passports + stated.table
    with torch.no_grad():
        runtime.model(torch.tensor([[5]]))
        merged = runtime.model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
        runtime.close()
        bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
        for name, value in runtime.model.state_dict().items():
            assert torch.equal(value, bare[name])
        assert not torch.equal(merged, bare["model.layers.0.mlp.up_proj.weight"])
        ids = torch.tensor([[5, 6, 7]])
        runtime.model(inputs_embeds=runtime.model.model.embed_tokens(ids))  # no hook is left


def test_what_cannot_be_switched_is_refused_in_words(llama, tmp_path):
    base, adapter = llama
    with pytest.raises(ValueError, match="called without input_ids"), torch.no_grad():
        load(base, adapter).model(inputs_embeds=torch.zeros(1, 2, 128))
    layers = make_pair(tmp_path / "layers", routing="layer_wise")[1]
    with pytest.raises(AdapterError, match="`routing` is layer_wise"):
        load(base, layers)
    fp8 = shutil.copytree(base, tmp_path / "fp8")
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match='quantised \\("fp8"\\)'):
        load(fp8, adapter)
