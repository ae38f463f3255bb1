"""Adapters that also have LoRA on the embedding and the output head: those parts are vLLM's own, in
one batch with mixtures, plain LoRAs and a default, and come and go together with what is ours."""

import shutil
from dataclasses import dataclass

import pytest
import torch
from engines import assert_greedy_equals, completion, engine, greedy, load_reference, make_pair
from loras import FEW, MODULES, make_lora, manager_of
from safetensors.torch import load_file, save_file
from vllm.lora.request import LoRARequest
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.serving import rest
from vllm_adafuse.serving.versions import AdapterRefused
from vllm_adafuse.tiny import real_prompts

PROMPTS = real_prompts(12, words=40)  # more than one block of the KV cache
LORAS = {
    "few": FEW,
    "all": {"r": 8, "lora_alpha": 16, "target_modules": [*MODULES, "embed_tokens", "lm_head"]},
    "head": {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["lm_head"]},
    "embed": {
        "r": 12, "lora_alpha": 24, "target_modules": ["embed_tokens", "o_proj"],
        "rank_pattern": {"o_proj": 3}, "alpha_pattern": {"embed_tokens": 48},
    },
}  # fmt: skip
NAMES = ["default", "mix", *LORAS]


@dataclass
class Served:
    llm: object
    root: object
    references: dict

    def request(self, name, **options):
        if name == "default":
            return None
        return LoRARequest(name, 1 + NAMES.index(name), str(self.root / name), **options)

    def check(self, *names, prompts=PROMPTS, **options):
        """One batch; prompts and names in turns."""
        requests = [self.request(names[i % len(names)]) for i in range(len(prompts))]
        outputs = self.llm.generate(
            prompts, greedy(4, **options), lora_request=requests, use_tqdm=False
        )
        for i, name in enumerate(names):
            assert_greedy_equals(outputs[i :: len(names)], self.references[name])
        return outputs

    @property
    def manager(self):
        return manager_of(self.llm)

    @property
    def slots(self):
        return [adapter for adapter in self.manager.rest._modules.lora_index_to_id if adapter]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    root = tmp_path_factory.mktemp("rest")
    base, default = make_pair(root, target_modules=["q_proj", "up_proj"])
    references = {"default": load_reference(base, default)}
    make_random_adapter(base, root / "mix", num_experts=2, top_k=2, r=8, dtype=torch.float32)
    references["mix"] = load_reference(base, root / "mix")
    for seed, (name, options) in enumerate(LORAS.items()):
        references[name] = make_lora(base, root / name, seed, **options)
    with engine(
        base, default, enable_lora=True, max_loras=3, max_lora_rank=16, max_cpu_loras=4,
        max_num_batched_tokens=256, additional_config={"adafuse": {"lora": "both"}},
    ) as llm:  # fmt: skip
        yield Served(llm, root, references)


def test_one_batch(served):
    outputs = served.check("default", "all", "mix", "few")
    served.check("head", "default", "embed", "all")
    said = [completion(output)[0] for output in outputs[:1]]
    for name in NAMES[1:]:  # alone, and every adapter matters
        [output] = served.check(name, prompts=PROMPTS[:1])
        said.append(completion(output)[0])
    assert all(said.count(one) == 1 for one in said)


def test_they_come_and_go_together(served):
    for turn in range(2):
        for at in range(0, 4, 1 + turn):
            served.check("default", *[*LORAS, *LORAS][at : at + 3], prompts=PROMPTS[:4])
            manager = served.manager
            placed = {a for a in manager.pool.placed if manager.hosted[a].rest is not None}
            assert placed == set(served.slots)
    engine_ = served.llm.llm_engine
    head, embed = (served.request(name).lora_int_id for name in ("head", "embed"))
    assert engine_.add_lora(served.request("head")) and engine_.pin_lora(head)
    for name in ("all", "embed", "mix", "few"):
        served.check(name, prompts=PROMPTS[:1])
        assert head in served.slots
    assert engine_.remove_lora(head) and head not in served.slots
    assert head not in served.manager.hosted
    served.check("head", "embed", prompts=PROMPTS[:2])
    assert {head, embed} <= set(served.slots)


def test_a_reload_changes_both_parts(served):
    path, options = served.root / "all", LORAS["all"]
    before = served.references["all"]
    shutil.copytree(path, served.root / "kept")
    other = make_lora(served.root / "base", served.root / "other", 9, **options)
    for source, reference in (("other", other), ("kept", before)):
        served.references["all"] = reference
        shutil.rmtree(path)
        shutil.copytree(served.root / source, path)
        served.llm.llm_engine.add_lora(served.request("all", load_inplace=True))
        served.check("all", "default", prompts=PROMPTS[:4])
        served.check("all", prompts=PROMPTS[:4])  # out of the cache


