"""What the compiler makes of the kernels for a Hopper GPU: no spills, no loads or stores element
by element, no product that waits for the one before it.

Each costs more than any cut of the work can win back, and none shows in a result.
"""

import pytest
import triton
from uninterpreted import run_compiled


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return run_compiled("compile_kernels.py", tmp_path_factory.mktemp("triton"))


def test_kernels_keep_their_values_in_registers(built):
    assert len(built) >= 8
    assert [row for row in built if row["spilled"]] == []
    # Two programs and more to a processor of 65536 registers; in long batches one deep one will do,
    # and Triton 3.9 copies operands that lie in registers before each product (3.6 does not).
    at_once = {row["kernel"]: 65536 // (row["registers"] * row["threads"]) for row in built}
    acts = "1", "3", "3, paged"
    sizes = "2048", "16000", "16000, E=16"
    wide = [f"tma_expand act={act} {size}" for act in acts for size in sizes]
    copied = [] if triton.__version__ < "3.7" else wide
    assert at_once.pop("spread_routes E=256") >= 1  # it is one program
    # Tiles take most of a processor's shared memory.
    tiled = [row["kernel"] for row in built if row["kernel"].startswith("tma_gemm")]
    for name in ("add_norm tokens=16000", "fp8_shrink of 8 pages", *copied, *tiled):
        assert at_once.pop(name) >= 1
    assert min(at_once.values()) >= 2


def test_products_do_not_wait_for_one_another(built):
    assert [row["kernel"] for row in built if row["serialized"]] == []


def test_tiles_ask_for_the_shrink(built):
    """Before the loop, and within it where the loop may wait; streamed ones behind it. Whether they
    go on too early, `test_waits.py` sees."""
    asked = {row["kernel"]: row["acquires"] for row in built}
    tiled = {name: count for name, count in asked.items() if name.startswith("tma_gemm")}
    streamed = [count for name, count in asked.items() if name.startswith("decode_gemm")]
    assert len(tiled) >= 16 and len(streamed) >= 16 and min(streamed) >= 1
    for name, count in tiled.items():
        assert count >= (1 if "two loops" in name else 2), name


def test_kernels_store_vectors(built):
    assert [row for row in built if row["halves"]] == []


def test_kernels_load_vectors(built):
    # What remains are scalars and short vectors: gates, semaphores, bits. A token's own row of a
    # table, an expert at a time, is no vector; blocks in turn have gates for either member, and programs
    # of a page in fp8 those of its tokens.
    narrow = {row["kernel"]: row["narrow"] for row in built if "context_routes" not in row["kernel"]}
    most = {name: 12 if "blocks in turn" in name else 8 for name in narrow}
    most["fp8_shrink of 1 pages"] = 12
    assert {name: count for name, count in narrow.items() if count > most[name]} == {}
