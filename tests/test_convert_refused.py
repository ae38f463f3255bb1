"""Sources that are damaged, unsupported or dangerous: each is refused with a message that helps."""

import json
import pickle

import convert_sources as sources
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_adafuse.cli.main import main
from vllm_adafuse.convert.options import Options
from vllm_adafuse.convert.registry import convert
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.tiny import make_tiny_backbone

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("refused") / "base")


def mixlora(base, path, **config):
    return sources.mixlora(base, path, ("q_proj", "up_proj"), pickle=False, **config)


def hydralora(base, path, **config):
    return sources.routed_lora(base, path, True, **config)


def loramoe(base, path, **config):
    return sources.routed_lora(base, path, False, **config)


def plain(base, path, **config):
    """A plain LoRA on one linear, written without PEFT."""
    draw = sources.Draw()
    stem = f"{sources.PEFT}layers.0.mlp.up_proj"
    a, b = draw.pair(128, 192, 4)
    config = {
        "peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "lora_alpha": 8
    } | config  # fmt: skip
    tensors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    return sources.write(path, config, tensors)


def refused(source, *words, **options):
    """The problems of a refused source, which mention all words; nothing is left behind."""
    out = source.with_name("out")
    with pytest.raises(AdapterError) as caught:
        convert(source, out, options=Options(**options))
    text = "\n".join(caught.value.problems)
    for word in words:
        assert word in text, text
    assert not out.exists()
    return caught.value.problems


def edit(source, **changes):
    file = source / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def edit_tensors(source, change):
    tensors = load_file(source / WEIGHTS)
    change(tensors)
    save_file(tensors, source / WEIGHTS)


MUST_BE_PLAIN = "merge_and_unload"


@pytest.mark.parametrize(
    "make, config, words",
    [
        (mixlora, {"routing_strategy": "mixlora-switch"}, ["mixlora-switch", "neighbours"]),
        (mixlora, {"routing_strategy": "mixlora-dynamic"}, ["mixlora-dynamic", "k differs"]),
        (mixlora, {"act_fn": "gelu"}, ["act_fn", "gelu", "expected silu"]),
        (mixlora, {"use_dora": True}, ["use_dora", "DoRA", MUST_BE_PLAIN]),
        (mixlora, {"expert_lora": {"lora_alpha": 20}}, ["scale 5", "own is 2", "--expert-lora"]),
        (mixlora, {"expert_lora": {"r": 8}}, ["expert_lora", "r 8", "one r for both"]),
        (mixlora, {"expert_lora": {"use_dora": True}}, ["expert_lora", "DoRA"]),
        (mixlora, {"num_experts": "gone"}, ["num_experts", "missing", "an integer from 1 to"]),
        (mixlora, {"num_experts": 10**9}, ["num_experts", "from 1 to 1024"]),
        (mixlora, {"r": 10**9}, ["`r` is 1000000000", "from 1 to 65536"]),
        (mixlora, {"top_k": 0}, ["top_k", "is 0", "an integer from 1 to"]),
        (mixlora, {"top_k": 5}, ["top_k", "is 5", "num_experts (4)"]),
        (mixlora, {"r": True}, ["`r` is true", "an integer from 1 to"]),
        (mixlora, {"base_model_name_or_path": None}, ["base_model_name_or_path", "--base"]),
        (mixlora, {"base_model_name_or_path": "no/where"}, ["no/where is not on this machine"]),
        (plain, {"use_dora": True}, ["use_dora", MUST_BE_PLAIN]),
        (plain, {"bias": "all"}, ["bias", '"all"', "train without"]),
        (plain, {"lora_bias": True}, ["lora_bias"]),
        (plain, {"modules_to_save": ["lm_head"]}, ["modules_to_save", "lm_head"]),
        (plain, {"trainable_token_indices": [1]}, ["trainable_token_indices"]),
        (plain, {"alora_invocation_tokens": [1]}, ["alora_invocation_tokens", "aLoRA"]),
        (plain, {"layer_replication": [[0, 2]]}, ["layer_replication"]),
        (plain, {"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4", "path_initial_model"]),
        (plain, {"rank_pattern": {"(": 1}}, ["rank_pattern", "expected patterns and numbers"]),
        (plain, {"alpha_pattern": {"up_proj": "x"}}, ["alpha_pattern", "no positive number"]),
        (plain, {"r": 8}, ["shape [4, 128], expected [8, 128]", "r is 8", "up_proj.lora_A"]),
        (plain, {"arrow_config": {}, "peft_type": "ADAFUSE"}, ["in this format already"]),
        (plain, {"arrow_config": {"top_k": 1}}, ["router of an Arrow mixture", "above it"]),
        (plain, {"peft_type": "XLORA"}, ["X-LoRA", "two passes", "compose-experts", "layers.0"]),
        (sources.mola, {}, ["does not save its top_k", "--top-k"]),
        (sources.mola, {"r": [4]}, ["`r` is [4]", "one for layer 1"]),
        (sources.mola, {"use_rslora": True}, ["use_rslora", "alpha / r"]),
        (plain, {"target_modules": ["up_proj"]}, ["no tensors of model.layers.1.mlp.up_proj"]),
        (hydralora, {"lora_nums": 3}, ["lora_route.weight", "[4, 128], expected [3, 128]"]),
        (loramoe, {"lora_nums": 5}, ["lora_A4.weight", "is missing, expected [4, 128]"]),
        (loramoe, {"lora_alpha": "gone"}, ["lora_alpha", "missing", "a positive number"]),
    ],
)
def test_config(make, config, words, base, tmp_path):
    source = make(base, tmp_path / "source")
    edit(source, **config)
    refused(source, *words)


