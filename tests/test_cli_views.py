"""`inspect` and `route`: tables, JSON, colours and the page."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from cli_fixtures import EVIL, adapter, base, copied, edit_config, run, run_json  # noqa: F401
from vllm_adafuse.cli import common
from vllm_adafuse.cli.colors import hue, level, terminal_style
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.offline.routing import OfflineRouter, vocabulary_routes
from vllm_adafuse.text import printable
from vllm_adafuse.tiny import real_prompts

# inspect


def test_inspect_json(adapter, base, capsys):
    report = run_json(capsys, "inspect", adapter)
    assert report["base"] == str(base)
    assert [e["rank"] for e in report["experts"]] == [2, 4, 8, 8]
    assert [e["alpha"] for e in report["experts"]] == [4, 8, 16, 16]
    assert [e["scale"] for e in report["experts"]] == [2, 2, 2, 2]
    ids, _ = vocabulary_routes(load_adapter(adapter), base)
    for e, expert in enumerate(report["experts"]):
        assert expert["share_first"] == pytest.approx((ids[:, 0] == e).float().mean().item())
        assert expert["share_any"] == pytest.approx((ids == e).any(1).float().mean().item())
    assert sum(e["share_first"] for e in report["experts"]) == pytest.approx(1)
    assert sum(e["share_any"] for e in report["experts"]) == pytest.approx(2)
    q_proj, up_proj = report["modules"]
    assert q_proj == {
        "module": "q_proj",
        "layers": [0, 2],
        "in": 128,
        "out": 128,
        "dtype": "bfloat16",
        "bytes": 2 * 2 * 4 * 8 * (128 + 128),
    }
    assert (up_proj["in"], up_proj["out"]) == (128, 192)
    router_bytes = 4 * 128 * 2
    assert report["bytes"] == q_proj["bytes"] + up_proj["bytes"] + router_bytes
    assert report["passport_bytes"] == 1003 * 2 * 8
    assert report["router"] == {
        "routing": "pre_gated",
        "layer": 0,
        "input": "first_norm",
        "weights": "topk_softmax",
        "temperature": 1.0,
        "bias": False,
    }


def test_inspect_tables(adapter, capsys):
    code, out, _ = run(capsys, "inspect", adapter)
    assert code == 0
    for part in ("prose", "code", "first choice", "any of 2", "q_proj", "0,2", "15.7 KiB"):
        assert part in out
    assert "\x1b[31m" not in out


@pytest.mark.parametrize("lacking", ["all", "weights"])
def test_inspect_without_embedding_says_why(copied, base, tmp_path, capsys, lacking):
    where = tmp_path / "elsewhere"
    edit_config(copied, base_model_name_or_path=str(where))
    if lacking == "weights":
        where.mkdir()
        shutil.copy(base / "config.json", where)
    report = run_json(capsys, "inspect", copied)
    assert {e["share_first"] for e in report["experts"]} == {None}
    assert report["passport_bytes"] == (None if lacking == "all" else 1003 * 2 * 8)
    reason = "not on this machine" if lacking == "all" else "`inspect` reads"
    assert reason in report["no_shares_because"]
    if lacking == "weights":
        assert "model.safetensors is not in it" in report["no_shares_because"]
    out = run(capsys, "inspect", copied)[1]
    assert "first choice" not in out and "no shares of the vocabulary: " in out


def test_inspect_refuses_what_check_refuses(copied, capsys):
    edit_config(copied, top_k=9)
    code, out, err = run(capsys, "inspect", copied)
    assert code == 1 and out == "" and "`top_k` is 9" in err


# route

TEXT = f"def wörld(x): 😀\n\treturn x  # {EVIL}\n"


def test_route_json(adapter, base, capsys):
    report = run_json(capsys, "route", adapter, "--text", TEXT)
    assert "settling" not in report  # a token's route hangs on nothing before it
    assert report["text"] == TEXT
    tokens = report["tokens"]
    # The parts are the text; a token of a character's later bytes shows ⋯ alone.
    assert "".join(t["text"] for t in tokens if t["text"] != "⋯") == TEXT
    ids, gates = OfflineRouter(load_adapter(adapter), base).routes(
        torch.tensor([t["id"] for t in tokens])
    )
    for token, experts, weights in zip(tokens, ids.tolist(), gates.tolist(), strict=True):
        assert [e["expert"] for e in token["experts"]] == experts
        assert [e["weight"] for e in token["experts"]] == pytest.approx(weights)
    assert {e["name"] for t in tokens for e in t["experts"]} >= {"prose", "code"}


def test_route_of_a_request_that_was_served(adapter, base, tmp_path, capsys):
    """Its very tokens, which its text made into tokens again need not be."""
    ids, said = [70, 71, 300, 9, 9, 9, 301, 5], {"token_ids": [9, 9, 301, 5]}
    expected = OfflineRouter(load_adapter(adapter), base).routes(torch.tensor(ids))[0].tolist()
    completion = {"choices": [said | {"text": "x", "prompt_token_ids": ids[:4]}]}
    chat = {"choices": [said | {"message": {}}], "prompt_token_ids": ids[:4]}
    for answer in (completion, chat):
        (tmp_path / "answer.json").write_text(json.dumps(answer))
        report = run_json(capsys, "route", adapter, "--answer", tmp_path / "answer.json")
        assert [token["id"] for token in report["tokens"]] == ids
        assert [[e["expert"] for e in t["experts"]] for t in report["tokens"]] == expected
        assert report["text"] == "".join(token["text"] for token in report["tokens"])
    assert "first expert:" in run(capsys, "route", adapter, "--answer", tmp_path / "answer.json")[1]


@pytest.mark.parametrize(
    "answer",
    [
        "{", "[]", "{}", {"choices": []}, {"choices": [{"token_ids": [1]}]},
        {"choices": [{"text": "x"}], "prompt_token_ids": [1]}, {"choices": 2 * [{"token_ids": [1]}]},
        {"choices": [{"token_ids": None}], "prompt_token_ids": [1]},
        {"choices": [{"token_ids": [-1]}], "prompt_token_ids": [1]},
        {"choices": [{"token_ids": ["a"]}], "prompt_token_ids": [1]},
        {"choices": [{"token_ids": [1 << 80]}], "prompt_token_ids": [1]}, 100_000 * "[",
        {"error": {"message": "no"}}, b"\xff",
    ],
)  # fmt: skip
def test_answers_that_tell_no_tokens_are_refused(answer, adapter, tmp_path, capsys):
    file, data = tmp_path / "answer", answer
    if not isinstance(answer, bytes):
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
    file.write_bytes(data)
    code, out, err = run(capsys, "route", adapter, "--answer", file)
    assert code == 1 and not out and str(file) in err and "Traceback" not in err
    assert "return_token_ids" in err or "UTF-8" in err


def test_route_terminal_shows_white_space_and_no_foreign_codes(adapter, capsys, monkeypatch):
    code, out, _ = run(capsys, "route", adapter, "--text", TEXT)
    assert code == 0
    assert "def·w" in out and "↵\n→ret" in out.replace("⋯", "") and "first expert:" in out
    assert "\x1b" not in out
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    coloured = run(capsys, "route", adapter, "--text", TEXT)[1]
    assert "\x1b[30;48;2;" in coloured and "\x1b[31mred" not in coloured


def test_route_shows_how_a_request_settles(base, tmp_path, capsys):  # noqa: F811
    past = {"router_context": "mean", "num_experts": 3, "top_k": 2, "r": 2}
    made, page = make_random_adapter(base, tmp_path / "past", **past), tmp_path / "page.html"
    words = "def f(x): return x and the law " * 5
    report = run_json(capsys, "route", made, "--text", words, "--html", page)
    tokens, spans = report["tokens"], report["settling"]
    assert 16 < len(tokens) <= 64
    assert [(s["first"], s["last"]) for s in spans] == [(0, 3), (4, 15), (16, len(tokens) - 1)]
    for span in spans:
        said, shares = tokens[span["first"] : span["last"] + 1], [0.0] * 3
        for expert in (e for token in said for e in token["experts"]):
            shares[expert["expert"]] += expert["weight"] / len(said)
        assert span["shares"] == pytest.approx(shares)
    drawn = page.read_text("utf-8")
    assert drawn.count('class="bar"') == len(spans)
    assert all(f"width:{100 * part:.2f}%" in drawn for part in spans[0]["shares"] if part)
    _, out, _ = run(capsys, "route", made, "--text", words)
    assert "how the request settles" in out and "4-15" in out


@pytest.mark.parametrize("columns", ["46", "60", "80"])
def test_route_keeps_an_expert_and_its_share_on_one_line(adapter, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = run(capsys, "route", adapter, "--text", " ".join(real_prompts(4)))
    assert code == 0
    legend = out[out.index("first expert:") :].split("\n\n")[0]
    names = [printable(name) for name in load_adapter(adapter).config.expert_names]
    told = sum(len(re.findall(rf" {re.escape(name)}  +[\d.]+ %", legend)) for name in names)
    assert told == legend.count("%") >= 3
    assert all(len(line.rstrip()) <= int(columns) for line in legend.splitlines())


def test_route_of_file_and_of_nothing(adapter, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT, "utf-8")
    from_file = run_json(capsys, "route", adapter, "--file", tmp_path / "text")
    assert from_file == run_json(capsys, "route", adapter, "--text", TEXT)
    assert run_json(capsys, "route", adapter, "--text", "")["tokens"] == []
    (tmp_path / "latin").write_bytes("ö".encode("latin-1"))
    code, _, err = run(capsys, "route", adapter, "--file", tmp_path / "latin")
    assert code == 1 and "is not UTF-8" in err


def test_route_keeps_line_ends_of_a_file(adapter, tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"a\r\nb")
    assert run_json(capsys, "route", adapter, "--file", tmp_path / "text")["text"] == "a\r\nb"


def test_route_refuses_text_that_is_no_text(adapter, capsys):
    code, out, err = run(capsys, "route", adapter, "--text", "a\udcff")
    assert code == 1 and out == "" and "--text" in err and "is not UTF-8" in err


def test_route_into_a_pipe_that_closes_early(adapter):
    program = f"{Path(sys.executable).parent / 'vllm-adafuse'} route {adapter} --json --file -"
    command = f"yes | head -n 3000 | {program} | head -c 100"
    shell = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert shell.stderr == "" and len(shell.stdout) == 100


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_route_on_a_terminal_that_is_ascii(adapter, json_option):
    argv = [sys.executable, "-m", "vllm_adafuse.cli.main", "route", adapter, "--text", TEXT]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    shown = subprocess.run([*argv, *json_option], capture_output=True, env=env)
    assert shown.returncode == 0 and shown.stdout.isascii()
    if json_option:
        assert json.loads(shown.stdout)["text"] == TEXT


def test_route_without_backbone(copied, capsys):
    edit_config(copied, base_model_name_or_path="no-such-owner/no-such-model")
    code, out, err = run(capsys, "route", copied, "--text", "a")
    assert code == 1 and out == "" and "name it with --base" in err


def test_route_without_tokenizer(adapter, base, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, tmp_path)
    code, out, err = run(capsys, "route", adapter, "--base", tmp_path, "--text", "a")
    assert code == 1 and out == "" and "no usable tokenizer" in err


class Page(HTMLParser):
    """Tags, attributes and the text of the `text` element."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.tips, self.links, self.shown = [], [], [], ""
        self.depth = 0
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [v for k, v in attrs.items() if k in ("src", "href")]
        if "data-tip" in attrs:
            self.tips.append(attrs["data-tip"])
        if tag == "div":
            self.depth += 1

    def handle_endtag(self, tag):
        self.depth -= tag == "div"

    def handle_data(self, data):
        self.shown += data if self.depth else ""


