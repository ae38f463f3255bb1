"""benchmarks.lora: engines that start at once and load their adapters meanwhile; its cache."""

import sys
import threading
import time
from types import SimpleNamespace

import benchmark_package  # noqa: F401
import pytest

from benchmarks import lora, phases
from benchmarks.engine_options import Options, cache_needs, too_large


class Core:
    """An engine's core, which one thread may ask at a time; an adapter is there at the third question."""

    def __init__(self):
        self.asked, self.busy = [], threading.Lock()

    def add_lora(self, request):
        assert self.busy.acquire(blocking=False), "two threads ask at once"
        time.sleep(0.002)
        self.asked.append(request)
        self.busy.release()
        return self.asked.count(request) > 2


class LLMEngine:
    """Asks as ours does: again and again until the adapter is there."""

    def __init__(self):
        self.engine_core, self.under_way, self.most = Core(), set(), 0

    def add_lora(self, request):
        self.under_way.add(request)
        self.most = max(self.most, len(self.under_way))
        while not self.engine_core.add_lora(request):
            time.sleep(0.002)
        self.under_way.discard(request)


def test_an_engine_loads_several_adapters_at_once_and_is_asked_one_by_one():
    engine = LLMEngine()
    lora.load(SimpleNamespace(llm_engine=engine), list("abcdef"))
    asked = engine.engine_core.asked
    assert sorted(asked) == sorted("abcdef" * 3) and engine.most == lora.LOADS
    assert asked[:3] == ["a"] * 3  # what the first makes the others share
    assert "add_lora" not in vars(engine.engine_core)
    lora.load(SimpleNamespace(), [])


def test_engines_start_at_once_and_load_while_others_start(monkeypatch, tmp_path, capsys):
    events, both, loaded = [], threading.Barrier(2, timeout=20), threading.Event()

    def start(options, root, **extra):
        both.wait()
        if extra["name"] == "slow":
            assert loaded.wait(20), "nothing is loaded while an engine starts"
        return extra

    def load(llm, requests):
        events.append((llm, requests))
        loaded.set()

    monkeypatch.setattr(lora, "start", start)
    monkeypatch.setattr(lora, "load", load)
    monkeypatch.setattr(lora, "load_general_plugins", lambda: None)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")  # to be put back
    wanted = {"slow": {"name": "slow"}, "fast": {"name": "fast", "loads": [1, 2]}}
    found = lora.start_all(SimpleNamespace(cache=1.0), tmp_path, wanted)
    assert found == {"slow": {"name": "slow"}, "fast": {"name": "fast"}}
    assert events == [({"name": "fast"}, [1, 2]), ({"name": "slow"}, [])]
    told = capsys.readouterr().out
    assert told.count("phase    start of ") == told.count("phase    loads of ") == 2


def made(monkeypatch, tmp_path, engines):
    """What the engines of a run are started with, and its rows."""
    wanted = {}

    def start_all(options, root, asked):
        wanted.update(asked)
        return dict.fromkeys(asked)

    monkeypatch.setattr(lora, "make_loras", lambda options, root, count: list(range(count)))
    monkeypatch.setattr(lora, "make_mixtures", lambda options, root: ["mixture"])
    monkeypatch.setattr(lora, "add_rest", lambda base, first, out, r: out)
    monkeypatch.setattr(lora, "start_all", start_all)
    options = SimpleNamespace(engines=engines, loras=3, r=16, experts=8)
    return wanted, lora.make_engines(options, tmp_path)


def test_each_engine_has_the_adapters_of_its_rows_before_the_first_turn(monkeypatch, tmp_path):
    wanted, rows = made(monkeypatch, tmp_path, list(lora.ENGINES))
    assert wanted["stock"] == {} and wanted["mixtures"]["loads"] == ["mixture"]
    assert wanted["vllm"]["loads"] == wanted["adafuse"]["loads"] == [0, 1, 2]
    both = wanted["both"]
    assert both["loads"] == [0, 1, 2, rows["both_rest"].lora]
    assert both["max_cpu_loras"] == 4  # or one of them would be read anew in every turn
    for name, rounded in (("adafuse", "fp8"), ("mixtures", "fp8_mixtures")):
        assert wanted[rounded] == wanted[name] | {"additional_config": lora.FP8}
    assert [rows[name].lora for name in ("fp8_one", "fp8_many")] == [0, [0, 1, 2]]
    assert rows["fp8_mixtures"].lora == rows["mixtures"].lora
    wanted, rows = made(monkeypatch, tmp_path, ["fp8_mixtures"])
    assert wanted["fp8_mixtures"]["loads"] == ["mixture"] and list(rows) == ["stock", "fp8_mixtures"]
    wanted, rows = made(monkeypatch, tmp_path, ["adafuse"])
    assert list(wanted) == ["stock", "adafuse"] and list(rows) == ["stock", "one", "many", "base"]


def options_of(monkeypatch, *argv):
    """The options that a run of this command line has."""
    found = []
    monkeypatch.setattr(sys, "argv", ["lora", "--batches", "8", "--prefill", "2x500", *argv])
    monkeypatch.setattr(lora, "measure", lambda options: found.append(options) or [])
    lora.main()
    return found[0]


def test_the_cache_is_what_the_sizes_need_unless_vllm_is_to_choose(monkeypatch, capsys):
    options = options_of(monkeypatch)
    need = max(cache_needs(vars(options)).values())
    assert need < options.cache < 1.1 * need + 0.6 and not too_large(vars(options))
    assert capsys.readouterr().out.startswith("phase    imports ")
    assert options_of(monkeypatch, "--memory", "0.2").cache is None
    assert options_of(monkeypatch, "--cache", "6", "--memory", "0.05").cache == 6


def test_a_size_needs_what_its_sequences_hold():
    # 2 layers of 2 heads of 32 numbers, keys and values in float32; 17 tokens take two blocks.
    options = vars(Options(model="tiny", batches=[3], prompt=8, steps=(1, 9), prefill=[], dtype="float32"))
    assert cache_needs(options) == {("decode", 3, 8): 3 * 32 * 2 * 2 * 64 * 4 / (1 << 30)}


def test_a_phase_is_told_of_also_if_it_fails(capsys):
    with pytest.raises(KeyError), phases.phase("load"):
        raise KeyError
    assert capsys.readouterr().out.split() == ["phase", "load", "0.0", "s"]
