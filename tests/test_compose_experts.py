"""Mixtures of LoRAs: each expert is its LoRA, and the router does what its fit promises."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import convert_sources as sources
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_adafuse.cli.main import main
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.experts.compose import RouterOptions, compose_experts
from vllm_adafuse.experts.router import Features, fit_router
from vllm_adafuse.experts.samples import read_samples
from vllm_adafuse.experts.separability import Separability, text_report
from vllm_adafuse.format.adapter import check_adapter, load_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.offline import reference
from vllm_adafuse.offline.routing import OfflineRouter
from vllm_adafuse.tiny import make_tiny_backbone

ROOT = Path(__file__).parent.parent
COMMON = "the of and to in is a that for with".split()
WORDS = {
    "code": "class return import argument function module object attribute call".split(),
    "law": "must may should when other rules section following".split(),
    "math": "number float integer plus result zero value binary operator".split(),
}


def write_text(path, words, seed, tokens=1500, common=0.5):
    """Sentences of a domain's words and of words that all domains have."""
    draw = random.Random(seed)
    chosen = [draw.choice(COMMON if draw.random() < common else words) for _ in range(tokens)]
    path.write_text(" ".join(chosen))
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_backbone(tmp_path_factory.mktemp("experts") / "base")


@pytest.fixture(scope="module")
def loras(base, tmp_path_factory):
    """Three LoRAs that differ in all that LoRAs may differ in: name -> (PEFT's model, path)."""
    root = tmp_path_factory.mktemp("loras")
    configs = {
        "code": {"r": 4, "lora_alpha": 8},
        "law": {
            "r": 7,
            "lora_alpha": 5,
            "use_rslora": True,
            "target_modules": ["q_proj", "o_proj"],
        },
        "math": {
            "r": 2,
            "lora_alpha": 6,
            "target_modules": ["up_proj", "q_proj"],
            "layers_to_transform": [1],
            "rank_pattern": {"up_proj": 3},
            "alpha_pattern": {"q_proj": 7},
        },
    }
    return {
        name: sources.peft_lora(base, root / name, seed, **config)
        for seed, (name, config) in enumerate(configs.items())
    }


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("samples")
    return {
        name: [write_text(root / f"{name}.txt", words, seed)]
        for seed, (name, words) in enumerate(WORDS.items())
    }


def paths(loras):
    return {name: path for name, (_, path) in loras.items()}


