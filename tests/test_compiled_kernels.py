"""What the compiler makes of the kernels for a Hopper GPU: no spills, no loads element by element.

Both cost more than any cut of the work can win back, and neither shows in a result.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    script = Path(__file__).with_name("compile_kernels.py")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-P", script]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_keep_their_values_in_registers(built):
    assert len(built) >= 8
    assert [row for row in built if row["spilled"]] == []
    # Two programs and more to a processor of 65536 registers; in long batches one deep one will do.
    at_once = {row["kernel"]: 65536 // (row["registers"] * row["threads"]) for row in built}
    for name in ("residual_norm tokens=16000", "wide_expand act=3 16000"):
        assert at_once.pop(name) >= 1
    assert min(at_once.values()) >= 2


def test_kernels_load_vectors(built):
    # What remains are scalars and short vectors: gates, counters, bits; in a long step's order also
    # the numbers of the eight rows that a thread reads.
    narrow = {
        row["kernel"]: row["narrow"] - 8 * row["kernel"].startswith("ordered") for row in built
    }
    assert {name: count for name, count in narrow.items() if count > 8} == {}
