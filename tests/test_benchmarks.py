"""The report says what the result files say; options of the benchmarks are checked."""

import argparse
import importlib
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import benchmark_package  # noqa: F401
import pytest

from benchmarks import engine, lora_load, record
from benchmarks.engine_options import Options, shapes
from benchmarks.engine_report import is_unsteady
from benchmarks.pages import read_results
from benchmarks.report import write_report

ROOT = Path(__file__).parent.parent


def program(name: str, *options) -> subprocess.CompletedProcess:
    """`python -m benchmarks.NAME` as the documents call it, from the repository's root."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, options)]
    env = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)


def module(name: str, *options) -> subprocess.CompletedProcess:
    """The same in this process, which has imported what it needs."""
    command, err, code = [f"{name}.py", *map(str, options)], io.StringIO(), 0
    with patch.object(sys, "argv", command), redirect_stderr(err), redirect_stdout(io.StringIO()):
        try:
            importlib.import_module(f"benchmarks.{name}").main()
        except SystemExit as e:
            code = e.code
        except ValueError as e:
            code = 1
            err.write(str(e))
    return subprocess.CompletedProcess(command, code, "", err.getvalue())


def result(path: Path, time: str, overhead: float) -> None:
    summary = {"min": 1.0, "max": 3.0, "all": [1.0, 2.0, 3.0]}
    options = {"model": "tiny", "layers": 2, "experts": 8, "r": 16, "top_k": 2}
    options |= {"engines": ["stock", "adafuse"], "prompt": 128, "prefill": [16, 1000]}
    options["batches"] = [8]
    row = {"what": "decode", "batch": 8, "unit": "ms"} | summary
    rows = [
        {"options": options},
        {"engine": "stock", "what": "start", "start_s": 40.4, "model_bytes": 123456},
        row | {"engine": "stock", "median": 2.0, "overhead": 0.0},
        row | {"engine": "adafuse", "median": 2.0 * (1 + overhead), "overhead": overhead},
    ]
    content = {"benchmark": "engine", "commit": f"c{time}", "command": "x/engine.py --a b"}
    content |= {"time": time, "cpu": "x86", "versions": {"torch": "2.11", "vllm": "0.26"}}
    (path / f"engine-{time}.json").write_text(json.dumps(content | {"rows": rows}))


def engine_file(path: Path, time: str, engines: list[str], overheads: list[float], **changed):
    """A run as `benchmarks.engine` saves it: each engine at the sizes of issue 3."""
    options = vars(Options(engines=engines)) | changed.pop("options", {})
    sizes = [("decode", n, 128) for n in options["batches"]] + [("prefill", 16, 1000)]
    rows: list[dict] = [{"options": options}]
    for i, kind in enumerate(engines):
        memory = {"model_bytes": (1000 + 300 * i) << 20, "step_bytes": (100 + i) << 20}
        memory |= {"bank_bytes": (200 * i) << 20, "passport_bytes": i << 20, "start_s": 50.0}
        rows.append({"engine": kind, "what": "start", "group": 0} | memory)
        for what, batch, length in sizes:
            row = {"engine": kind, "what": what, "batch": batch, "length": length, "group": 0}
            over = overheads[i] * (1 + (what == "prefill"))
            median = 4.0 * (1 + over)
            row |= {"median": median, "overhead": over, "unit": "ms", "all": [median] * 5}
            rows.append(row)
    content = {"benchmark": "engine", "commit": f"c{time}", "command": "x/engine.py", "time": time}
    content |= {"cpu": "x86", "gpu": "NVIDIA H200, 580\nNVIDIA H200, 580", "rows": rows}
    content |= {"versions": {"torch": "2.11", "vllm": "0.26"}} | changed
    (path / f"engine-{time}.json").write_text(json.dumps(content))


def report(results: Path, docs: Path) -> str:
    pytest.importorskip("matplotlib")
    return write_report(read_results(results), docs).read_text("utf-8")


def test_required_figures_stand_beside_the_newest_ones(tmp_path):
    engine_file(tmp_path, "1", ["stock", "adafuse", "lora"], [0.0, 0.5, 0.3])
    engine_file(tmp_path, "2", ["stock", "adafuse"], [0.0, 0.025])
    engine_file(tmp_path, "3", ["stock", "adafuse"], [0.0, 0.9], gpu="NVIDIA H100, 580")
    engine_file(tmp_path, "4", ["stock", "adafuse"], [0.0, 0.9], options={"r": 8})
    text = report(tmp_path, tmp_path)
    ours = "| +2.5 % | +2.5 % | +2.5 % | +2.5 % | +5.0 % | c2, `engine-2.json` |"
    assert f"| AdaFuse, 8 experts, top-2 {ours}" in text
    assert "one static adapter, r = 16 | +30.0 % |" in text and "+60.0 % | c1," in text
    assert "| **required** | ≤ 3 % | ≤ 4 % | ≤ 3 % | ≤ 2 % | ≤ 3 % | issue 3 |" in text
    assert "| met | met | met | missed by 0.5 | missed by 2.0 |" in text
    assert "Granite" not in text and "its own model" not in text and "cut off" not in text
    assert "NVIDIA H200, 580; vLLM" in text


def test_each_required_figure_is_that_of_the_newest_run_that_has_it(tmp_path):
    some = {"options": {"batches": [32], "cache": 8.5}}
    engine_file(tmp_path, "1", ["stock", "lora"], [0.0, 0.3], **some)
    engine_file(tmp_path, "2", ["stock", "adafuse"], [0.0, 0.025], options={"batches": [1, 8, 32]})
    engine_file(tmp_path, "3", ["stock", "adafuse"], [0.0, 0.01], **some)
    text = report(tmp_path, tmp_path)
    files = "c3, `engine-3.json`; c2, `engine-2.json`"
    assert f"top-2 | +2.5 % | +2.5 % | +1.0 % | – | +2.0 % | {files} |" in text
    assert "r = 16 | – | – | +30.0 % | – | +60.0 % | c1, `engine-1.json` |" in text
    assert "| met | met | met | not measured | met |" in text


def test_sizes_that_the_cache_did_not_hold_are_left_out(tmp_path):
    engine_file(tmp_path, "1", ["stock", "adafuse"], [0.0, 0.01])
    # Such a run is refused today.
    engine_file(tmp_path, "2", ["stock", "adafuse"], [0.0, 0.02], options={"cache": 8.5})
    text = report(tmp_path, tmp_path)
    assert "top-2 | +2.0 % | +2.0 % | +2.0 % | +1.0 % | +4.0 % | c2, `engine-2.json`; c1," in text
    assert "cache of 8.5 GiB did not hold all their keys and values" in text
    assert "once: decode 128 x 128 (17.0 GiB).\n" in text and "cut off" not in text
    shown = text.partition("## Whole engines")[2]
    assert "| engine | decode 1 x 128 | decode 8 x 128 | decode 32 x 128 | prefill" in shown


def test_granite_stands_over_stock_and_over_its_own_model(tmp_path):
    kinds = ["stock", "granite_bare", "granite", "adafuse"]
    engine_file(tmp_path, "1", kinds, [0.0, 0.25, 0.375, 0.125])
    text = report(tmp_path, tmp_path)
    assert "one active | +37.5 % |" in text and "without LoRAs | +10.0 % |" in text


def test_memory_over_stock_is_told_in_parts(tmp_path):
    engine_file(tmp_path, "1", ["stock", "adafuse"], [0.0, 0.1])
    text = report(tmp_path, tmp_path)
    # 300 MiB more, 200 of experts and 1 of passports; a step's peak is 1 MiB higher.
    assert "| adafuse | 50 s | 1,363,148,800 | 300.0 | 200.0 | 1.0 | 99.0 | 100.0 |" in text


def test_each_set_of_engines_has_a_table_and_groups_their_first(tmp_path):
    engine_file(tmp_path, "1", ["stock", "adafuse"], [0.0, 0.1])
    engine_file(tmp_path, "2", ["stock", "adafuse:4/8/1"], [0.0, 0.2])
    path = tmp_path / "engine-2.json"
    content = json.loads(path.read_text())
    stock = [row for row in content["rows"] if row.get("median") == 4.0]
    content["rows"] += [row | {"group": 1, "median": 5.0, "all": [5.0] * 5} for row in stock]
    content["rows"] += [{"what": "failed", "engine": "lora", "group": 1, "error": "no room\nx"}]
    path.write_text(json.dumps(content))
    text = report(tmp_path, tmp_path)
    assert text.count("\nMilliseconds of a decode step") == 2
    assert "| stock | 4.000 ms |" in text and "| stock | 5.000 ms |" in text
    assert "`lora` did not start: no room\n" in text
    assert "decode 8 x 128" in text and "prefill 16 x 1000" in text
    assert (tmp_path / "plots" / "engine-llama-2-7b-adafuse-4-8-1.svg").is_file()


def test_the_report_in_the_repository_is_that_of_its_result_files(tmp_path):
    pytest.importorskip("matplotlib")
    done = program("report", "--docs", tmp_path)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "benchmarks.md").read_text("utf-8")
    assert written == (ROOT / "docs" / "benchmarks.md").read_text("utf-8")


def test_the_newest_result_is_shown_and_all_are_listed(tmp_path):
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    results.mkdir()
    result(results, "20260102-000000", 0.25)
    result(results, "20260101-000000", 0.75)
    done = module("report", "--results", results, "--docs", tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "benchmarks.md").read_text("utf-8")
    assert "2.500 ms (+25.0 %)" in text and "+75.0 %" not in text
    assert "| stock | 40 s | 123,456 |" in text and "tiny, 2 layers" in text
    assert "The run was cut off before prefill 16 x 1000." in text
    assert "c20260101-000000" in text and "`engine.py --a b`" in text
    assert (tmp_path / "plots" / "engine-tiny-2-layers-adafuse.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    "name,options,said",
    [
        ("engine", ["--engines", "stock,fast"], "engine fast: expected stock, lora, granite"),
        ("engine", ["--prefill", "16,1000"], "16,1000: expected PROMPTSxTOKENS"),
        ("serve", ["--rates", "0"], "rates has 0, expected numbers above 0"),
        ("serve", ["--engines", "lora"], "engines has lora"),
    ],
)
def test_bad_options_are_refused(name, options, said):
    done = module(name, *options)
    assert done.returncode != 0 and said in done.stderr


def test_prefills_are_prompts_by_tokens():
    assert shapes("16x1000,1x512") == [(16, 1000), (1, 512)]
    for text in ("16x1000x2", "16", "0x5", "ax1"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text}: expected PROMPTSxTOKENS"):
            shapes(text)


@pytest.mark.parametrize(
    "kind", ["context", "pages", "pages:64/16/2", "pages:8/64/2", "context:12/4/1",
             "pages_context:12/24/3"],
)  # fmt: skip
def test_engines_of_routers_that_see_the_past_and_of_requests_that_name_theirs(
    kind, monkeypatch, tmp_path
):
    """An engine is asked for the adapter that is meant, in a pool that it fits into."""
    from vllm_adafuse.serving.adapters import open_adapter
    from vllm_adafuse.serving.pool import misfits

    asked = {}

    class Asked:
        collective_rpc = staticmethod(lambda _: [{}])

    def llm(path, **options):
        asked.update(options)
        return Asked()

    monkeypatch.setattr("vllm.LLM", llm)
    options = Options(model="tiny", engines=["stock", kind], experts=8, r=16)
    engine.write_config(options, tmp_path / "base")
    one, _ = engine.start(kind, options, tmp_path)
    name, _, numbers = kind.partition(":")
    path = asked["hf_overrides"]["adafuse_adapter"] if name == "context" else one.lora.lora_path
    adapter = open_adapter(path)
    experts, r, top_k = map(int, (numbers or "8/16/2").split("/"))
    config = adapter.config
    assert config.router_context == ("mean" if "context" in name else "")
    assert (config.num_experts, config.ranks, config.top_k) == (experts, (r,) * experts, top_k)
    assert ("enable_lora" in asked) is (name != "context")
    if name != "context":
        room = asked["max_loras"], asked["max_lora_rank"]
        asked_for = {"12/24/3": (3, 128), "64/16/2": (16, 64), "8/64/2": (2, 256)}
        assert misfits(adapter.size, *room) == [] and room == asked_for.get(numbers, (2, 64))


def test_the_first_engine_is_in_every_group():
    kinds = ["stock", "adafuse", "lora", "adafuse:4/8/1"]
    groups = [["stock", "adafuse", "lora"], ["stock", "adafuse:4/8/1"]]
    assert Options(engines=kinds, group=3).groups == groups
    assert Options(engines=kinds).groups == [kinds]
    assert Options(engines=["adafuse"], group=3).groups == [["adafuse"]]


@pytest.mark.parametrize(
    "changed,said",
    [
        ({"engines": ["stock", "adafuse:8/16"]}, "engine adafuse:8/16: expected .* pages:E/r/k"),
        ({"engines": ["stock", "lora:8/16/2"]}, "engine lora:8/16/2: expected stock, lora"),
        ({"engines": ["stock", "lora", "lora"]}, "engines has stock, lora, lora, expected each"),
        ({"group": 1}, "group is 1, expected at least 2"),
        # 128 sequences of 17 blocks of 16 tokens of 512 KiB; Mistral's, in float32, of 256 KiB.
        ({"cache": 16.5}, "cache is 16.5 GiB, expected at least 17: .* of decode 128 x 128, all"),
        ({"model": "mistral-7b", "dtype": "float32", "cache": 8.4}, "cache is 8.4 .* least 8.5: "),
        ({"batches": [1], "cache": 7.8}, "at least 7.88: .* of prefill 16 x 1000, all sequences"),
    ],
)
def test_bad_engine_options(changed, said):
    with pytest.raises(ValueError, match=said):
        Options(**changed)


def test_a_cache_that_holds_every_size_is_taken():
    assert Options(cache=17.0).cache == 17.0
    assert Options(cache=2.2, layers=4).cache == 2.2


def test_a_run_saves_what_it_has_and_spares_other_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(record.time, "strftime", lambda *_: "20260101-000000")
    path = record.save("x", [{"a": 1}], tmp_path, "c0ffee")
    assert record.save("x", [{"a": 1}, {"b": 2}], tmp_path, "c0ffee", path) == path
    content = json.loads(path.read_text())
    assert content["rows"] == [{"a": 1}, {"b": 2}] and content["time"] == "20260101-000000"
    with pytest.raises(FileExistsError):
        record.save("x", [], tmp_path)


class Stopped:
    stops: list["Stopped"] = []

    def stop(self):
        self.stops.append(self)


def test_an_engine_that_does_not_start_is_told_of_and_the_others_go_on(monkeypatch):
    def start(kind, options, root):
        if kind == "lora":
            raise MemoryError("no room")
        return Stopped(), {"start_s": 1.0}

    monkeypatch.setattr(engine, "start", start)
    monkeypatch.setattr(engine, "take_turns", lambda _, engines: iter([{"beside": list(engines)}]))
    options = Options(model="tiny", engines=["stock", "lora", "adafuse"], group=2)
    rows = list(engine.measure(options))
    assert [row.get("what", row.get("beside")) for row in rows] == [
        "start", "failed", ["stock"], "start", ["stock", "adafuse"],
    ]  # fmt: skip
    assert rows[1] == {
        "engine": "lora", "group": 0, "what": "failed", "error": "MemoryError: no room",
    }  # fmt: skip
    assert len(Stopped.stops) == 2
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")  # to be put back
    at_once = list(engine.measure(Options(model="tiny", engines=["stock", "lora"], cache=1.0)))
    assert [row.get("what", row.get("beside")) for row in at_once] == ["failed", ["stock"]]
    with pytest.raises(MemoryError):
        list(engine.measure(Options(model="tiny", engines=["lora", "adafuse"])))


def test_overheads_of_unsteady_turns_are_marked():
    one_outlier = {"median": 10.5, "all": [10.5, 8.1, 10.5, 10.5, 10.6]}
    assert not is_unsteady(one_outlier)
    assert is_unsteady({"median": 4.1, "all": [3.9, 4.1, 4.6]})
    assert not is_unsteady({"median": 4.1, "all": [4.1]})


def test_loads_beside_streams_are_saved_row_by_row(tmp_path, monkeypatch):
    async def measure(options, root):
        yield {"what": "without loads", "largest_ms": options.quiet}
        raise RuntimeError("no second row")

    monkeypatch.setattr(lora_load, "measure", measure)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")  # to be put back
    argv = ["lora_load", "--model", "tiny", "--quiet", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*argv, "--commit", "c0ffee"])
    with pytest.raises(RuntimeError, match="no second row"):
        lora_load.main()
    (path,) = tmp_path.glob("lora_load-*.json")
    content = json.loads(path.read_text())
    options, row = content["rows"]
    assert options["options"]["model"] == "tiny" and "out" not in options["options"]
    assert row == {"what": "without loads", "largest_ms": 2.0} and content["commit"] == "c0ffee"