def drop(ending):
    def change(tensors):
        for name in [name for name in tensors if name.endswith(ending)]:
            del tensors[name]

    return change


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    "make, change, words",
    [
        (mixlora, drop("moe_gate.weight"), ["moe_gate.weight", "is missing", "[4, 128]"]),
        (mixlora, drop("experts.2.lora_B.weight"), ["experts.2.lora_B.weight", "[192, 4]"]),
        (
            mixlora,
            lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name],
            ["no tensors of model.layers.2.", "target_modules", "incomplete"],
        ),
        (
            mixlora,
            put("mixlora.layers.0.mlp.up_proj.experts.4.lora_A.weight", torch.ones(4, 128)),
            ["experts.4.lora_A.weight", "unknown name"],
        ),
        (
            mixlora,
            put("mixlora.layers.1.mlp.moe_gate.weight", torch.full((4, 128), torch.nan)),
            ["layers.1.mlp.moe_gate.weight", "NaN or Inf"],
        ),
        (
            mixlora,
            put("mixlora.layers.1.mlp.moe_gate.weight", torch.ones(4, 128).double()),
            ["float64", "expected one of F32"],
        ),
        (
            mixlora,
            put("mixlora.layers.7.self_attn.q_proj.lora_A.weight", torch.ones(4, 128)),
            ["layers.7.self_attn.q_proj", "fits no linear", "--base"],
        ),
        (mixlora, drop("lora_A.weight"), ["lora_A.weight", "and 12 more", "is missing"]),
        (mixlora, lambda t: (drop("A.weight")(t), drop("B.weight")(t)), ["routers alone"]),
        (hydralora, drop("lora_B1.weight"), ["lora_B1.weight", "is missing, expected [192, 4]"]),
        (hydralora, drop("up_proj.lora_A.weight"), ["up_proj.lora_A.weight", "is missing"]),
        (loramoe, drop("lora_A0.weight"), ["lora_A0.weight", "is missing"]),
        (loramoe, drop("lora_route.weight"), ["lora_route.weight", "is missing"]),
        (plain, drop("lora_B.weight"), ["lora_B.weight", "is missing, expected [192, 4]"]),
        (
            plain,
            put("base_model.model.lm_head.lora_A.weight", torch.ones(4, 128)),
            ["base_model.model.lm_head.lora_A.weight", "output head", MUST_BE_PLAIN],
        ),
        (
            plain,
            put("base_model.model.score.weight", torch.ones(4, 128)),
            ["base_model.model.score.weight", "unknown name", "another model"],
        ),
        (
            plain,
            put(f"{sources.PEFT}layers.0.mlp.up_proj.lora_magnitude_vector", torch.ones(192)),
            ["DoRA", WEIGHTS, MUST_BE_PLAIN],
        ),
        (
            plain,
            put("base_model.internal_xlora_classifier.layers.3.weight", torch.ones(4, 128)),
            ["X-LoRA", "incomplete", "layers.0.weight"],
        ),
        (
            plain,
            put("model.layers.0.mlp.moe_adapter.router.weight", torch.ones(4, 128)),
            ["PESC", "GELU"],
        ),
        (drop, None, ["holds 1 tensors (other.weight)", "MixLoRA", "docs/convert.md"]),
    ],
)
def test_tensors(make, change, words, base, tmp_path):
    if make is drop:  # nobody's names
        source = plain(base, tmp_path / "source")
        save_file({"other.weight": torch.ones(1)}, source / WEIGHTS)
    else:
        source = make(base, tmp_path / "source")
        edit_tensors(source, change)
    refused(source, *words)


