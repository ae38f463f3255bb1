"""LoRAs that exist, composed with a router that sees the past."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file
from test_compose_experts import WORDS, base, loras, paths, write_text  # noqa: F401
from vllm_adafuse.cli.main import main
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.experts import compose
from vllm_adafuse.experts.compose import RouterOptions, compose_experts
from vllm_adafuse.experts.context import ContextOptions, Form, _model, _scales
from vllm_adafuse.experts.loras import read_experts, stack_experts
from vllm_adafuse.format.adapter import check_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.offline import reference

SMALL = {"steps": 3, "length": 32, "batch_size": 2, "dtype": "float32"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    words = [w for domain in WORDS.values() for w in domain]
    return write_text(root / "any.txt", words, 5, tokens=1200)


def options(text, **changes):
    return RouterOptions(context=ContextOptions((text,), **SMALL | changes))


@pytest.fixture(scope="module")
def composed(base, loras, text, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("composed") / "adapter"
    return compose_experts(paths(loras), out, base, options=options(text))


def tensors_of(path):
    return load_file(path / "adapter_model.safetensors")


def test_experts_stay_and_the_router_is_trained(base, loras, composed):  # noqa: F811
    adapter, problems = check_adapter(composed.path, Backbone.from_path(str(base)))
    assert not problems and adapter.config.router_context == "mean"
    assert (adapter.config.top_k, adapter.config.context_scale) == (2, 4.0)
    assert adapter.config.ranks == (4, 7, 3) and "router.bias" not in adapter.tensors
    bank = stack_experts(read_experts(paths(loras), Backbone.from_path(str(base)), []))
    saved = tensors_of(composed.path)
    assert all(torch.equal(saved[name], tensor) for name, tensor in bank.tensors.items())
    assert saved["router.weight"].any() and saved["router.context.weight"].any()
    trained = composed.trained
    assert trained.tokens > 100 and sum(trained.usage) == pytest.approx(1)
    record = json.loads((composed.path / "adapter_config.json").read_text())["x_composed_from"]
    assert record["router"] == "context" and record["held_out"]["tokens"] == trained.tokens


def test_what_is_trained_is_what_is_written(base, loras, text, composed):  # noqa: F811
    bank = stack_experts(read_experts(paths(loras), Backbone.from_path(str(base)), []))
    assert _scales(bank) == check_adapter(composed.path)[0].config.scales
    model = _model(base, bank, list(loras), Form(2), options(text).context).eval()
    router, saved = model.all_routers[0], tensors_of(composed.path)
    assert model.trainable() == [router.weight, router.context]
    with torch.no_grad():
        router.weight[0].copy_(saved["router.weight"])
        router.context.copy_(saved["router.context.weight"])
        ids = torch.randint(2, 1003, (1, 30), generator=torch.Generator().manual_seed(0))
        expected = reference.load(base, composed.path, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_one_more_lora_trains_one_row(base, loras, text, composed, tmp_path):  # noqa: F811
    two = {name: path for name, path in paths(loras).items() if name != "law"}
    first = compose_experts(two, tmp_path / "two", base, options=options(text)).path
    grown = compose_experts(
        paths(loras), tmp_path / "three", base, options=options(text, router_from=first, seed=3)
    )
    old, new = tensors_of(first), tensors_of(grown.path)
    assert grown.trained.kept == ("code", "math")
    for name in ("router.weight", "router.context.weight"):
        assert torch.equal(new[name][[0, 2]], old[name])
        assert not torch.equal(new[name][1], tensors_of(composed.path)[name][1])
    fewer = compose_experts(
        two, tmp_path / "fewer", base, options=options(text, router_from=grown.path)
    ).path
    assert all(torch.equal(t, old[n]) for n, t in tensors_of(fewer).items() if "router" in n)


def test_it_learns_whose_text_it_is(base, tmp_path):  # noqa: F811
    """Two LoRAs, of which each knows another of two words that follow everything."""
    import convert_sources as sources
    from transformers import AutoTokenizer

    draw, tokenizer = random.Random(0), AutoTokenizer.from_pretrained(base)
    texts, made = {}, {}
    for name in ("code", "law"):
        texts[name] = write_text(tmp_path / f"{name}.txt", WORDS[name], 1, 900, common=0.4)
        made[name] = sources.peft_lora(base, tmp_path / name, draw.randrange(9), r=4, lora_alpha=8)
        peft_model, path = made[name]
        ids = torch.tensor(tokenizer(texts[name].read_text())["input_ids"][:768]).view(-1, 32)
        train = [p for n, p in peft_model.named_parameters() if "lora_" in n]
        optimizer = torch.optim.AdamW([p.requires_grad_() for p in train], lr=1e-2)
        for _ in range(25):
            peft_model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        peft_model.save_pretrained(path)
    out = compose_experts(
        {name: path for name, (_, path) in made.items()}, tmp_path / "out", base,
        options=RouterOptions(
            context=ContextOptions(tuple(texts.values()), **SMALL | {"steps": 60, "batch_size": 8})
        ),
    )  # fmt: skip
    assert out.trained.after < out.trained.before / 2
    mixture = reference.load(base, out.path, dtype=torch.float32)
    right = []
    for expert, file in enumerate(texts.values()):
        ids = torch.tensor([tokenizer(file.read_text())["input_ids"][-100:]])
        with torch.no_grad():
            mixture(ids)
        right.append(mixture.adafuse.gates[0, 20:, expert].mean().item())
    assert min(right) > 0.9, right


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"--router-context": None}, "--data: expected --router-context mean beside it"),
        (
            {"--router-context": None, "--data": None, "--labels": "code=x.txt"},
            "--labels: expected --router-context mean beside it",
        ),
        ({"--labels": "other=x.txt"}, "samples of other: no such expert"),
        ({"--data": None}, "there is no text to train the router on"),
        ({"--router": "uniform"}, "--router is uniform, expected none"),
        ({"--report": "a.html"}, "--report draws what a router sees in single tokens"),
        ({"--router-context-scale": "0"}, "expected numbers above 0"),
        ({"--router-context-half-life": "0"}, "half_life is 0.0, expected a number of tokens above 0"),
        ({"--router-context-half-life": "nan"}, "half_life is nan, expected a number of tokens"),
        (
            {"--router-context": None, "--data": None, "--router-context-half-life": "16"},
            "--router-context-half-life: expected --router-context mean beside it",
        ),
        ({"--length": "1"}, "length is 1, expected 2 or more"),
        ({"--samples": "other=x.txt"}, "samples of other: no such expert"),
        ({"--data": "nowhere.txt"}, "cannot be read as UTF-8 text (No such file"),
    ],
)
def test_bad_options(base, loras, text, tmp_path, capsys, changes, said):  # noqa: F811
    given = {"--router-context": "mean", "--data": str(text)} | changes
    named = [f"{name}={path}" for name, path in paths(loras).items()]
    flags = [word for k, v in given.items() if v is not None for word in (k, v)]
    out = tmp_path / "out"
    command = ["compose-experts", *named, "--base", str(base), "--output", str(out), *flags]
    assert main(command) == 1 and not out.exists()
    assert said in " ".join(capsys.readouterr().err.split())


def test_rows_of_another_kind_are_refused(base, loras, text, composed, tmp_path):  # noqa: F811
    with pytest.raises(AdapterError, match="expected first_norm, 2 and 1: rows mean the same"):
        compose_experts(
            paths(loras), tmp_path / "out", base,
            options=options(text, scale=2.0, router_from=composed.path),
        )  # fmt: skip
    with pytest.raises(AdapterError, match="remembers all tokens alike, expected with a half-life of 16"):
        compose_experts(
            paths(loras), tmp_path / "out", base,
            options=options(text, half_life=16.0, router_from=composed.path),
        )  # fmt: skip
    with pytest.raises(AdapterError, match="one LoRA needs no router"):
        compose_experts(
            dict([*paths(loras).items()][:1]), tmp_path / "out", base, options=options(text)
        )


def test_the_command(base, loras, text, tmp_path, capsys, monkeypatch):  # noqa: F811
    forms, train = [], compose.train_router

    def record(*arguments, **options):
        forms.append(arguments[3])
        return train(*arguments, **options)

    monkeypatch.setattr(compose, "train_router", record)
    named = [f"{name}={path}" for name, path in paths(loras).items()]
    small = ["--steps", "2", "--length", "32", "--batch-size", "2", "--dtype", "float32"]
    code = write_text(tmp_path / "code.txt", WORDS["code"], 1, tokens=300)
    command = ["compose-experts", *named, "--base", str(base), "--output", str(tmp_path / "out")]
    past = ["--router-context", "mean", "--data", str(text), "--samples", f"code={code}", "--labels", f"law={code}"]
    past += ["--router-context-half-life", "16"]
    assert main([*command, *past, *small]) == 0
    assert forms == [Form(2, context_half_life=16.0)]
    said = " ".join(capsys.readouterr().out.split())
    assert "tokens with loss perplexity" in said and "experts code" in said
    assert main(["check", str(tmp_path / "out"), "--base", str(base)]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "and the mean of the past, scale 4, half-life 16 tokens" in said
