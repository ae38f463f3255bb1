"""benchmarks.dashboard and benchmarks.metrics without a server: a recorded Prometheus, recorded turns. And
plots as they are saved."""

import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import benchmark_package  # noqa: F401
import pytest
from vllm_adafuse.serving.metrics import COLLECTOR, AdapterCollector

from benchmarks import dashboard, metrics
from benchmarks.pages import smaller

BOARD = json.loads(dashboard.BOARD.read_text("utf-8"))
# Labels of what Prometheus had, by a word of the query.
RECORDED = {
    "expert_tokens": [{"adapter": "code", "expert": "0"}, {"adapter": "code", "expert": "3"}],
    "tokens_total": [{"adapter": "code", "kind": "prompt"}, {"adapter": "", "kind": "generation"}],
    "requests": [{"adapter": "law", "reason": "length"}],
    "refusals": [{"reason": "AdapterAbsent"}],
    "info": [
        {"adapter": "code", "kind": "mixture", "content": "abc" * 20, "instance": "s:1"},
        {"adapter": "gone", "kind": "lora", "content": "def" * 20, "instance": "s:1"},
    ],
}


class Prometheus(BaseHTTPRequestHandler):
    """Answers a range of any query: a value every second, none at the third, and NaN at first."""

    def do_GET(self):
        asked = {key: value[0] for key, value in parse_qs(urlsplit(self.path).query).items()}
        self.server.asked.append(asked)
        start, query = float(asked["start"]), asked["query"]
        labels = next((found for word, found in RECORDED.items() if word in query), [{}])
        if self.server.empty and self.server.empty in query:
            labels = []
        times = [start + second for second in (0, 1, 2, 4)]
        result = [
            {"metric": one, "values": [[t, "NaN" if t == start else str(i)] for i, t in enumerate(times)]}
            for one in labels
        ]
        for one in result:
            if one["metric"].get("adapter") == "gone":
                one["values"].pop()
        body = json.dumps({"status": "success", "data": {"result": result}}).encode()
        self.send_response(400 if "broken" in query else 200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def prometheus():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Prometheus)
    server.asked, server.empty = [], ""
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_every_panel_is_asked_and_drawn(prometheus, tmp_path):
    server, url = prometheus
    panels = dashboard.asked(url, BOARD, 1000.0, 1100.0)
    assert {panel.title for panel in panels} == {panel["title"] for panel in BOARD["panels"]}
    queries = [asked["query"] for asked in server.asked]
    assert len(queries) == sum(len(panel["targets"]) for panel in BOARD["panels"])
    assert not any("$" in query for query in queries) and any("[100s]" in query for query in queries)
    lines = {panel.title: panel.lines for panel in panels}
    assert lines["Tokens per second by adapter"] == [
        (name, [(1.0, 1.0), (2.0, 2.0), (4.0, 3.0)]) for name in ("code prompt", "(base) generation")
    ]
    dashboard.draw(panels, tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text("utf-8")
    words = re.findall(r">([^<>\n]+)</text>", drawn)
    assert {panel.title for panel in panels} <= set(words)
    assert {"code 3", "law length", "AdapterAbsent", "abcabcabcabc", "mixture"} <= set(words)
    assert "defdefdefdef" not in words  # it had gone by the end
    ElementTree.fromstring(drawn)


def test_answers_that_were_kept_are_drawn_again(prometheus, tmp_path):
    """Lines keep their ends and their bends, and no other points."""
    _, url = prometheus
    kept = tmp_path / "answers.json"
    panels = dashboard.asked(url, BOARD, 1000.0, 1100.0)
    panels[0].lines.append(("<&>", [(0.0, 0.0), (1.0, 3.0), (2.0, 3.0), (3.0, 3.0), (4.0, 0.0)]))
    kept.write_text(json.dumps([vars(panel) for panel in panels]))
    assert dashboard.main(["--answers", str(kept), "--out", str(tmp_path / "picture.svg")]) == 0
    drawn = (tmp_path / "picture.svg").read_text("utf-8")
    ElementTree.fromstring(drawn)
    left, (width, height) = dashboard.LEFT, dashboard.PLOT
    low, at = dashboard.TOP + height, [left + width * i / 4 for i in range(5)]
    assert (
        f'd="M{left} {low}L{at[1]:.0f} {dashboard.TOP}L{at[3]:.0f} {dashboard.TOP}L{at[4]:.0f} {low}"' in drawn
    )


def test_what_shows_nothing_is_an_error(prometheus):
    server, url = prometheus
    server.empty = "adafuse_pool_pages"
    with pytest.raises(ValueError, match="Pages of the pool: no data"):
        dashboard.asked(url, BOARD, 1000.0, 1100.0)
    panel = BOARD["panels"][0] | {"targets": [{"expr": "broken"}]}
    with pytest.raises(ValueError, match=f"{panel['title']}: .*status"):
        dashboard.asked(url, {"panels": [panel]}, 1000.0, 1100.0)
    with pytest.raises(ValueError, match="a variable that is not known"):
        dashboard.filled("rate(x[$__interval])", 5)


def test_the_picture_in_the_documents_is_of_this_dashboard():
    drawn = dashboard.PICTURE.read_text("utf-8")
    assert all(f">{panel['title']}<" in drawn for panel in BOARD["panels"])
    assert len(drawn) <= 25 << 10


def test_a_machine_without_prometheus_is_told_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="apt-get install prometheus"):
        with dashboard.prometheus("127.0.0.1:1", tmp_path):
            pass


