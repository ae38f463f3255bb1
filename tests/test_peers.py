"""benchmarks.peers: which engines are asked for what, each with its own environment; its table."""

import json
import os
import sys
import threading
from multiprocessing.context import SpawnProcess
from types import SimpleNamespace

import benchmark_package  # noqa: F401
import pytest

from benchmarks import lora, peers, spawn
from benchmarks.turns import Engine


def rows_of(kinds, sizes=(("decode", 1, 128), ("decode", 8, 128), ("prefill", 8, 700))):
    """Rows as a run saves them: each of `kinds` so many percent over stock."""
    return [
        {"engine": kind, "what": what, "batch": batch, "length": length, "ids": "uniform",
         "median": 5 * (1 + over / 100), "overhead": over / 100}
        for what, batch, length in sizes for kind, over in kinds.items()
        if peers.is_asked(kind, (what, batch, length))
    ]  # fmt: skip


def test_the_table_has_a_line_for_each_count_and_manager():
    rows = rows_of({"stock": 0, "ours:1": 2, "vllm:1": 20, "ours:4": 3, "vllm:4": 44, "dual:4": 33})
    lines = peers.report(rows).splitlines()
    assert lines[0] == "| LoRAs |  | decode 1 x 128 | decode 8 x 128 | prefill 8 x 700 |"
    assert lines[2:8] == [
        "| 1 | a merged checkpoint | 0 % | 0 % | 0 % |",
        "| 1 | vllm-adafuse | +2.0 % | +2.0 % | +2.0 % |",
        "| 1 | vLLM's LoRA | +20.0 % | +20.0 % | +20.0 % |",
        "| 4 | a merged checkpoint | – | – | – |",
        "| 4 | vllm-adafuse | – | +3.0 % | +3.0 % |",
        "| 4 | vLLM's LoRA | – | +44.0 % | +44.0 % |",
    ]
    assert lines[8:10] == [
        "| 4 | vLLM's LoRA, dual-stream | – | +33.0 % | +33.0 % |",
        "|  | stock | 5.00 ms | 5.00 ms | 5.00 ms |",
    ]


def test_files_of_several_runs_make_one_table_and_one_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for count in (1, 4):
        about = {"benchmark": "peers", "commit": "c", "time": str(count), "versions": {}}
        rows = [{"options": {}}, *rows_of({"stock": 0, f"ours:{count}": count})]
        (tmp_path / f"peers-{count}.json").write_text(json.dumps(about | {"rows": rows}))
    files = map(str, tmp_path.glob("*.json"))
    monkeypatch.setattr(sys, "argv", ["peers", "--report", *files, "--out", str(tmp_path)])
    peers.main()
    told = capsys.readouterr().out
    assert "| 1 | vllm-adafuse | +1.0 %" in told and "| 4 | vllm-adafuse | – | +4.0 %" in told
    assert "4 LoRAs" in (tmp_path / "peers.svg").read_text()
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def measured(monkeypatch, engines, dual):
    """Arguments of the engines that start, and rows."""
    started = {}

    def start_all(options, root, wanted):
        started.update(wanted)
        return {name: SimpleNamespace(name=name) for name in wanted}

    monkeypatch.setattr(lora, "make_loras", lambda options, root, count: list(range(count)))
    monkeypatch.setattr(lora, "start_all", start_all)
    monkeypatch.setattr(peers, "has_dual_stream", lambda: dual)
    monkeypatch.setattr(Engine, "stop", lambda self: None)
    monkeypatch.setattr(
        peers, "take_turns", lambda options, engines, asked: [
            (name, engine.llm.name, engine.lora) for name, engine in engines.items()
        ],
    )  # fmt: skip
    options = SimpleNamespace(engines=engines, loras=[1, 2], r=16)
    return started, list(peers.measure(options))


def test_each_manager_has_the_room_that_its_row_says(monkeypatch):
    started, rows = measured(monkeypatch, ["ours", "vllm", "dual"], dual=True)
    assert started["stock"] == {} and started["ours"]["max_loras"] == 2
    assert "additional_config" not in started["ours"]
    for count in (1, 2):
        theirs = started[f"vllm:{count}"]
        assert theirs["max_loras"] == count and theirs["additional_config"] == peers.VLLM_LORA
        assert started[f"dual:{count}"] == theirs | {"env": {peers.DUAL: "1"}}
    assert ("stock", "stock", None) in rows and ("vllm:1", "vllm:1", [0]) in rows
    assert ("ours:1", "ours", [0]) in rows and ("ours:2", "ours", [0, 1]) in rows


def test_dual_streams_that_are_not_to_be_had_are_left_out_by_name(monkeypatch):
    started, (told, *_) = measured(monkeypatch, ["ours", "dual"], dual=False)
    assert set(started) == {"stock", "ours"}
    assert told["engine"] == "dual" and told["what"] == "left out" and peers.DUAL in told["why"]


def test_sizes_that_a_cache_does_not_hold_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["peers", "--cache", "2", "--out", str(tmp_path)])
    with pytest.raises(ValueError, match=r"cache is 2 GiB, expected at least .* decode 128 x 128"):
        peers.main()
    assert not list(tmp_path.iterdir())


def test_a_thread_spawns_with_its_variables_and_the_others_without(monkeypatch):
    found, both = {}, threading.Barrier(2)
    monkeypatch.setattr(spawn, "_usual", lambda name: found.update({name: os.environ.get("HERS")}))
    monkeypatch.setattr(SpawnProcess, "_Popen", SpawnProcess._Popen)  # to be put back
    monkeypatch.delenv("HERS", raising=False)

    def one(name, env):
        with spawn.spawned_with(env):
            both.wait()
            SpawnProcess._Popen(name)
            both.wait()
        SpawnProcess._Popen(f"{name} afterwards")

    threads = [threading.Thread(target=one, args=a) for a in (("a", {"HERS": "1"}), ("b", {}))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {"a": "1", "b": None, "a afterwards": None, "b afterwards": None}
    assert "HERS" not in os.environ
