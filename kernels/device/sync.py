"""How programs of one launch share sums, and wait for what others of it leave."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def range_of_k(size_in, pid_k, split_k, COLS: tl.constexpr):
    """Where a slice of `in` begins and ends, in whole steps of COLS."""
    size = tl.cdiv(tl.cdiv(size_in, split_k), COLS) * COLS
    begin = pid_k * size
    return begin, tl.minimum(begin + size, size_in)


@triton.jit
def wait_for_shrink(semaphore_ptr, count):
    """Until so many programs have left what they have of s."""
    while tl.atomic_add(semaphore_ptr, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def wait_now(semaphore_ptr, count, now):
    """`wait_for_shrink` if it is now, each thread by itself and as a load, so that the loop around
    it stays pipelined; the accelerator may read s after it."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred %now, %less;
        .reg .s32 %seen;
        setp.ne.s32 %now, $3, 0;
        mov.s32 %seen, $2;
        AGAIN:
        @%now ld.acquire.gpu.global.s32 %seen, [$1];
        setp.lt.s32 %less, %seen, $2;
        @%less bra.uni AGAIN;
        @%now fence.proxy.async.global;
        mov.s32 $0, %seen;
        }""",
        "=r,l,r,r", [semaphore_ptr.to(tl.int64), count, now.to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def fence():
    """What was written before is there for the accelerator after it."""
    tl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.s32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def leave_sums(acc, partial_ptr, slot, pid_k, split_k,
               ROWS: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """Writes a program's sums [ROWS, T] where the last of its slot finds them."""
    at = tl.arange(0, ROWS)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    place = partial_ptr + (slot * split_k + pid_k) * (ROWS * BLOCK_T) + at
    tl.store(place, acc, cache_modifier=".cg")


@triton.jit
def is_last(split_k_semaphore_ptr, split_k):
    """Whether this program is the last of those that share a semaphore; what they left is there."""
    tl.debug_barrier()
    last = tl.atomic_add(split_k_semaphore_ptr, 1, sem="acq_rel") == split_k - 1
    tl.debug_barrier()
    if last:
        tl.store(split_k_semaphore_ptr, 0)  # as the next launch expects it
    return last


@triton.jit
def all_sums(partial_ptr, slot, split_k, ROWS: tl.constexpr, BLOCK_T: tl.constexpr):
    """The sums that all programs of a slot left, added in their order."""
    at = tl.arange(0, ROWS)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    base = partial_ptr + slot * split_k * (ROWS * BLOCK_T) + at
    acc = tl.zeros([ROWS, BLOCK_T], dtype=tl.float32)
    for other in range(split_k):
        acc += tl.load(base + other * (ROWS * BLOCK_T), cache_modifier=".cg")
    return acc


@triton.jit
def last_sums(acc, partial_ptr, split_k_semaphore_ptr, slot, pid_k, split_k,
              ROWS: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """Leaves a program's sums [ROWS, T]; the last of its slot gets all, added in their order."""
    leave_sums(acc, partial_ptr, slot, pid_k, split_k, ROWS, BLOCK_T)
    last = is_last(split_k_semaphore_ptr + slot, split_k)
    if last:
        acc = all_sums(partial_ptr, slot, split_k, ROWS, BLOCK_T)
    return acc, last