def test_all_problems_are_listed_at_once_and_alike_ones_share_a_line(base, tmp_path):
    source = mixlora(base, tmp_path / "source", routing_strategy="mixlora-switch", act_fn="relu")
    edit_tensors(source, drop("moe_gate.weight"))
    problems = refused(source, "mixlora-switch", "relu", "moe_gate")
    assert len(problems) == 3 and "layers.2.mlp.moe_gate.weight" in problems[2]


def test_options_that_say_nothing_or_too_much(base, tmp_path):
    source = hydralora(base, tmp_path / "source")
    refused(source, "--top-k: says nothing about HydraLoRA adapters", top_k=2)
    source = sources.mola(base, tmp_path / "mola")
    refused(source, "--top-k has 2 numbers", "3 layers", top_k=(2, 2))
    refused(source, "--top-k is 3", "layers.0.", "2 experts", top_k=3)
    source = sources.moe_peft(base, tmp_path / "moe-peft", "mola", lambda name: True, top_k=2)
    refused(source, "--top-k is 3", "says 2", top_k=3)
    assert main(["convert", str(source), str(tmp_path / "out"), "--top-k", "0"]) == 1


def test_files(base, tmp_path):
    source = plain(base, tmp_path / "source")
    (source / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes()[:-8])
    refused(source, WEIGHTS, "not a sound safetensors file")
    (source / WEIGHTS).unlink()
    refused(source, f"neither {WEIGHTS} nor adapter_model.bin")
    (source / "adapter_config.json").write_text("[1]")
    refused(source, "adapter_config.json", "holds a list")
    (source / "adapter_config.json").write_text("{")
    refused(source, "adapter_config.json", "not valid JSON")
    refused(tmp_path / "nowhere", "no such directory")
    refused(base, "checkpoint of a whole model")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(AdapterError, match="not empty"):
        convert(source, tmp_path / "taken")


def test_whole_model_formats(tmp_path):
    for file, word in (("xlora_config.json", "X-LoRA"), ("moe_model.bin", "PESC")):
        source = tmp_path / word
        source.mkdir()
        (source / file).write_text("{}")
        refused(source, word, file)
    camelidae = tmp_path / "camelidae"
    camelidae.mkdir()
    (camelidae / "config.json").write_text('{"model_type": "llama", "adapter_dim": 512}')
    refused(camelidae, "PESC", "own model code")


def arrow(base, tmp_path, **config):
    """Arrow's layout, written without PEFT: two experts on one linear."""
    root = tmp_path / "arrow"
    for name in ("task_0", "task_1", "gks_0"):
        plain(base, root / name)
    config = {
        "top_k": 1, "use_gks": False, "task_adapter_names": ["task_0", "task_1"],
        "gks_adapter_names": ["gks_0"], "rng_seed": None, "router_temperature": 1.0,
    } | config  # fmt: skip
    plain(base, root / "arrow_router", arrow_config=config)
    return root


def test_arrow(base, tmp_path):
    root = arrow(base, tmp_path, use_gks=True)
    refused(root, "use_gks is true", "--gks done", "--gks subtract")
    refused(root / "task_0", "--gks: says nothing about PEFT LoRA", gks="done")
    refused(root / "arrow_router", "above it")
    edit(root / "task_1", use_dora=True)
    refused(root, "use_dora", gks="done")
    edit(root / "task_1", use_dora=False)
    edit_tensors(root / "task_1", lambda t: t.update(
        {name.replace("layers.0", "layers.1"): t.pop(name) for name in list(t)}
    ))  # fmt: skip
    refused(root, "task_1", "other linears", "compose-experts", gks="done")
    (root / "task_1" / WEIGHTS).unlink()
    refused(root, "task_1", "neither", gks="done")


