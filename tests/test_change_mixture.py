"""One LoRA more in a mixture, or one less: a row of the router, and all other routes as they were."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_compose_context import SMALL, options, tensors_of, text  # noqa: F401
from test_compose_experts import WORDS, base, loras, paths, samples, write_text  # noqa: F401
from transformers import AutoTokenizer
from vllm_adafuse.cli.main import main
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.experts import change
from vllm_adafuse.experts.change import change_mixture
from vllm_adafuse.experts.compose import RouterOptions, compose_experts
from vllm_adafuse.experts.context import ContextOptions, Form
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.offline.routing import OfflineRouter


@pytest.fixture(scope="module")
def two(base, loras, text, tmp_path_factory):  # noqa: F811
    """Of the first and the last LoRA, with a router that sees the past."""
    some = {name: path for name, path in paths(loras).items() if name != "law"}
    out = tmp_path_factory.mktemp("two") / "adapter"
    return compose_experts(some, out, base, options=options(text, lr=1e-3)).path


def training(*data, **changes):
    return ContextOptions(data, **SMALL | changes)


def routes(adapter, base, file):  # noqa: F811
    """Of the tokens of 60 requests of ten: names of their experts in order, and the weights."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(base)(file.read_text())["input_ids"][:600])
    loaded = load_adapter(adapter)
    router, names = OfflineRouter(loaded, base), loaded.config.expert_names
    found = [router.routes(request) for request in ids.split(10)]
    experts, weights = (torch.cat(parts) for parts in zip(*found))
    return [[names[e] for e in row] for row in experts.tolist()], weights


def assert_others_stay(before, after, name):
    """Tokens that do not use `name` in either have the same experts and weights; there are tokens of
    both kinds."""
    uses = [name in one or name in other for one, other in zip(before[0], after[0])]
    assert 20 < sum(uses) < len(uses) - 20
    others = torch.tensor(uses).logical_not()
    assert all(b == a for b, a, used in zip(before[0], after[0], uses) if not used)
    torch.testing.assert_close(after[1][others], before[1][others], rtol=0, atol=1e-6)


def test_one_more(base, loras, text, two, tmp_path):  # noqa: F811
    law = {"law": paths(loras)["law"]}
    grown = change_mixture(two, tmp_path / "three", law, options=training(text, seed=2, lr=1e-3))
    assert grown.trained.kept == ("code", "math")
    old, new = tensors_of(two), tensors_of(grown.path)
    for name in ("router.weight", "router.context.weight"):
        assert torch.equal(new[name][:2], old[name]) and new[name][2].any()
    assert_others_stay(routes(two, base, text), routes(grown.path, base, text), "law")
    config = load_adapter(grown.path).config
    assert (config.expert_names, config.ranks) == (("code", "math", "law"), (4, 3, 7))
    assert config.base_hash == load_adapter(two).config.base_hash != ""
    # Its experts are those of one that was composed at once.
    at_once = {name: paths(loras)[name] for name in config.expert_names}
    whole = compose_experts(
        at_once, tmp_path / "whole", base, options=RouterOptions(router="uniform")
    ).path
    for name, tensor in tensors_of(whole).items():
        if "lora" in name:
            torch.testing.assert_close(new[name].float(), tensor.float())
    less = change_mixture(grown.path, tmp_path / "less", {}, ["law"])
    assert less.trained is None
    back = tensors_of(less.path)
    assert back.keys() == old.keys()
    assert all(torch.equal(back[name].to(tensor.dtype), tensor) for name, tensor in old.items())