def force(adapter, expert, experts):
    """Makes the router give every token to one expert."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["router.weight"] = torch.zeros_like(tensors["router.weight"])
    tensors["router.bias"] = torch.full((experts,), -1.0)
    tensors["router.bias"][expert] = 1.0
    save_file(tensors, adapter / "adapter_model.safetensors")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"top_k": 1}))


def test_one_lora_alone_is_itself(base, loras, tmp_path):
    for name, (model, path) in loras.items():
        out = compose_experts({name: path}, tmp_path / name).path
        assert check_adapter(out, Backbone.from_path(str(base)))[1] == []
        sources.assert_same(model, base, out)


def test_a_router_forced_to_one_expert_gives_that_lora(base, loras, samples, tmp_path):
    out = compose_experts(paths(loras), tmp_path / "out", base, samples).path
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["format_version"] == 1 and config["expert_names"] == list(loras)
    assert config["r"] == [4, 7, 3] and config["top_k"] == 3
    assert config["x_composed_from"]["separability"]["chance"] == round(1 / 3, 4)
    for expert, (model, _) in enumerate(loras.values()):
        force(out, expert, 3)
        assert check_adapter(out, Backbone.from_path(str(base)))[1] == []
        sources.assert_same(model, base, out)


@torch.no_grad()
def test_a_uniform_router_is_the_average_of_the_loras(base, loras, tmp_path):
    options = RouterOptions(router="uniform")
    out = compose_experts(paths(loras), tmp_path / "out", base, options=options).path
    models = [model for model, _ in loras.values()]
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    adapted = reference.load(base, out, dtype=torch.float32)
    plain = dict(sources.load_base(base).named_modules())
    adapted(torch.arange(6, 11)[None])  # gates of five tokens
    assert torch.allclose(adapted.adafuse.gates, torch.full((1, 5, 3), 1 / 3))
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"):
        bare = plain[name](x[None])
        adapted_by_peft = [model.get_submodule(f"base_model.model.{name}") for model in models]
        deltas = [module(x[None]) - bare for module in adapted_by_peft]
        mean = sum(deltas) / 3
        found = adapted.get_submodule(name)(x[None]) - bare
        assert (found - mean).norm() <= 1e-5 * mean.norm()


def test_domains_are_told_apart_on_text_not_seen(base, loras, samples, tmp_path):
    made = compose_experts(paths(loras), tmp_path / "out", base, samples, RouterOptions(top_k=2))
    found = made.separability
    # Half of all words say nothing; those are right by chance.
    assert found.window_accuracy == 1.0 and 0.6 < found.token_accuracy < 0.8
    assert found.own_weight > 0.5
    held_out = [sum(row) for row in found.tokens]
    assert all(250 < count < 1000 for count in held_out)
    for name, texts in zip(found.names, made.telling):
        own = "".join(WORDS[name])
        assert sum(text.replace("·", "") in own for text in texts) > len(texts) / 2, texts


def test_what_is_measured_is_what_is_served(base, loras, samples, tmp_path):
    options = RouterOptions(top_k=1, router_input="embedding")
    made = compose_experts(paths(loras), tmp_path / "out", base, samples, options)
    router = OfflineRouter(load_adapter(made.path), base)
    texts = read_samples(samples, base, 1003)
    for name, row in zip(loras, made.separability.tokens):
        ids, _ = router.routes(texts[name].held_out)
        assert torch.bincount(ids[:, 0], minlength=3).tolist() == row


@pytest.mark.parametrize("router_input", ["first_norm", "embedding"])
def test_the_fit_is_the_optimum_of_its_loss(router_input, base, samples):
    texts = list(read_samples(samples, base, 1003).values())
    features = Features(base, Backbone.from_path(str(base)), router_input)
    router = fit_router(texts, features)
    seen = [torch.cat([text.fit, text.validation]) for text in texts]
    ids = torch.unique(torch.cat(seen))
    u = features(ids).double()
    norm = (u - u.mean(0)).norm(dim=1).mean()

    def loss(weight, bias):
        total = router.penalty / 2 * (weight * norm).square().sum()
        for domain, text in enumerate(seen):
            log_p = torch.log_softmax(features(text).double() @ weight.T + bias, -1)
            total = total - log_p[:, domain].mean() / len(seen)
        return total

    weight = router.weight.double().requires_grad_()
    bias = router.bias.double().requires_grad_()
    loss(weight, bias).backward()
    assert weight.grad.norm() <= 1e-4 * norm and bias.grad.norm() <= 1e-4
    assert loss(weight, bias) < 0.8 * math.log(3)  # better than guessing


def test_alike_domains_are_called_inseparable(base, loras, tmp_path):
    files = {
        name: [write_text(tmp_path / f"{name}.txt", WORDS["law"], seed)]
        for seed, name in enumerate(loras)
    }
    found = compose_experts(paths(loras), tmp_path / "out", base, files).separability
    assert found.window_accuracy < 0.6 and "hardly tell them apart" in found.verdict


def test_reports(base, loras, samples, tmp_path, capsys):
    out, page = tmp_path / "out", tmp_path / "reports" / "report.html"
    evil = "<b>law</b>"
    arguments = ["compose-experts"]
    for name, path in paths(loras).items():
        arguments.append(f"{evil if name == 'law' else name}={path}")
    for name, files in samples.items():
        arguments += ["--samples", f"{evil if name == 'law' else name}={files[0]}"]
    arguments += ["--base", str(base), "--output", str(out), "--report", str(page)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "own expert first:" in printed.out and "windows of 64" in printed.out
    assert "tokens that speak for each expert" in printed.out and "100%" in printed.err
    text = page.read_text()
    assert text.count("<table>") == 3 and evil not in text and "&lt;b&gt;law&lt;/b&gt;" in text
    assert main(["check", str(out)]) == 0


@pytest.mark.parametrize(
    "tokens, windows, words",
    [
        (0.9, 1.0, "Most tokens tell their domain: 90%"),
        (0.6, 1.0, "clear over 64 tokens"),
        (0.6, 0.7, "only in part: 60%"),
        (0.51, 0.52, "hardly tell them apart"),
    ],
)
def test_the_verdict_goes_by_tokens_and_windows(tokens, windows, words):
    def confusion(right):
        return [[right, 1 - right], [1 - right, right]]

    found = Separability(
        ("a", "b"), confusion(tokens), confusion(windows), confusion(tokens), [[], []]
    )
    assert words in found.verdict
    alone = Separability(("a",), [[1]], [[1]], [[1.0]], [[]])
    assert "one expert" in alone.verdict


def test_a_png(tmp_path):
    pytest.importorskip("matplotlib")
    from vllm_adafuse.experts.picture import write_report

    found = Separability(
        ("a", "b"), [[30, 10], [5, 35]], [[3, 1], [0, 4]], [[0.7, 0.3], [0.2, 0.8]], [[], []]
    )
    assert found.token_accuracy == pytest.approx((30 / 40 + 35 / 40) / 2)
    assert found.window_accuracy == 0.875 and found.own_weight == 0.75
    assert "75.0%" in text_report(found, [[], []])
    write_report(tmp_path / "r.png", found, [[], []])
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def refused(words, loras, tmp_path, base, samples=None, report=None, **options):
    out = tmp_path / "out"
    with pytest.raises((AdapterError, ValueError)) as caught:
        compose_experts(loras, out, base, samples, RouterOptions(**options), report)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not out.exists()


def test_what_is_refused(base, loras, samples, tmp_path):
    dirs = paths(loras)
    some = {name: samples[name] for name in ("code", "law")}
    refused(["no samples of code, law, math", "--router uniform"], dirs, tmp_path, base)
    refused(["no samples of math"], dirs, tmp_path, base, some)
    refused(["samples of art", "no such expert"], dirs, tmp_path, base, samples | {"art": []})
    refused(["uniform router"], dirs, tmp_path, base, samples, router="uniform")
    refused(["top_k is 2", "expected 3"], dirs, tmp_path, base, router="uniform", top_k=2)
    refused(["top_k is 4", "1 to 3"], dirs, tmp_path, base, samples, top_k=4)
    refused(["router is 'best'"], dirs, tmp_path, base, router="best")
    refused(["held_out is 0.9"], dirs, tmp_path, base, held_out=0.9)
    refused([".pdf", ".html or .png"], dirs, tmp_path, base, samples, "report.pdf")
    refused(["needs samples"], dirs, tmp_path, base, None, "r.html", router="uniform")
    refused(["no LoRA"], {}, tmp_path, base)
    many = {f"{i}": dirs["code"] for i in range(1025)}
    refused(["1025 LoRAs, expected 1024 at most"], many, tmp_path, base, router="uniform")
    refused(["nowhere", "--base"], dirs, tmp_path, "nowhere", router="uniform")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    law = samples | {"law": [short]}
    refused(["samples of law", "expected at least 640"], dirs, tmp_path, base, law)
    short.write_bytes(b"\xff\xfe\xff")
    refused(["short.txt", "UTF-8"], dirs, tmp_path, base, law)
    more = {"mola": sources.mola(base, tmp_path / "mola"), **dirs}
    refused(["expert mola", "lora_A / lora_B"], more, tmp_path, base, router="uniform")
    wrong = make_tiny_backbone(tmp_path / "wrong", hidden_size=64)
    words = ["expert code", "[4, 128], expected [4, 64]", "expert math"]
    refused(words, dirs, tmp_path, wrong, router="uniform")
    assert main(["compose-experts", "a=x", "a=y", "--output", str(tmp_path / "o")]) == 1
    with pytest.raises(SystemExit):
        main(["compose-experts", "nameless", "--output", str(tmp_path / "o")])


def test_the_benchmark_at_toy_size(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for suffix in ("py", "h", "rst", "html", "json"):
        for i in range(40):
            lines = [f"{suffix} {'word ' * (j % 5)}line {i} {j} of {suffix}" for j in range(40)]
            (root / f"{i}.{suffix}").write_text("\n".join(lines))
    command = [sys.executable, "-m", "benchmarks.compose_experts", "--size", "toy"]
    command += ["--work", tmp_path / "work", "--roots", root, "--out", tmp_path / "results"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = (tmp_path / "results").iterdir()
    options, *rows = json.loads(file.read_text())["rows"]
    assert options["options"]["size"] == "toy"
    assert len(rows) == 1 + 5 + 1 + 5 and rows[-1]["name"] == "fitted, k = 5"
    assert all(math.isfinite(p) for row in rows for p in row["perplexity"].values())
    assert rows[-1]["token_accuracy"] > 0.2 and "each its own LoRA" in done.stdout


def test_the_documented_figures_are_those_of_a_result_file():
    text = (ROOT / "docs" / "compose-experts.md").read_text("utf-8")
    newest = sorted((ROOT / "benchmarks" / "results").glob("compose-experts-*.json"))[-1]
    _, *rows = json.loads(newest.read_text())["rows"]
    assert newest.name in text
    told = [row for row in rows if any(f"| {row['name']}{end}" in text for end in (" |", " on"))]
    assert len(told) >= 7
    for row in told:
        assert " | ".join(f"{p:.2f}" for p in row["perplexity"].values()) in text