def test_turns_are_counted_or_not(monkeypatch):
    done, flushed = [], []

    def flush():
        end = time.thread_time() + 0.01
        while time.thread_time() < end:
            pass
        flushed.append(len(done))

    collector = SimpleNamespace(
        count=lambda *args: done.append(args), count_experts=lambda *args: done.append(args), flush=flush
    )
    monkeypatch.setattr("vllm_adafuse.serving.metrics.COLLECTOR", collector)
    for on in (True, False):
        with metrics.counted(on) as spent:
            collector.count("a", 1, 2, "stop")
            collector.count_experts(None, [1])
        assert len(spent.ending) == (2 if on else 0) and len(done) == 2
        assert len(spent.batches) == 1 and spent.batches[0] >= 0.01
    assert flushed == [2, 2]


def test_what_is_counted_beside_is_timed(monkeypatch):
    """By the processor's time, not by the clock."""
    monkeypatch.setattr("vllm_adafuse.serving.metrics.COLLECTOR", AdapterCollector())
    worked, end = threading.Event(), threading.Event()

    def work():
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        worked.set()
        end.wait()

    def begin(name):
        worked.clear()
        threading.Thread(target=work, name=name).start()
        worked.wait()

    begin(metrics.BESIDE[0])  # in a turn before
    with metrics.counted(False) as spent:
        for name in (*metrics.BESIDE, "another"):
            begin(name)
    end.set()
    assert 0.1 <= spent.batches[0] < 0.15


def test_turns_of_each_size_are_saved(tmp_path, monkeypatch):
    started, ended = [], []
    core = SimpleNamespace(shutdown=lambda: ended.append(True))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))

    def start(options, root, **extra):
        started.append((options.longest, extra["disable_log_stats"], extra["max_lora_rank"]))
        assert (root / "base" / "config.json").is_file() and (root / "mix3").is_dir()
        return llm

    def timed(engine, lengths, ids):
        assert len(engine.lora) == 4 and set(lengths) == {(5, 7)} and len(ids.prompt(9)) == 9
        for _ in lengths:
            COLLECTOR.count("a", 5, 7, "stop")
        return 1.0

    monkeypatch.setattr(metrics.lora, "start", start)
    monkeypatch.setattr(metrics, "timed", timed)
    words = f"metrics --model tiny --batches 1,3 --prompt 5 --tokens 7 --repeats 2 --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", words.split())
    metrics.main()
    (file,) = tmp_path.glob("metrics-*.json")
    _, one, three = json.loads(file.read_text())["rows"]
    assert (one["batch"], three["batch"], one["overhead"], len(one["with"]["all"])) == (1, 3, 0, 2)
    assert started == [(20, False, 128)] and ended == [True]


def test_what_counting_costs():
    times = {True: [1.01, 1.02, 2.04], False: [1.0, 1.0, 2.0]}
    row = metrics.row_of(4, 10, times, metrics.Spent([0.001, 0.002], [0.006]))
    assert row["overhead"] == pytest.approx(0.02) and row["with"]["median"] == pytest.approx(102)
    assert row["ending"] == pytest.approx(0.003 / 4.07)
    assert row["batches"] == pytest.approx(0.006 / 4.07)
    assert row["counts"] == pytest.approx(0.009 / 4.07)
    assert row["us_a_request"] == pytest.approx(750)
    with pytest.raises(RuntimeError, match="no request was counted"):
        metrics.row_of(4, 10, times, metrics.Spent([], [0.006]))


def test_plots_in_fewer_bytes():
    svg = (
        '<!DOCTYPE svg\n"no">\n<svg><metadata>\n<a>by</a>\n</metadata>\n<defs><style type="text/css">*{a: b}</style></defs>\n'
        '<!-- no -->\n   <g id="axes_1">\n'
        '<path d="M 1.23456 2 \nL 3 -4.0001 \nz\n" style="fill: none"/><g id="used"/>'
        '<g clip-path="url(#c)"><g>\n<use xlink:href="#used" style="fill: none"/>\n</g>\n</g>'
        '<text style="font: 7px A B, C, D, sans-serif; x: y" transform="rotate(-0 1 2)">M 1 L 2</text>'
        '<text transform="rotate(-90 1 2)"/></g></svg>'
    )
    assert smaller(svg) == (
        '<svg><defs><style type="text/css">*{a: b}.s0{fill: none}.s1{font: 7px A B, sans-serif; x: y}</style></defs>\n'
        '<path d="M1.23 2L3 -4z" class="s0"/><g id="used"/>'
        '<g clip-path="url(#c)"><use xlink:href="#used" class="s0"/>\n</g>'
        '<text class="s1">M 1 L 2</text><text transform="rotate(-90 1 2)"/></svg>'
    )
