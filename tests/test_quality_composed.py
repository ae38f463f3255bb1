"""benchmarks.quality --composed at toy size: every method has figures; a run goes on where it was."""

import json

import pytest
from test_quality import corpus_root  # noqa: F401

from benchmarks.quality import composed
from benchmarks.quality.__main__ import main

METHODS = ["oracle", "context-k1", "context-k2", "context-k5", "token-k2", "token-k5", "uniform",
           "centroid", "ties", "dare_ties", "dare_linear", "one-lora"]  # fmt: skip


def test_a_run_and_its_repetition(corpus_root, tmp_path, capsys, monkeypatch):  # noqa: F811
    arguments = ["--composed", "--size", "toy", "--roots", str(corpus_root)]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "out" / composed.RESULT).read_text())["results"]["0"]
    assert list(first) == METHODS
    assert all(figures["perplexity"] > 1 and figures["switched"] > 1 for figures in first.values())
    assert len({figures["perplexity"] for figures in first.values()}) >= len(METHODS) - 1
    table = capsys.readouterr().out
    assert "| oracle |" in table and "+0.0%" in table
    monkeypatch.setattr(composed, "fit", lambda *a, **k: pytest.fail("trained again"))
    assert main(arguments) == 0
    again = json.loads((tmp_path / "out" / composed.RESULT).read_text())["results"]["0"]
    assert again == first