def test_arrow_s_numbers(base, tmp_path):
    root = arrow(base, tmp_path, top_k=3)
    refused(root, "top_k is 3", "1 to 2")
    edit(root / "arrow_router", arrow_config={"top_k": 1})
    refused(root, "arrow_config", "task_adapter_names")
    edit(root / "arrow_router", arrow_config={"task_adapter_names": ["../task_0"]})
    refused(root, "../task_0", "names of directories")
    edit(root / "arrow_router", arrow_config={"top_k": 1, "task_adapter_names": ["task_0"]})
    refused(root, "use_gks is false", gks="done")


def test_a_pickle_of_views_and_parameters(base, tmp_path):
    source = hydralora(base, tmp_path / "source")
    _, tensors = sources.read(source)
    whole = torch.cat([tensor.flatten() for tensor in tensors.values()]).requires_grad_()
    parts = whole.split([tensor.numel() for tensor in tensors.values()])
    views = {name: part.view_as(tensors[name]) for name, part in zip(tensors, parts)}
    views |= {name: torch.nn.Parameter(t) for name, t in list(tensors.items())[::2]}
    torch.save(views, source / "adapter_model.bin")
    (source / WEIGHTS).unlink()
    convert(source, tmp_path / "out")
    same = hydralora(base, tmp_path / "same")
    convert(same, tmp_path / "expected")
    found, expected = (load_file(tmp_path / d / WEIGHTS) for d in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


class Malicious:
    """Unpickled carelessly, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "plain pickle"])
def test_a_pickle_that_would_run_code(legacy, base, tmp_path):
    source, trap = plain(base, tmp_path / "source"), tmp_path / "trap"
    (source / WEIGHTS).unlink()
    content = {"mixlora.layers.0.mlp.moe_gate.weight": Malicious(trap)}
    file = source / "adapter_model.bin"
    if legacy:
        file.write_bytes(pickle.dumps(content, protocol=2))
        pickle.loads(file.read_bytes())  # noqa: S301 - shows that the trap works
    else:
        torch.save(content, file)
        torch.load(file, weights_only=False)
    assert trap.exists()
    trap.unlink()
    refused(source, "adapter_model.bin", "could run code", "open", "safetensors")
    assert not trap.exists()


def test_a_module_beside_a_pickle_is_not_imported(base, tmp_path, monkeypatch):
    source, trap = sources.mixlora(base, tmp_path / "source"), tmp_path / "trap"
    (source / "torch.py").write_text(f"open({str(trap)!r}, 'w')")
    monkeypatch.chdir(source)
    assert convert(".", tmp_path / "out").kind == "MixLoRA"
    assert not trap.exists()


def test_a_pickle_that_asks_for_all_memory(base, tmp_path):
    source = plain(base, tmp_path / "source")
    (source / WEIGHTS).unlink()
    torch.save({"x": torch.zeros(1).expand(1 << 19, 1 << 19)}, source / "adapter_model.bin")
    assert (source / "adapter_model.bin").stat().st_size < 4096
    refused(source, "adapter_model.bin", "far more memory than its size")


@pytest.mark.parametrize(
    "content, words",
    [
        ([torch.zeros(2)], ["holds a list", "dict of tensors"]),
        ({"a": 1}, ["'a' is a int"]),
        ({"a": torch.eye(3).to_sparse()}, ["tensor a", "sparse"]),
        (b"not a pickle", ["is damaged"]),
        (b"", ["is damaged"]),
        (b"PK\x03\x04 but no zip", ["is damaged"]),
    ],
)
def test_pickles_of_other_things(content, words, base, tmp_path):
    from vllm_adafuse.convert import unpickle

    file = tmp_path / "adapter_model.bin"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    limit, unpickle._limit = unpickle._limit, lambda file: None  # this process keeps its memory
    try:
        problem = unpickle._read(file, tmp_path / "out.safetensors")
    finally:
        unpickle._limit = limit
    assert all(word in problem for word in words), problem
