"""benchmarks.quality --composed and --together at toy size: all has figures; a run goes on."""

import dataclasses
import gzip
import json
import math
import random
import tarfile
import time
from pathlib import Path

import pytest
import torch
from test_quality import corpus_root  # noqa: F401
from vllm_adafuse.training import MixtureConfig
from vllm_adafuse.training.layers import Router

from benchmarks.quality import composed, drive, loras, together, train
from benchmarks.quality.__main__ import main
from benchmarks.quality.corpus import Recipe, gather
from benchmarks.quality.data import Data
from benchmarks.quality.drive import NOT_DONE
from benchmarks.quality.made import MADE, make
from benchmarks.quality.manuals import write
from benchmarks.quality.requests import IGNORED, KINDS, Desk, Requests, judge
from benchmarks.quality.sizes import SIZES
from benchmarks.quality.units import Unit

TOY = SIZES["toy"]
DOMAINS = ["python", "logs", "de"]  # not as many as an experiment needs


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of one further domain."""
    folder = tmp_path_factory.mktemp("text") / "de"
    folder.mkdir()
    for i in range(60):
        lines = [f"Zeile {i} {j} mit einigen Worten darin" for j in range(40)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder.parent


@pytest.fixture(scope="module")
def arguments(corpus_root, text, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("run")
    return ["--size", "toy", "--roots", str(corpus_root), "--text", str(text),
            "--work", str(root / "work"), "--domains", ",".join(DOMAINS),
            "--out", str(root / "out")]  # fmt: skip


@pytest.fixture(scope="module")
def finished(arguments):
    """The rows of a whole run, and how it was asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composed, "RECIPE", dataclasses.replace(composed.RECIPE, needed=3))
        assert main(["--composed", *arguments]) == 0
    return rows_of(arguments, "composed"), arguments


def rows_of(arguments, name):
    (file,) = Path(arguments[-1]).glob(f"{name}-*.json")
    return json.loads(file.read_text())["rows"]


def runs(rows):
    return [row for row in rows if row.get("what") == "run"]


@pytest.fixture
def again(finished, tmp_path):
    """How to ask for it once more, with a result file elsewhere."""
    return [*finished[1][:-1], str(tmp_path)]