@pytest.mark.parametrize("experts", [4, 30])
def test_route_page(adapter, base, tmp_path, capsys, experts):
    if experts == 30:
        names = [f"{EVIL}{e}" for e in range(30)]
        adapter = make_random_adapter(
            base, tmp_path / "many", num_experts=30, r=1, layers=[0], expert_names=names
        )
    file = tmp_path / "page.html"
    code, _, err = run(capsys, "route", adapter, "--text", TEXT, "--html", file)
    assert code == 0 and f"wrote {file}" in err
    content = file.read_text("utf-8")
    page = Page(content)
    assert "script" not in page.tags and "<script" not in content and page.links == []
    assert "url(" not in content and "@import" not in content
    tokens = run_json(capsys, "route", adapter, "--text", TEXT)["tokens"]
    assert len(page.tips) == len(tokens)
    for tip, token in zip(page.tips, tokens):
        assert f"(id {token['id']})" in tip
        assert all(f"{e['weight']:.3f}" in tip for e in token["experts"])
    plain = page.shown.replace("↵", "").replace("→", "\t").replace("·", " ").replace("⋯", "")
    assert plain == TEXT
    # Every first expert has a colour of its own.
    first = {token["experts"][0]["expert"] for token in tokens}
    rules = {line for line in content.splitlines() if line.lstrip("</style>").startswith(".e")}
    colours = {line.split("{")[1] for line in rules if "--h: " in line}
    assert len(colours) == len(first)


def test_html_to_unwritable_place(adapter, tmp_path, capsys):
    code, out, err = run(
        capsys, "route", adapter, "--text", "a", "--html", tmp_path / "none" / "page.html"
    )
    assert code == 1 and out == "" and "page.html" in err


# small parts


def test_ranges_and_bytes():
    assert common.ranges([5, 0, 1, 2, 7, 8]) == "0-2,5,7-8" and common.ranges([]) == ""
    sizes = [0, 1023, 1024, 1536, 5 << 20, 3 << 40, 5 << 50]
    assert [common.human_bytes(n) for n in sizes] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 TiB", "5120.0 TiB",
    ]  # fmt: skip


def test_colours_of_many_experts_differ():
    assert len({terminal_style(e) for e in range(128)}) == 128
    for ring in range(3):  # within one lightness, a dozen hues stay apart
        hues = sorted(hue(e) for e in range(12 * ring, 12 * ring + 12))
        assert len({level(e) for e in range(12 * ring, 12 * ring + 12)}) == 1
        assert min(b - a for a, b in zip(hues, hues[1:])) > 15
