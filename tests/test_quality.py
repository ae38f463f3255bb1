"""benchmarks.quality at toy size: the splits, a whole run with interruption, the report."""

import dataclasses
import json
import math
import tarfile
from types import SimpleNamespace

import fake_engines
import pytest
import torch
from benchmark_package import ROOT
from transformers import AutoModelForCausalLM
from vllm_adafuse.format.adapter import check_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.packed import unpack_directory

from benchmarks.pages import Result as File
from benchmarks.quality import demo, pool, publish, speed
from benchmarks.quality.__main__ import NOT_DONE, main, parse
from benchmarks.quality.corpus import DOMAINS, SPLITS, gather
from benchmarks.quality.data import Data
from benchmarks.quality.methods import methods
from benchmarks.quality.report import write
from benchmarks.quality.scores import Result
from benchmarks.quality.sizes import SIZES
from benchmarks.quality.tasks import PACKING, Plan, Task
from benchmarks.quality.verdict import verdict

TOY = SIZES["toy"]
CHOSEN = "full,lora-active,layerwise-block,adafuse-k2,context-1,distilled-tuned"


@pytest.fixture(scope="module")
def corpus_root(tmp_path_factory):
    """A few hundred files of every domain, with copies and near copies."""
    root = tmp_path_factory.mktemp("corpus")
    suffixes = {"python": "py", "c": "h", "prose": "rst", "html": "html", "json": "json"}
    for domain, suffix in suffixes.items():
        for i in range(60):
            lines = [f"{domain} line {i} {j} with some words in it" for j in range(40)]
            (root / f"{i}.{suffix}").write_text("\n".join(lines))
            (root / f"copy-{i}.{suffix}").write_text("\n".join(lines))
            (root / f"near-{i}.{suffix}").write_text("\n".join([*lines, f"by {i}"]))
    return root


@pytest.fixture(scope="module")
def corpus(corpus_root):
    return gather(TOY, [corpus_root])


def test_no_text_is_in_two_splits(corpus):
    for domain in DOMAINS:
        files = [set(corpus.texts[domain, split]) for split in SPLITS]
        assert sum(map(len, files)) == len(set.union(*files))
        training = "\n".join(t for s in ("pretrain", "adapt") for t in corpus.texts[domain, s])
        for split in ("valid", "held"):
            assert corpus.texts[domain, split]
            for text in corpus.texts[domain, split]:  # nor a near copy
                assert text.splitlines()[0] not in training


def test_the_corpus_is_the_same_each_time(corpus, corpus_root):
    again = gather(TOY, [corpus_root])
    assert again.texts == corpus.texts and again.fingerprint == corpus.fingerprint


def test_a_poor_machine_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"too little text on this machine for python/adapt"):
        gather(TOY, [tmp_path])


def test_active_and_total_ranks_are_comparable():
    made = methods(SIZES["full"])
    assert made["lora-active"].active_rank == made["adafuse-k2"].active_rank == 16
    assert made["lora-total"].total_rank == made["layerwise-block"].total_rank == 64


