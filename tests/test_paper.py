"""The rows of the paper's table compute what they say, and leave the model as they found it."""

import json
import sys

import pytest
import torch
from benchmark_package import ROOT

from benchmarks import paper, paper_report
from benchmarks import switch as switch_benchmark
from benchmarks.paper import Options, Stream, make_backbone
from benchmarks.paper_rows import (
    NEEDS,
    ROWS,
    Mixture,
    layer_merge,
    linears,
    make_bank,
    normal,
)

MIXTURE = Mixture(experts=5, top_k=2, r=4)
IDS = torch.tensor([[3, 14, 159, 26, 535]])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = make_backbone(Options(models=["tiny"], dtype="float32"), "tiny", "cpu")
    with torch.no_grad():
        for parameter in built.parameters():  # so that experts and places matter
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return built


@torch.no_grad()
def logits(model, row=None, mixture=MIXTURE, one_by_one=False) -> torch.Tensor:
    """Of the bare model, or with a row whose random weights are always the same."""
    if row is not None:
        torch.manual_seed(7)
        with ROWS[row](model, mixture) as adapted:
            return logits(adapted, one_by_one=one_by_one)
    if not one_by_one:
        return model(IDS).logits
    cache, found = None, []
    for token in IDS[0]:
        out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("row", [name for name in ROWS if name != "backbone"])
def test_a_row_adapts_the_model_and_leaves_nothing_behind(model, row):
    if row in NEEDS:
        pytest.importorskip(NEEDS[row])
    before, names = logits(model), set(dict(model.named_modules()))
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    adapted = logits(model, row)
    if row == "static_lora":  # PEFT's B starts at zero
        assert distance(adapted, before) <= 1e-5
    else:
        assert distance(adapted, before) > 0.05
    assert set(dict(model.named_modules())) == names
    for name, w in model.state_dict().items():
        assert distance(w, weights[name]) <= (1e-6 if row == "layer_merge" else 0)
    assert distance(logits(model), before) <= (1e-5 if row == "layer_merge" else 0)
    model.load_state_dict(weights)


@pytest.mark.parametrize(
    "one, other",
    [
        ("layer_wise_gather", "layer_wise_linear"),
        ("layer_wise_mlp", "mixlora_package"),
        ("pre_gated", "switch"),
        ("merge_all", "switch"),
    ],
)
def test_two_ways_of_the_same_mixture_agree(model, one, other):
    for name in (one, other):
        if name in NEEDS:
            pytest.importorskip(NEEDS[name])
    for mixture in (MIXTURE, Mixture(experts=3, top_k=3, r=2)):
        a, b = (logits(model, name, mixture, one_by_one=True) for name in (one, other))
        assert distance(a, b) <= 1e-5
        assert distance(logits(model, one, mixture), b) <= 1e-5


def test_merging_per_layer_is_that_of_the_only_expert(model):
    one = Mixture(experts=1, top_k=1, r=3)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    found = logits(model, "layer_merge", one)
    model.load_state_dict(weights)
    torch.manual_seed(7)
    for layer in model.model.layers:  # in the order in which the row draws
        for linear in linears(layer).values():
            a, b = make_bank(model, linear, one)
            linear.weight.data += one.scale * b[0] @ a[0]
        normal(model, 1, model.config.hidden_size)
    assert distance(found, logits(model)) <= 1e-5
    model.load_state_dict(weights)
    assert layer_merge is ROWS["layer_merge"]


def test_a_stream_is_greedy_and_reads_every_token(model):
    options = Options(models=["tiny"], prompt=4, dtype="float32")
    with torch.no_grad():
        torch.manual_seed(1)
        stream = Stream(model, options)
        torch.manual_seed(1)
        ids = torch.randint(model.config.vocab_size, (1, 4))
        for token in [int(stream.token)] + [stream.step() for _ in range(5)]:
            last = model(ids).logits[0, -1]
            assert last[token] >= last.max() - 1e-4  # which of two that tie, rounding decides
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert len(stream.time(7, 60)) == 7 and len(stream.time(50, 0)) == 3


def run(monkeypatch, module, *options) -> None:
    """`python -m benchmarks.MODULE`, in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, options)])
    module.main()


def test_table_and_page_from_one_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows, results = "backbone,layer_wise_linear,layer_merge,switch", tmp_path / "results"
    run(
        monkeypatch, paper, "--model", "tiny", "--layers", 1, "--rows", rows, "--repeats", 1,
        "--tokens", 3, "--out", results,
    )  # fmt: skip
    (file,) = results.iterdir()
    found = {row["row"]: row for row in json.loads(file.read_text())["rows"][1:]}
    assert list(found) == rows.split(",")
    base = found["backbone"]
    assert found["layer_wise_linear"]["kernels"] > 2 * base["kernels"] > 100
    assert base["overhead"] == 0 and len(base["all"]) == 1 and base["unit"] == "ms/token"
    run(monkeypatch, paper, "--report", "--results", results, "--docs", tmp_path / "docs")
    page = (tmp_path / "docs" / "paper.md").read_text()
    assert f"| `backbone` | {base['median']:.2f} ms |" in page
    assert f"| `switch` | {found['switch']['median']:.2f} ms |" in page
    over = 100 * found["switch"]["overhead"]
    assert f"| fused switch | +29.0 % | {over:+.1f} % |" in page
    assert "No result file yet." in page and "layer-wise, as published" in page
    assert (tmp_path / "docs" / "plots" / "paper-transformers-tiny.svg").is_file()


def test_the_kernel_alone_runs_without_a_gpu(tmp_path, monkeypatch):
    run(
        monkeypatch, switch_benchmark, "--model", "tiny", "--layers", 1, "--cuts",
        "128/64/256/4/1", "--repeats", 1, "--switches", 10, "--out", tmp_path,
    )  # fmt: skip
    (file,) = tmp_path.iterdir()
    facts, cut, by_torch, *drift = json.loads(file.read_text())["rows"]
    assert facts["linears"] == 7 and facts["moved_bytes"] > 4 * facts["weights"]
    assert cut["correct"] and cut["cut"] == "128/64/256/4/1" and by_torch["correct"]
    assert drift[-1]["switches"] == 10
    assert drift[-1]["add_subtract"] > 2 * drift[-1]["switch"]
    assert drift[-1]["switch"] <= 1.001 * drift[-1]["rounding_of_one"]


@pytest.mark.parametrize(
    "make,options,said",
    [
        (Options, {"models": ["gpt"]}, "models has gpt, expected of llama-2-7b"),
        (Options, {"rows": ["backbone", "fast"]}, "rows has fast"),
        (Options, {"rows": ["switch"]}, "expected backbone"),
        (Options, {"top_k": 9}, "expected 1 <= top_k <= experts"),
        (switch_benchmark.Options, {"cuts": ["64/64"]}, "cut 64/64: expected five numbers"),
        (switch_benchmark.Options, {"cuts": ["60/64/128/4/1"]}, "rows is 60, expected a power"),
        (switch_benchmark.Options, {"top_k": 9}, "top_k is 9, expected 1 to 8"),
    ],
)
def test_bad_options_are_refused(make, options, said):
    with pytest.raises(ValueError, match=said):
        make(**options)


def test_the_page_in_the_repository_is_that_of_its_result_files(tmp_path):
    pytest.importorskip("matplotlib")
    written = paper_report.write_report(ROOT / "benchmarks" / "results", tmp_path).read_text()
    assert written == (ROOT / "docs" / "paper.md").read_text()