def test_steps_without_such_adapters_leave_vllms_part_alone(served, monkeypatch):
    def fail(*arguments):
        raise AssertionError("a step without a rest asked vLLM's LoRA")

    served.check("head", "all", prompts=PROMPTS[:2])
    served.check("default", "few")
    monkeypatch.setattr(rest._Modules, "map", fail)
    monkeypatch.setattr(rest.LogitsProcessorWithLoRA, "_get_logits", fail)
    served.check("default", "mix", "few")
    served.check("default")


def test_passports_are_made_of_the_backbones_embedding(served):
    served.check("head", "embed", "all", prompts=PROMPTS[:3])  # the wrapper is in use
    model = served.llm.collective_rpc(lambda worker: worker.get_model())[0]
    model.reload_adapter()
    served.check("default", "mix", "embed", prompts=PROMPTS[:6])


def test_slots_that_a_sleep_took_are_written_anew(served):
    served.check("head", "embed", prompts=PROMPTS[:2])
    manager, [wrapper] = served.manager, served.manager.rest._modules.punica_wrapper_mapping.values()
    placed, slots = dict(manager.pool.placed), sorted(served.slots)
    for module in manager.rest._modules.modules.values():
        module.lora_a_stacked.fill_(torch.nan), module.lora_b_stacked.fill_(torch.nan)
    wrapper._embeddings_indices.fill_(1 << 40)
    served.llm.collective_rpc("reload_weights")
    assert manager.pool.placed == placed and sorted(served.slots) == slots
    assert not wrapper._embeddings_indices.any()
    served.llm.reset_prefix_cache()
    served.check("default", "head", "few", "embed", prompts=PROMPTS[:4])
    served.check("head", "embed", "all", prompts=PROMPTS[:3])


def test_dummy_steps_run_vllms_part(served, monkeypatch):
    mapped, map_ = [], rest._Modules.map
    monkeypatch.setattr(
        rest._Modules, "map", lambda self, *ids: (mapped.append(ids), map_(self, *ids))
    )
    served.check("head", "all", prompts=PROMPTS[:2])
    before = served.slots
    mapped.clear()
    served.llm.collective_rpc(
        lambda worker: worker.model_runner._dummy_run(12, num_active_loras=3)
    )
    [(tokens, rows), last] = mapped
    assert {*tokens} == {*rows} == {1, 2, 3} and {*last[0]} == {0}
    assert served.slots == before
    served.check("head", "all", prompts=PROMPTS[:2])


def test_prompt_logprobs_are_refused(served):
    for name in ("default", "head"):
        with pytest.raises(AdapterRefused, match="prompt_logprobs cannot be used"):
            served.check(name, prompts=PROMPTS[:1], prompt_logprobs=1)
    served.check("head", prompts=PROMPTS[:1])


def rewrite(path, name, change):
    tensors = load_file(path / "adapter_model.safetensors")
    [key] = [key for key in tensors if name in key]
    tensors[key] = change(tensors[key])
    save_file(tensors, path / "adapter_model.safetensors")


REFUSED = {
    "rank": ({"r": 17}, None, "--max-lora-rank is 16", "set it to 17"),
    "other weights": (
        {}, ("lm_head.base_layer", lambda t: t * 1.05), "lm_head.base_layer.weight", "another than",
    ),
    "vocabulary": ({}, ("lm_head.lora_B", lambda t: t[1:]), "lm_head.lora_B", "shape"),
    "base vocabulary": (
        {}, ("lm_head.base_layer", lambda t: t[1:].clone()), "lm_head.base_layer", "another than",
    ),
    "missing": ({"target_modules": ["lm_head", "embed_tokens"]}, "embed", "model.embed_tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(served, case, tmp_path):
    options, change, *expected = REFUSED[case]
    options = {"r": 4, "lora_alpha": 4, "target_modules": ["lm_head"]} | options
    make_lora(served.root / "base", tmp_path / "bad", 1, **options)
    if change == "embed":
        file = tmp_path / "bad" / "adapter_model.safetensors"
        save_file({k: t for k, t in load_file(file).items() if "embed" not in k}, file)
    elif change:
        rewrite(tmp_path / "bad", *change)
    with pytest.raises(AdapterError) as refused:
        served.llm.llm_engine.add_lora(LoRARequest("bad", 99, str(tmp_path / "bad")))
    assert all(part in str(refused.value) for part in expected), str(refused.value)
    served.check("head", "default", prompts=PROMPTS[:2])


@pytest.mark.parametrize(
    "supported, only, wrapped",
    [
        (["qkv_proj", "embed_tokens", "lm_head"], None, ["model.embed_tokens", "lm_head"]),
        (["qkv_proj"], None, []),  # Gemma 2: its embedding is the output head
        (["qkv_proj", "embed_tokens", "lm_head"], ["lm_head", "q_proj"], ["lm_head"]),
    ],
)
def test_vllms_part_has_what_the_class_and_the_options_allow(supported, only, wrapped):
    modules = rest._Modules.__new__(rest._Modules)
    modules.supported_lora_modules, modules._only = supported, only
    modules.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    names = ["model.embed_tokens", "lm_head", "model.layers.0.self_attn.qkv_proj"]
    assert [name for name in names if modules._match_target_modules(name)] == wrapped