def test_every_method_has_figures_and_a_repetition_trains_nothing(
    finished, again, monkeypatch, capsys
):
    rows, _ = finished
    found = {row["method"]: row for row in runs(rows)}
    assert list(found) == list(composed.kinds(len(DOMAINS)))
    assert rows[0]["options"]["complete"]
    losses = [found[name][kind]["loss"] for name in found for kind in KINDS]
    assert all(0 < loss < math.log(TOY.vocab) + 3 for loss in losses)
    alike = {"oracle-each", "centroid", "classifier"}  # as the oracle: they may never be wrong
    alike |= {composed.FP8}  # as what is rounded
    others = {name: row["plain"]["loss"] for name, row in found.items() if name not in alike}
    assert len(set(others.values())) == len(others)
    told = found["oracle-each"], found["oracle"]
    assert told[0]["plain"] == told[1]["plain"] and told[0]["switched"] != told[1]["switched"]
    # Little is lost of a router and its experts where these are in fp8, and nothing is trained for it.
    rounded, whole = found[composed.FP8], found["context-k2"]
    assert all(abs(rounded[kind]["loss"] - whole[kind]["loss"]) < 0.02 for kind in KINDS)
    assert [rounded[kind]["parts"] for kind in KINDS] != [whole[kind]["parts"] for kind in KINDS]
    assert "steps" in whole and "steps" not in rounded
    assert found["classifier"]["front"]["plain"]["ms"] > 0
    assert found["centroid"]["front"]["plain"]["accuracy"] > 0.5
    for module in (loras, composed, train):
        monkeypatch.setattr(module, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert main(["--composed", *again]) == 0
    assert runs(rows_of(again, "composed")) == runs(rows)
    table = capsys.readouterr().out
    assert "| the right LoRA, by label |" in table and "+0.00%" in table
    assert "experts in fp8 against the same in float32: " in table


def test_what_is_too_late_is_not_begun_and_what_is_there_is_kept(finished, again, capsys):
    rows, _ = finished
    assert main(["--composed", "--seeds", "0,7", "--minutes", "0.001", *again]) == NOT_DONE
    later = rows_of(again, "composed")
    assert not later[0]["options"]["complete"] and later[0]["options"]["seeds"] == [0, 7]
    assert runs(later) == runs(rows)
    assert "call again to go on" in capsys.readouterr().out


def test_a_piece_that_fails_does_not_take_the_others_along(again, monkeypatch):
    work = Path(again[again.index("--work") + 1])
    (work / "composed-seed0" / "ties.json").rename(work / "ties.json")
    monkeypatch.setattr(composed, "merged", lambda *a: (_ for _ in ()).throw(OSError("no peft")))
    try:
        assert main(["--composed", *again]) == NOT_DONE
    finally:
        (work / "ties.json").rename(work / "composed-seed0" / "ties.json")
    rows = rows_of(again, "composed")
    assert [row["task"] for row in rows if row.get("what") == "failed"] == ["seed 0 ties"]
    assert len(runs(rows)) == len(composed.kinds(len(DOMAINS))) - 1


def test_what_is_there_is_saved_as_it_comes(again, monkeypatch):
    monkeypatch.setattr(drive, "KEEP_SECONDS", 0)
    monkeypatch.setattr(composed, "table", lambda *a: 1 / 0)  # whatever happens later
    with pytest.raises(ZeroDivisionError):
        main(["--composed", *again])
    rows = rows_of(again, "composed")
    assert not rows[0]["options"]["complete"]
    assert {row["method"] for row in runs(rows)} == set(composed.kinds(len(DOMAINS)))


def test_mixtures_and_the_lora_are_trained_together(again, monkeypatch, capsys):
    known = together.arms(TOY)
    few = ("static", "static-fast", "context", "context-dropout", "shared-late-mean-one")
    monkeypatch.setattr(together, "arms", lambda size: {name: known[name] for name in few})
    assert main(["--together", *again]) == 0
    found = runs(rows_of(again, "together"))
    assert [row["method"] for row in found] == list(few)
    assert len({row["plain"]["loss"] for row in found}) == len(few)
    assert found[0]["trained"] < found[2]["trained"]  # but for the router, equal
    out = capsys.readouterr().out
    assert "of 3 mixtures: " in out and "| static" not in out


def test_requests_switch_half_way_and_templates_carry_no_loss(finished):
    _, arguments = finished
    work = Path(arguments[arguments.index("--work") + 1])
    desk = Desk(Data(TOY, work), work)
    requests, half = desk.judged(), TOY.length // 2
    blocks = {d: desk.data.judged(d) for d in desk.data.domains}
    names = list(blocks)
    for a, own in enumerate(requests["switched"]):
        b = (a + 1) % len(names)
        assert own.domains[0].tolist() == [a, b]
        assert torch.equal(own.ids[0, :half], blocks[names[a]][0, :half])
        assert torch.equal(own.ids[0, half:], blocks[names[b]][0, half:])
    heads = {tuple(own.ids[i, : own.start].tolist())
             for own in requests["chat"] for i in range(len(own.ids))}  # fmt: skip
    assert len(heads) == 1
    chat = requests["chat"][0]
    assert (chat.labels[:, : chat.start] == IGNORED).all() and 0 < chat.start <= half
    assert torch.equal(chat.said()[0], blocks[names[0]][0, : TOY.length // 4])
    ids, labels = desk.batch(24, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (24, TOY.length) and (labels == IGNORED).any()
    assert ids.shape[0] > (labels == IGNORED).any(1).sum() > 0


def test_losses_are_means_over_the_tokens_that_count():
    class Uneven:  # sure of token 3, whatever came before
        dtype = torch.float32

        def eval(self):
            return self

        def __call__(self, input_ids):
            logits = torch.zeros(*input_ids.shape, 8)
            logits[..., 3] = 5.0
            return type("Output", (), {"logits": logits})

    ids = torch.full((2, 9), 3)
    ids[:, :5] = 1
    made = Requests(ids, torch.zeros(2, 2, dtype=torch.long), 5)
    right = -torch.log_softmax(torch.tensor([5.0] + [0.0] * 7), 0)[0].item()
    wrong = right + 5
    of_text = judge(Uneven(), {"chat": [made]}, 1)["chat"]["loss"]
    assert of_text == pytest.approx(right)
    of_all = judge(Uneven(), {"plain": [Requests(ids, made.domains)]}, 2)["plain"]["loss"]
    assert of_all == pytest.approx((4 * wrong + 4 * right) / 8)


def test_made_text_depends_on_what_came_before():
    for name in MADE:
        texts = make(name, 60_000, 30)
        assert len(set(texts)) == len(texts) >= 20 and texts == make(name, 60_000, 30)
    table = MADE["tables"](random.Random(1), 30).splitlines()
    mark = next(m for m in ",;\t" if m in table[0])
    rows = [line.split(mark) for line in table[1:]]
    total = 0.0
    for row in rows:
        assert float(row[6]) == pytest.approx(int(row[4]) * float(row[5]))
        total += float(row[6])
        assert float(row[7]) == pytest.approx(total)
    opened = set()
    for line in MADE["logs"](random.Random(1), 200).splitlines():
        if "req=" in line:
            key = line.split("req=")[1].split()[0]
            if "accepted" in line:
                opened.add(key)
            else:
                opened.remove(key)  # nothing ends that was not begun


def test_too_few_domains_and_wrong_names_are_refused(corpus_root, tmp_path, text):  # noqa: F811
    recipe = Recipe({"python": {".py"}}, {"python": 0.5}, ("logs",), needed=3)
    with pytest.raises(ValueError, match=r"name more --roots or --text: 2 domains of 3"):
        gather(TOY, [corpus_root], recipe)
    small = Recipe({"python": {".py"}}, {}, ("logs", "tables"), least=1e9)
    with pytest.raises(ValueError, match="too little text on this machine for python/adapt"):
        gather(TOY, [corpus_root], small)
    with pytest.raises(ValueError, match=r"--domains has \['perl'\], expected some of"):
        gather(TOY, [corpus_root], Recipe({"python": {".py"}}, {}, only=("perl",)))
    taken = Recipe({"de": {".py"}}, {}, text=text)
    with pytest.raises(ValueError, match=r"has \['de'\], which are domains already"):
        gather(TOY, [corpus_root], taken)
    with pytest.raises(ValueError, match="neither a folder nor a tar archive"):
        gather(TOY, [corpus_root], Recipe({"python": {".py"}}, {}, text=tmp_path / "none"))


def test_manual_pages_become_an_archive_of_domains(tmp_path, corpus_root, text):  # noqa: F811
    for language in ("de", "fr"):
        folder = tmp_path / language / "man1"
        folder.mkdir(parents=True)
        for i in range(60):
            source = [".TH X 1", ".\\\" a remark", f".B Wort {language}", "ein \\fIWort\\fR \\-x"]
            source += [f"Zeile {language} {i} {j} mit Worten darin" for j in range(40)]
            (folder / f"p{i}.1.gz").write_bytes(gzip.compress("\n".join(source).encode()))
        (folder / "short.1.gz").write_bytes(gzip.compress(b".so man1/p1.1\n"))
    sizes = write(tmp_path / "text.tar.xz", [tmp_path / "de", tmp_path / "fr"])
    with tarfile.open(tmp_path / "text.tar.xz") as archive:
        names = archive.getnames()
        first = archive.extractfile("de/p0.1.txt").read().decode().splitlines()
    assert len(names) == 120 and first[:2] == ["Wort de", "ein Wort -x"]
    found = gather(TOY, [corpus_root], Recipe({}, {}, text=tmp_path / "text.tar.xz"))
    assert found.domains == ["de", "fr"] == list(sizes)
    assert found.shares == {"de": 0.5, "fr": 0.5}
    with pytest.raises(ValueError, match=r"has no \*.gz manual page"):
        write(tmp_path / "none.tar.xz", [text])


def router(**options):
    made = Router(MixtureConfig(num_experts=4, r=2, **options), 1, 8, torch.Generator())
    torch.nn.init.normal_(made.weight)
    return made


def test_an_expert_that_is_always_on_is_not_chosen_too():
    made = router(top_k=2, router_bias=True, lora_alpha=12.0)
    together.always_on(made)
    gates = made.forward(torch.randn(3, 5, 8))[..., 0, :]
    assert (gates[..., 0] == 2.0).all() and ((gates[..., 1:] > 0).sum(-1) == 2).all()
    assert torch.allclose(gates[..., 1:].sum(-1), torch.tensor(6.0))
    assert not made.bias.requires_grad


class Told:
    def set_progress(self, progress):
        self.progress = progress


@pytest.mark.parametrize("cures", [("late",), ("dropout",), ("late", "dropout")])
def test_a_dimmed_context_is_whole_where_it_is_served(cures):
    made = router(router_context="mean")
    said, model = torch.randn(40, 6, 4), Told()
    whole = made._mean(said)
    together.Dimmer(made, cures, torch.Generator().manual_seed(0)).install(model)
    made.train()
    model.set_progress(0.2)
    early = made._mean(said)
    model.set_progress(0.8)
    late = made._mean(said)
    kept = (late == whole).flatten(1).all(1)
    gone = (late == 0).flatten(1).all(1)
    assert model.progress == 0.8 and (kept | gone).all()
    assert gone.any() == ("dropout" in cures) and kept.any()
    assert (early == 0).all() == ("late" in cures)
    made.eval()
    model.set_progress(0.2)
    assert torch.equal(made._mean(said), whole)


def test_steps_follow_from_the_time_there_is(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps({"tokens_per_s": 1000.0}))
    counts = dict.fromkeys(DOMAINS, {})
    (tmp_path / "corpus.json").write_text(json.dumps({"counts": counts}))
    unit = Unit("composed", SIZES["full30"], tmp_path, 0, 200, time.time() + 1e9)
    assert composed.steps_of([unit]) == 200
    (tmp_path / "composed-steps.json").unlink()
    need = composed.tokens_of_all([unit] * 3, len(DOMAINS)) / 750
    soon = Unit("composed", SIZES["full30"], tmp_path, 0, 200, time.time() + need / 2)
    assert composed.steps_of([soon] * 3) == 100
    assert composed.steps_of([unit]) == 100  # decided once