def test_one_less(base, loras, text, two, tmp_path):  # noqa: F811
    """Of a router with a bias, a temperature and a softmax over all; the backbone is elsewhere."""
    whole = make_random_adapter(
        base, tmp_path / "whole", num_experts=4, top_k=2, r=[4, 8, 2, 4], lora_alpha=[8, 4, 2, 1],
        router_bias=True, router_temperature=0.7, router_context="mean", router_context_scale=2.0,
        router_context_half_life=9.0,
        router_weights="topk_softmax", dtype=torch.float32, expert_names=["a", "b", "c", "d"],
    )  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(whole, elsewhere)
    file = elsewhere / "adapter_config.json"
    raw = json.loads(file.read_text()) | {"base_model_name_or_path": "some/where"}
    file.write_text(json.dumps(raw))
    out = change_mixture(elsewhere, tmp_path / "out", {}, ["b"]).path
    before, config = load_adapter(elsewhere).config, load_adapter(out).config
    assert config.expert_names == ("a", "c", "d") and config.scales == (
        before.scales[0], *before.scales[2:]
    )  # fmt: skip
    for same in ("base_model", "top_k", "temperature", "context_scale", "router_weights", "context_half_life"):
        assert getattr(config, same) == getattr(before, same)
    old, new = tensors_of(elsewhere), tensors_of(out)
    for name in ("router.weight", "router.bias", "router.context.weight"):
        assert torch.equal(new[name], old[name][[0, 2, 3]])
    assert_others_stay(routes(elsewhere, base, text), routes(out, base, text), "b")
    softmax = {"router_weights": "softmax_topk", "dtype": torch.float32}
    of_all = make_random_adapter(base, tmp_path / "of_all", num_experts=3, top_k=1, r=2, **softmax)
    less = change_mixture(of_all, tmp_path / "of_two", {}, ["expert_1"])
    (before_, weights), (after_, more) = (routes(p, base, text) for p in (of_all, less.path))
    stay = torch.tensor([b == a for b, a in zip(before_, after_)])
    assert 20 < stay.sum() and (more[stay] > weights[stay]).all()
    assert any("those removed leave their share to the others" in n for n in less.notes)
    alone = change_mixture(out, tmp_path / "alone", {}, ["a", "c"])
    assert load_adapter(alone.path).config.top_k == 1 and "1 of 1 experts" in alone.notes[0]


def test_a_router_of_tokens_alone_gets_a_row_and_a_bias(base, loras, samples, tmp_path):  # noqa: F811
    some = {name: path for name, path in paths(loras).items() if name != "math"}
    texts = {name: samples[name] for name in some}
    fitted = compose_experts(some, tmp_path / "two", base, texts, RouterOptions(top_k=1)).path
    (file,), law = samples["math"], samples["law"][0]
    grown = change_mixture(
        fitted, tmp_path / "three", {"math": paths(loras)["math"]},
        options=training(law, labelled=(("math", file),), steps=12, batch_size=4),
    )  # fmt: skip
    old, new = tensors_of(fitted), tensors_of(grown.path)
    assert "router.context.weight" not in new and load_adapter(grown.path).config.top_k == 1
    for name in ("router.weight", "router.bias"):
        assert torch.equal(new[name][:2], old[name]) and new[name][2].any()
    assert_others_stay(routes(fitted, base, file), routes(grown.path, base, file), "math")


def test_the_router_stays_of_its_form(base, loras, text, tmp_path, monkeypatch):  # noqa: F811
    """What it is trained as is what it was, and what is written."""
    form = {"router_context": "mean", "router_context_scale": 2.0, "router_temperature": 0.7}
    form |= {"router_context_half_life": 9.0}
    form |= {"router_input": "embedding", "router_weights": "softmax_topk", "router_bias": True}
    old = make_random_adapter(base, tmp_path / "old", num_experts=3, r=4, dtype=torch.float32, **form)
    asked, train = [], change.train_router

    def record(*arguments, **options):
        asked.extend(arguments)
        return train(*arguments, **options)

    monkeypatch.setattr(change, "train_router", record)
    law = {"law": paths(loras)["law"]}
    made = change_mixture(old, tmp_path / "new", law, ["expert_1"], options=training(text, steps=1))
    assert asked[3] == Form(2, "embedding", "mean", 2.0, "softmax_topk", True, 0.7, 9.0)
    before, after = load_adapter(old).config, load_adapter(made.path).config
    assert after.expert_names == ("expert_0", "expert_2", "law") and "their share" in made.notes[-1]
    for same in ("base_model", "base_hash", "router_input", "router_weights", "temperature"):
        assert getattr(after, same) == getattr(before, same)
    assert (after.router_context, after.context_scale, after.context_half_life) == ("mean", 2.0, 9.0)
    assert {"router.bias", "router.context.weight"} < tensors_of(made.path).keys()


def test_labels_say_whose_text_it_is(base, loras, text, two, tmp_path):  # noqa: F811
    """Of LoRAs that know nothing: what the router learns of this text, the label says."""
    law, file = {"law": paths(loras)["law"]}, write_text(tmp_path / "l.txt", WORDS["law"], 4, 400)
    last = []
    for label in ("law", "code"):
        made = change_mixture(
            two, tmp_path / label, law, options=training(labelled=((label, file),), steps=25, seed=1)
        )
        names, _ = routes(made.path, base, file)
        last.append(sum(row[0] == "law" for row in names) / len(names))
    assert last[0] > 0.7 and last[1] < 0.2