@pytest.fixture(scope="module")
def finished(corpus_root, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    arguments = ["--size", "toy", "--roots", str(corpus_root), "--work", str(root / "work"),
                 "--out", str(root / "out"), "--methods", CHOSEN]  # fmt: skip
    assert main([*arguments, "--minutes", "0.00001"]) == NOT_DONE
    assert not list((root / "work").glob("runs/*.json")) and not (root / "out").exists()
    assert main(arguments) == 0
    return root


def test_a_run_that_was_cut_off_goes_on_to_a_result(finished):
    (file,) = (finished / "out").glob("quality-*.json")
    result = Result(json.loads(file.read_text()))
    assert [m.about["method"] for m in result.methods] == CHOSEN.split(",")
    for m in result.methods:
        (run,) = m.runs
        assert set(run["domains"]) == set(DOMAINS) and math.isfinite(run["loss"])
        assert run["loss"] < math.log(TOY.vocab) + 0.5
    by_name = {m.about["method"]: m.runs[0] for m in result.methods}
    assert "kl" in by_name["distilled-tuned"] and "usage" not in by_name["full"]
    usage = by_name["adafuse-k2"]["usage"]
    assert set(usage) == set(DOMAINS)
    assert all(sum(shares) == pytest.approx(1) for shares in usage.values())
    for name in ("adafuse-k2", "layerwise-block", "distilled-tuned"):
        assert check_adapter(finished / "work" / "runs" / f"{name}-s0")[1] == []


def test_judged_blocks_do_not_overlap(finished):
    data = Data(TOY, finished / "work")
    blocks = data.judged("c")
    assert blocks.shape == (TOY.judge_blocks, TOY.length)
    text = data.tokens["c", "held"].tolist()
    joined = [text[i : i + TOY.length] for i in range(0, len(text), TOY.length)]
    assert all(block in joined for block in blocks.tolist())


def test_the_report_is_made_from_the_file_alone(finished, tmp_path):
    pytest.importorskip("matplotlib")
    text = write(finished / "out", tmp_path).read_text("utf-8")
    assert "too small to conclude anything from" in text and "AdaFuse, k = 2" in text
    assert (tmp_path / "plots" / "quality.svg").exists()
    with pytest.raises(ValueError, match="run python -m benchmarks.quality first"):
        write(tmp_path, tmp_path)


def fabricated(**losses):
    """A result whose methods have these losses, one per seed."""
    groups = {"adafuse": "pre-gated", "distilled": "pre-gated", "layerwise": "layer-wise",
              "lora": "static"}  # fmt: skip
    domains = {d: {"loss": 1.0, "accuracy": 0.5} for d in DOMAINS}
    seeds = list(range(max(map(len, losses.values()))))
    rows = [{"options": {"seeds": seeds}}, {"what": "corpus", "counts": {}}, {"what": "backbone"}]
    for name, values in losses.items():
        method = name.replace("_", "-")
        about = {"group": groups[name.split("_")[0]], "active_rank": 32 if "k4" in name else 16}
        rows.append({"what": "method", "method": method, "label": method, **about})
        rows += [{"what": "run", "method": method, "seed": i, "loss": v, "domains": domains}
                 for i, v in enumerate(values)]  # fmt: skip
    return Result({"rows": rows})


def test_the_verdict_says_who_wins():
    lost = verdict(fabricated(adafuse_k2=[1.01, 1.012], layerwise_block=[1.0, 1.002],
                              lora_active=[1.02, 1.03]))  # fmt: skip
    assert "**Layer-wise routing wins**: adafuse-k2 is worse than layerwise-block with each" in lost
    assert "+1.01 % (2.748 against 2.721; by seed +1.01, +1.01 %): **not met**" in lost
    assert "layer-wise, per linear | no figure" in lost and "-1.39 %" in lost
    assert "at least 0 of each" in lost and "no figure: no training-*.json" in lost
    near = verdict(fabricated(adafuse_k2=[1.003, 0.999], layerwise_block=[1.0, 1.0],
                              layerwise_linear=[1.2, 1.2], lora_active=[0.9, 0.9]))  # fmt: skip
    assert "**A draw**" in near and "+0.10 %" in near and "is also the best of the 1" in near
    assert "static LoRA of the same rank at work | +10.63 %" in near
    assert "**One decision per token wins**" in verdict(
        fabricated(adafuse_k2=[0.9], layerwise_block=[1.0])
    )


def test_the_verdict_tells_a_choice_from_a_plan():
    said = verdict(fabricated(adafuse_k2=[1.01] * 3, adafuse_k4=[0.99] * 3, distilled=[0.5],
                              layerwise_block=[1.0] * 3, layerwise_linear=[1.0] * 3,
                              lora_active=[1.0] * 3))  # fmt: skip
    assert "adafuse-k4: the best variant, chosen after it" in said  # and not what has one seed
    assert "best of 3 pre-gated ones, against 2 layer-wise" in said
    assert "not comparable: rank 32 at work, no LoRA above 16" in said
    assert "It also has rank 32 at work" in said and "at least 3 of each" in said


@pytest.mark.parametrize(("rate", "said"), [(71.0, "71.0 % (71 of 100"), (69.0, "**not met**")])
def test_training_throughput_is_of_the_newest_file_with_peft(rate, said, tmp_path):
    rows = [{"options": {"model": "llama-2-7b", "layers": 8}}]
    rows += [{"method": m, "median": v} for m, v in (("peft", 100.0), ("adafuse", rate))]
    content = {"benchmark": "training", "rows": rows}
    other = content | {"rows": [rows[0], {"method": "lora", "median": 1.0}, rows[2]]}
    files = [File(tmp_path / "a.json", content), File(tmp_path / "b.json", other)]
    result = fabricated(adafuse_k2=[1.0], layerwise_block=[1.0])
    (line,) = [x for x in verdict(result, files).splitlines() if "throughput" in x]
    assert said in line and "llama-2-7b, 8 layers" in line


def test_a_scarce_kind_of_text_is_left_out_in_words(corpus_root, tmp_path):
    for file in corpus_root.iterdir():
        if file.suffix != ".html":
            (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "one.html").write_text("<p>one page of some length</p>\n" * 20)
    scarce = gather(TOY, [tmp_path])
    assert scarce.domains == [d for d in DOMAINS if d != "html"]
    (note,) = scarce.notes
    assert note == "html is left out: 1 files of 0.00 MiB"


def finish(task, work, loss=1.0, seconds=1.0, steps=10):
    file = task.file(work)
    file.parent.mkdir(exist_ok=True)
    row = {"method": task.method, "loss": loss, "task_seconds": seconds, "steps": steps}
    file.write_text(json.dumps(row))


def test_all_methods_choose_among_the_same_rates(tmp_path):
    size = dataclasses.replace(TOY, choices=((1e-3, 4.0), (2e-3, 1.0), (2e-3, 4.0)))
    plan = Plan(size, ["lora-active", "layerwise-block", "adafuse-k2"], tmp_path)
    first, second = Task("run", "adafuse-k2", 0), Task("run", "lora-active", 0)
    assert plan.rate(first) == (1e-3, 4.0)  # nothing was tried
    tasks = plan.tune(late=False)
    assert [t.rate for t in tasks] == [0, 0, 0, 1, 1, 1, 2, 2]  # a LoRA has no router
    for task in tasks[:-1]:
        finish(task, tmp_path, loss=3 - task.rate)
    assert plan.tried(late=False) == [0, 1]
    assert plan.rate(first) == (2e-3, 1.0) == plan.rate(second)
    finish(tasks[-1], tmp_path, loss=0)
    assert tasks[-1].method == "adafuse-k2" and plan.rate(first) == (2e-3, 4.0)


def test_little_time_means_fewer_steps_for_all_and_no_seed_less(tmp_path):
    size = dataclasses.replace(TOY, steps=100, seeds=(0, 1, 2))
    plan = Plan(size, ["full", "layerwise-block", "adafuse-k2", "distilled"], tmp_path)
    runs = plan.runs(late=False) + plan.runs(late=True)
    assert [t.method for t in runs[-6:]] == 3 * ["full"] + 3 * ["distilled"]  # dropped first
    assert not plan.ready(runs[-1]) and plan.ready(runs[0])
    finish(Task("run", "layerwise-block", 2), tmp_path, seconds=5, steps=10)
    assert plan.ready(runs[-1])
    assert plan.expected(runs[0]) == 50 and plan.expected(runs[-1]) == 80
    wall = PACKING * (8 * 50 + 3 * 80) / 4
    assert plan.choose_steps(wall / 2, jobs=4) == 50 == plan.steps(runs[0])
    assert plan.choose_steps(wall, jobs=4) == 50  # it stays, for those who go on


def test_a_task_that_fails_twice_is_left_out(tmp_path, monkeypatch):
    size, said, calls = dataclasses.replace(TOY), [], []

    def broken(task, *rest):
        calls.append(task.name)
        if task.method == "full":
            raise FloatingPointError("it diverged")
        finish(task, tmp_path)
        return {"lr": 1.0, "router_rate": 1.0, "steps": 1, "loss": 1.0, "task_seconds": 1.0}

    monkeypatch.setattr(pool, "perform", broken)
    plan = Plan(size, ["full", "adafuse-k2"], tmp_path)
    assert not pool.Pool(plan, 1, said.append).run(plan.runs(late=False), math.inf)
    assert sorted(calls) == ["adafuse-k2-s0", "full-s0", "full-s0"]
    assert "it diverged" in plan.runs(late=False)[-1].failure(tmp_path).read_text()
    assert any("failed: run full-s0" in line for line in said)


def test_bad_options_are_refused(capsys):
    for arguments, said in (
        (["--methods", "magic"], "--methods has magic, expected some of full"),
        (["--methods", "distilled"], "needs layerwise-block beside it"),
        (["--jobs", "0"], "must be above 0"),
    ):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert said in capsys.readouterr().err


def test_results_in_the_repository_are_shown():
    results = ROOT / "benchmarks" / "quality" / "results"
    if not list(results.glob("quality-*.json")):
        pytest.skip("no result file yet")
    pytest.importorskip("matplotlib")
    written = (ROOT / "docs" / "quality.md").read_text("utf-8")
    newest = max(results.glob("quality-*.json")).name
    assert newest in written


def test_the_demo_s_model_is_made_small_and_checked(corpus_root, tmp_path):
    size = dataclasses.replace(TOY, heads=2, experts=4)
    about = demo.make(tmp_path / "demo_model", size, [corpus_root])
    unpack_directory(tmp_path / "demo_model", tmp_path / "pair")
    adapter, problems = check_adapter(
        tmp_path / "pair" / "adapter", Backbone.from_path(str(tmp_path / "pair" / "backbone"))
    )
    assert problems == [] and len(adapter.config.expert_names) == 4
    assert adapter.config.base_path(adapter.path) == str(tmp_path / "pair" / "backbone")
    assert set(about["usage"]) == {"python", "prose"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / "backbone", dtype="auto")
    assert model.dtype == torch.float32  # the config's; the file holds bfloat16
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())


    # Made on another machine, it is installed with what it says of itself, if it got better.
    says = tmp_path / "demo_model" / "made_with.json"
    for adapted, refused in ((2.0, None), (3.0, "perplexity of prose is 3.00 adapted and 3.00")):
        better = {d: {"backbone": 3.0, "adapted": adapted} for d in ("prose", "python")}
        says.write_text(json.dumps(about | {"held_out_perplexity": better}))
        with tarfile.open(tmp_path / "demo_model.tgz", "w:gz") as tar:
            tar.add(says.parent, "demo_model")
        if refused:
            with pytest.raises(ValueError, match=refused):
                demo.install(tmp_path / "demo_model.tgz", tmp_path / "installed")
        else:
            demo.install(tmp_path / "demo_model.tgz", tmp_path / "installed")
    demo.check(tmp_path / "installed")
    (says.parent / "adapter" / "more.bin").write_bytes(bytes(demo.LIMIT))
    with pytest.raises(ValueError, match="more.bin, which does not belong there; has .* bytes"):
        demo.check(says.parent)


