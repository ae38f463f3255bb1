"""The kernels of layer-wise routing, compiled for a Hopper GPU: they build, and nothing spills."""

from uninterpreted import run_compiled


def test_they_build_and_keep_their_values_in_registers(tmp_path):
    rows = run_compiled("compile_layer_kernels.py", tmp_path)
    assert len(rows) >= 25
    assert [row["kernel"] for row in rows if row["spilled"] or row["serialized"]] == []