def test_the_command(base, loras, text, two, tmp_path, capsys):  # noqa: F811
    small = ["--steps", "2", "--length", "32", "--batch-size", "2", "--dtype", "float32"]
    add = [f"law={paths(loras)['law']}", "--mixture", str(two), "--data", str(text)]
    three = str(tmp_path / "three")
    assert main(["compose-experts", *add, *small, "--labels", f"law={text}", "--output", three]) == 0
    printed = capsys.readouterr()
    assert "rows kept as they were: code, math" in printed.out and "train router" in printed.err
    less = ["compose-experts", "--mixture", three, "--remove", "code", "--output", f"{three}-code"]
    assert main(less) == 0
    assert main(["check", f"{three}-code", "--base", str(base)]) == 0
    left = load_adapter(f"{three}-code")
    assert left.config.expert_names == ("math", "law")
    # What only the expert that is gone adapted is adapted no more.
    assert left.config.target_modules == ("o_proj", "q_proj", "up_proj")
    assert [name for name in left.projections if "up_proj" in name] == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--remove": "art"}, 'it has no expert "art" to remove; it has code, math'),
        ({"--remove": None}, "nothing is to change: name a LoRA to add, or an expert with --remove"),
        ({"--data": "a.txt"}, "--data: expected a LoRA to add beside it"),
        ({"--labels": "math=a.txt"}, "--labels: expected a LoRA to add beside it"),
        ({"--top-k": "3"}, "--top-k: expected none beside --mixture, which has its own"),
        ({"--router-context": "mean"}, "--router-context: expected none beside --mixture"),
        ({"--router-context-half-life": "16"}, "--router-context-half-life: expected none beside --mixture"),
        ({"--mixture": None}, "--remove: expected --mixture beside it"),
        ({"+code": "LORA"}, "there is no text to train the router on"),
        ({"+code": "LORA", "--data": "a.txt"}, "it has an expert code already; name the LoRA"),
        ({"+law": "LORA", "--data": "a.txt", "--labels": "art=b"}, 'text of "art": no such expert'),
        ({"+law": "LORA", "--data": "a.txt", "--base": "OTHER"}, "shape [2, 128], expected [2, 64]"),
        ({"+law": "LORA", "--data": "a.txt", "--base": "ALIKE"}, "`base_model_hash` is"),
    ],
)
def test_bad_options(base, loras, two, tmp_path, capsys, changes, said):  # noqa: F811
    from vllm_adafuse.tiny import make_tiny_backbone

    given, words = {"--mixture": str(two), "--remove": "code"} | changes, []
    for option, value in given.items():
        if value in ("OTHER", "ALIKE"):
            shape = {"hidden_size": 64} if value == "OTHER" else {"seed": 8}
            value = str(make_tiny_backbone(tmp_path / "base", **shape))
        if option[0] == "+":
            words.insert(0, f"{option[1:]}={paths(loras)['law']}")
        elif value is not None:
            words += [option, value]
    if "+code" in given:
        words.remove("--remove"), words.remove("code")
    out = tmp_path / "out"
    assert main(["compose-experts", *words, "--output", str(out)]) == 1 and not out.exists()
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_changed(base, loras, two, tmp_path):  # noqa: F811
    with pytest.raises(AdapterError, match="all of its experts are to be removed"):
        change_mixture(two, tmp_path / "out", {}, ["code", "math"])
    with pytest.raises(AdapterError, match="trains its row of the router, which needs text"):
        change_mixture(two, tmp_path / "out", {"law": paths(loras)["law"]})
    many = {f"{i}": paths(loras)["law"] for i in range(1023)}
    with pytest.raises(AdapterError, match="1025 experts, expected 1024 at most"):
        change_mixture(two, tmp_path / "out", many, options=training("a.txt"))
    other = tmp_path / "other"
    shutil.copytree(paths(loras)["law"], other)
    file = other / "adapter_config.json"
    raw = json.loads(file.read_text()) | {"base_model_name_or_path": "some/where"}
    file.write_text(json.dumps(raw))
    with pytest.raises(AdapterError, match="different backbones .the mixture adapter: .*some/where"):
        change_mixture(two, tmp_path / "out", {"law": other}, options=training("a.txt"))
    idle = make_random_adapter(base, tmp_path / "idle", num_experts=2, r=2)
    file = idle / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in (name for name in tensors if ".lora_" in name):
        tensors[name][1] = 0
    save_file(tensors, file)
    with pytest.raises(AdapterError, match="of expert_1, which would stay, are all zeros"):
        change_mixture(idle, tmp_path / "out", {}, ["expert_0"])
    later = make_random_adapter(base, tmp_path / "later", num_experts=3, r=2, router_layer=1)
    with pytest.raises(AdapterError, match="its routers stand inside the layers"):
        change_mixture(later, tmp_path / "out", {}, ["expert_0"])
    with pytest.raises(AdapterError, match="is not empty|exists"):
        change_mixture(two, later, {}, ["code"])
