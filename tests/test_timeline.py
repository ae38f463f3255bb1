"""A decode step's kernels: the step and the layer are found, the page says what the file says."""

import json

import benchmark_package  # noqa: F401
import pytest

from benchmarks.timeline import Options, last_step, one_layer, short_name, write_report

LAYERS = 3


def events(steps, kernels_before=0):
    """Prefill of some kernels, then steps of: embed, per layer qkv, attention, mlp; head."""
    names = ["prefill"] * kernels_before
    for _ in range(steps):
        names += ["embed", *["void qkv<1>(int)", "flash::fwd<2>", "mlp"] * LAYERS, "head"]
    return [(name, 10.0 * i, 2.0 + len(name)) for i, name in enumerate(names)]


def test_the_last_step_is_cut_out():
    step = last_step(events(2, 7), events(5, 7), 3)
    assert [name for name, *_ in step] == [name for name, *_ in events(1)]
    assert step[0][1] == 0.0 and step[1][1] == 10.0


@pytest.mark.parametrize("short,long", [(2, 2), (3, 2)])
def test_no_more_kernels_is_an_error(short, long):
    with pytest.raises(ValueError, match="expected a multiple"):
        last_step(events(short), events(long), 3)


def test_a_layer_begins_with_its_attention():
    layer = one_layer(events(1), LAYERS)
    assert [name for name, *_ in layer] == ["flash::fwd<2>", "mlp", "void qkv<1>(int)"]
    assert layer[0][1] == 0.0


def test_without_a_kernel_in_every_layer_there_is_no_layer():
    with pytest.raises(ValueError, match="no kernel runs 5 times"):
        one_layer(events(1), 5)


@pytest.mark.parametrize(
    "name,short",
    [
        ("void at::native::copy<4>(int*)", "copy"),
        ("_expand_kernel", "_expand_kernel"),
        ("sm90_gemm<a, b<c>>", "sm90_gemm"),
    ],
)
def test_short_names(name, short):
    assert short_name(name) == short


def test_the_page_is_written_from_the_file(tmp_path):
    pytest.importorskip("matplotlib")
    results, page = tmp_path / "results", tmp_path / "docs" / "timeline.md"
    results.mkdir()
    page.parent.mkdir()
    with pytest.raises(ValueError, match="measure first"):
        write_report(results, page)
    options = {"model": "tiny", "layers": 3, "experts": 8, "r": 16, "top_k": 2}
    rows = [{"options": options}]
    for kind in ("stock", "adafuse"):
        row = {"engine": kind, "batch": 4, "kernels": 11, "busy": 120.4, "wall": 150.6}
        rows.append(row | {"layer": one_layer(events(1), LAYERS)})
    content = {"benchmark": "timeline", "commit": "c0ffee", "command": "x"}
    content |= {"time": "20260101-000000", "cpu": "x86", "rows": rows}
    content |= {"versions": {"torch": "2.11", "vllm": "0.26"}}
    (results / "timeline-20260101-000000.json").write_text(json.dumps(content))
    write_report(results, page)
    text = page.read_text()
    assert "| adafuse | 11 | 120 | 151 |" in text and "| 3 | `qkv` | 20.0 | 18.0 |" in text
    assert "c0ffee" in text and (page.parent / "plots" / "timeline-4.svg").is_file()


def test_unknown_engines_are_refused():
    with pytest.raises(ValueError, match="engine fast: expected"):
        Options(engines=["fast"]).engine_options()