def test_the_demo_s_model_in_the_repository_is_whole():
    if not demo.OUT.is_dir():
        pytest.skip("a tree without it")
    assert demo.check(demo.OUT)["made_by"] == "python -m benchmarks.quality.demo"


def test_what_a_gpu_machine_sent_is_published_by_one_command(finished, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (file,) = (finished / "out").glob("quality-*.json")
    (tmp_path / "sent").mkdir()
    (tmp_path / "sent" / "so-far.json").write_bytes(file.read_bytes())
    arguments = [str(tmp_path / "sent"), "--results", str(tmp_path / "results"),
                 "--docs", str(tmp_path / "docs")]  # fmt: skip
    assert publish.main(arguments) == 0
    assert (tmp_path / "results" / file.name).read_bytes() == file.read_bytes()
    assert file.name in (tmp_path / "docs" / "quality.md").read_text("utf-8")
    other = json.loads(file.read_text()) | {"commit": "another"}
    (tmp_path / "sent" / "so-far.json").write_text(json.dumps(other))
    assert publish.main(arguments) == 1 and "is another result" in capsys.readouterr().err


def test_experts_are_named_after_their_use():
    usage = {"python": [0.6, 0.1, 0.25, 0.05], "prose": [0.2, 0.5, 0.25, 0.05]}
    assert demo.name_experts(usage) == ["code_0", "prose_1", "both_2", "both_3"]


def test_static_loras_are_timed_as_peft_saves_them(finished, tmp_path):
    from peft import PeftModel
    from vllm_adafuse.training import AdaFuseModel

    work = finished / "work"
    adapter = work / "runs" / "lora-active-s0"
    peft = speed.write_peft(adapter, tmp_path / "peft")
    ids = torch.randint(3, TOY.vocab, (2, 20))
    logits = []
    for load, path in ((AdaFuseModel.from_pretrained, adapter), (PeftModel.from_pretrained, peft)):
        backbone = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
        logits.append(load(backbone, path).eval()(input_ids=ids).logits)
    assert torch.allclose(logits[0], logits[1], atol=1e-5)
    bare = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32).eval()
    assert not torch.allclose(logits[0], bare(ids).logits, atol=1e-4)


