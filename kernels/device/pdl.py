"""What a kernel may do before the one in front of it has ended.

A short kernel between two projections, a norm, lets the next launch begin at once (`begin_next`):
its programs find their places, ask for the first line of each of their weights' rows, which come
from no kernel (`prefetch`), and wait (`gdc_wait`). Programmatic dependent launch: NVIDIA GPUs of
Hopper's kind and later.
"""

import triton
import triton.language as tl


@triton.jit
def begin_next():
    """Lets the next launch begin, if it wants to, as soon as all programs of this one have."""
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(at):
    """Asks for the line of 128 bytes that each of some pointers lies in, nothing else: it comes to
    the second level cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def prefetch_pairs(
    w_ptr, start, height, size_in, APART: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """`prefetch` for ROWS rows of w [height, size_in], and for those APART rows behind them."""
    rows = start + tl.arange(0, ROWS)
    for member in tl.static_range(2):
        prefetch(w_ptr + tl.minimum(rows + member * APART, height - 1).to(tl.int64) * size_in)
