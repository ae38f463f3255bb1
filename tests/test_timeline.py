"""A step's kernels: the step and the layer are found, the page says what the file says."""

import json

import benchmark_package  # noqa: F401
import pytest

from benchmarks.timeline import (
    Options,
    gaps,
    last_step,
    one_layer,
    short_name,
    span,
    totals,
    without_copies,
    write_report,
)

LAYERS = 3


def events(steps, kernels_before=0, blocks_at=()):
    """Prefill of some kernels, then steps of: embed, per layer qkv, attention, mlp; head. Some
    steps have a kernel more, which takes the next block of keys."""
    names = ["prefill", "embed"] * kernels_before
    for step in range(steps):
        names += ["block"] if step in blocks_at else []
        names += ["embed", *["void qkv<1>(int)", "flash::fwd<2>", "mlp"] * LAYERS, "head"]
    return [(name, 10.0 * i, 2.0 + len(name)) for i, name in enumerate(names)]


STEP = [name for name, *_ in events(1)]


@pytest.mark.parametrize("blocks_at", [(), (6,), (0, 3, 7)])
def test_a_step_is_cut_out(blocks_at):
    step = last_step(events(2, 7), events(8, 7, blocks_at), 6)
    assert [name for name, *_ in step] == STEP
    assert step[0][1] == 0.0 and step[1][1] == 10.0


def test_prefills_of_other_lengths_do_not_matter():
    # "embed" runs in prefills too: once more, or less, than there are steps.
    for before in (6, 8):
        step = last_step(events(2, 7), events(8, before), 6)
        assert sorted(name for name, *_ in step) == sorted(STEP)


def test_kernels_that_overlap_may_change_places():
    long = events(8)
    long[-14], long[-13] = long[-13], long[-14]
    assert sorted(name for name, *_ in last_step(events(2), long, 6)) == sorted(STEP)


@pytest.mark.parametrize("short,long", [(2, 2), (3, 2), (1, 3)])
def test_without_a_kernel_in_each_step_there_is_none(short, long):
    with pytest.raises(ValueError, match="in 3 more steps, but none runs once in each"):
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
        ("void vllm::(anonymous namespace)::merge<8>(int*)", "merge"),
        ("(anonymous namespace)::fill(int)", "fill"),
        ("sm90_gemm<a, b<c>>", "sm90_gemm"),
    ],
)
def test_short_names(name, short):
    assert short_name(name) == short


def test_totals_are_of_names_without_template_arguments():
    found = [("void a<1>(int)", 0.0, 2.0), ("b", 1.0, 4.0), ("void a<2>(int)", 3.0, 1.0)]
    assert totals(found) == [("b", 1, 4.0), ("a", 2, 3.0)]
    assert span(found) == 5.0


COPIED = [
    ("void a<1>(int)", 100.0, 20.0),
    ("long", 105.0, 5.0),  # within a
    ("overlaps", 118.0, 4.0),
    ("Memcpy HtoD (Pinned -> Device)", 123.0, 1.5),
    ("Memset (Device)", 125.0, 0.5),
    ("b", 130.0, 10.0),
    ("at once", 140.0, 1.0),
    ("ns::c<2>(int)", 141.5, 1.0),
    ("Memcpy DtoH (Device -> Pageable)", 143.0, 1.0),
]


def test_gaps_are_between_kernels_whatever_overlaps():
    assert gaps(COPIED) == [(22.0, 8.0, 2.0, "overlaps", "b"), (41.0, 0.5, 0.0, "at once", "c")]
    kernels = without_copies(COPIED)
    assert len(kernels) == 6 and span(kernels) == 42.5
    # Half microseconds in which some kernel runs.
    runs = {at for _, begin, us in kernels for at in range(int(2 * begin), int(2 * begin + 2 * us))}
    assert sum(us for _, us, *_ in gaps(kernels)) == span(kernels) - len(runs) / 2


def test_without_a_gap_there_is_none():
    assert gaps([("a", 5.0, 2.0), ("b", 6.0, 3.0), ("c", 9.0, 1.0)]) == []


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
        rows.append(row | {"what": "decode", "layer": one_layer(events(1), LAYERS)})
        named = [(f"gemm{i}", 2, 100.0 - i) for i in range(32)]
        named[0] = ("_tile_linear_kernel", 2, 100.0)
        row |= {"what": "prefill", "totals": named}
        rows.append(row | {"length": 500})  # of an older file
        rows.append(row | {"length": 1000, "idle": 30.2, "gaps": gaps(COPIED)})
    content = {"benchmark": "timeline", "commit": "c0ffee", "command": "x"}
    content |= {"time": "20260101-000000", "cpu": "x86", "rows": rows}
    content |= {"versions": {"torch": "2.11", "vllm": "0.26"}}
    (results / "timeline-20260101-000000.json").write_text(json.dumps(content))
    write_report(results, page)
    text = page.read_text()
    assert "| adafuse | 11 | 120 | 151 |" in text and "| 3 | `qkv` | 20.0 | 18.0 |" in text
    assert "## Prefill, 4 x 1000 tokens" in text and "| `gemm1` | 2 | 99.0 |" in text
    assert "| `2 others` | 4 | 139.0 |" in text and "gemm31" not in text
    assert "| `_tma_gemm_kernel` | 2 | 100.0 |" in text
    old, new = text.split("## Prefill")[1:]
    assert "no kernel" not in old and "| adafuse | 11 | 120 | 151 | 30 |" in new
    assert "| `overlaps` | `b` | 22 | 8.0 | 2.0 |" in new
    assert "c0ffee" in text and (page.parent / "plots" / "timeline-4.svg").is_file()


def test_unknown_engines_are_refused():
    with pytest.raises(ValueError, match="engine fast: expected"):
        Options(engines=["fast"]).engine_options()
