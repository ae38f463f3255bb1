"""`benchmarks.thresholds` measures two different things on both sides of every limit."""

import benchmark_package  # noqa: F401
import pytest
from launches import recording
from ops import DEVICE
from vllm_adafuse.kernels import dispatch, expand

from benchmarks import thresholds
from benchmarks.threshold_cells import CELLS, Cell, beyond, cells_of, limits
from benchmarks.thresholds import Runs, measure, verdict

recorded = pytest.mark.skipif(DEVICE == "cuda", reason="kernels are recorded, not run")


@recorded
@pytest.mark.parametrize("limit", CELLS)
def test_sides_of_a_limit_launch_different_things(limit):
    with recording(device="NVIDIA H200") as found:
        runs = Runs("cpu")
        cells = cells_of(limit)
        launched = []

        def timer(run, calls):
            found.clear()
            run()
            launched.append([(one.kernel.__name__, str(one)) for one in found])
            return [1.0 + len(launched)]

        for cell in cells:
            launched.clear()
            row = measure(cell, runs, 1, timer)
            assert launched[0] != launched[1], cell
            assert row["other"]["median"] == 2.0 and row["chosen"]["median"] == 3.0
            assert thresholds.line(row, cell).startswith(limit)
    assert len({cell.tokens for cell in cells}) >= 2 or "TOKENS" not in limit
    assert thresholds.summary([row]) == "OTHER 1"


def test_a_limit_is_moved_as_far_as_the_tokens_and_put_back():
    now = dispatch.MAX_SHORT_TOKENS
    assert beyond("MAX_SHORT_TOKENS", now) == {"MAX_SHORT_TOKENS": now - 1}
    assert beyond("MAX_SHORT_TOKENS", now + 1) == {"MAX_SHORT_TOKENS": now + 1}
    least = dispatch.MIN_DENSE_TOKENS
    assert beyond("MIN_DENSE_TOKENS", least) == {"MIN_DENSE_TOKENS": least + 1}
    assert beyond("MIN_DENSE_TOKENS", least - 1) == {"MIN_DENSE_TOKENS": least - 1}
    limit, now = "MAX_SHORT_EXPAND_TOKENS", dispatch.MAX_SHORT_EXPAND_TOKENS
    before = dispatch.choose_expand(now, False, 2)
    with pytest.raises(ZeroDivisionError), limits({limit: now - 1}, tuned=False):
        assert expand.MAX_SHORT_EXPAND_TOKENS == now - 1 and dispatch.configs_of("NVIDIA H200") == {}
        assert dispatch.choose_expand(now, False, 2) != before
        _ = 1 / 0
    assert expand.MAX_SHORT_EXPAND_TOKENS == dispatch.MAX_SHORT_EXPAND_TOKENS == now
    assert dispatch.choose_expand(now, False, 2) == before and dispatch.configs_of("NVIDIA H200")


def test_a_side_wins_in_every_draw_and_clearly():
    assert verdict([1.0, 2.0, 3.0], [1.1, 2.2, 3.3]) == "chosen"
    assert verdict([1.1, 2.2, 3.3], [1.0, 2.0, 3.0]) == "OTHER"
    assert verdict([1.1, 2.2, 2.9], [1.0, 2.0, 3.0]) == "even"
    assert verdict([1.005, 2.005, 3.005], [1.0, 2.0, 3.0]) == "even"


@recorded
def test_what_does_not_fit_is_told_of():
    class Full:
        def draw(self, cell):
            raise thresholds.triton.runtime.errors.OutOfResources(300000, 232448, "shared memory")

    cell = Cell("MAX_SHORT_TOKENS", {}, 256, "llama-3-8b", "o")
    row = measure(cell, Full(), 1, None)
    assert "does not run: out of resource: shared memory" in thresholds.line(row, cell)