def test_an_engine_that_fails_takes_no_other_along(tmp_path, monkeypatch):
    now, together = [0.0], speed.wait_any

    def wait(connections, seconds):  # once all others have spoken, time is up for the slow one
        if len(connections) > 1:
            return together(connections)
        now[0] += seconds
        return []

    monkeypatch.syspath_prepend(ROOT)  # where `benchmarks` is, for the processes
    monkeypatch.setattr(speed, "serve_times", fake_engines.serve)
    monkeypatch.setattr(speed, "wait_any", wait)
    monkeypatch.setattr(speed, "time", SimpleNamespace(time=lambda: now[0]))
    names = ["lora-active", "layerwise-linear", "layerwise-block", "adafuse-k2", "adafuse-k4"]
    (tmp_path / "runs").mkdir()
    for name in names:
        (tmp_path / "runs" / f"{name}-s0.json").touch()
    said = []
    assert not speed.measure_all("toy", names, tmp_path, 600.0, said.append)
    figures = {f.stem: json.loads(f.read_text()) for f in (tmp_path / "speed").glob("*.json")}
    assert set(figures) == set(names)
    assert {b: (f["median"], f["stock"]) for b, f in figures["lora-active"].items()} == {
        "1": (0.25, 0.5), "32": (8.0, 0.5)}  # fmt: skip
    assert list(figures["adafuse-k2"]) == ["1"]  # what it had before it ended
    assert "process ended while it started" in figures["layerwise-linear"]["error"]
    assert figures["layerwise-block"]["error"] == "ValueError: no room"
    assert "not started within" in figures["adafuse-k4"]["error"]
    assert any("started: " in line for line in said)
    late = now[0] + speed.TURNS_SECONDS  # too little; what failed would be tried again
    assert not speed.measure_all("toy", names, tmp_path, late, said.append)
    assert "3 adapters" in said[-1]
