"""LoRA shrink of the chosen experts: s[t, p, e] = gates[t, e] A[p, e] x[t].

p counts the linears of a packed projection (q, k, v), which have shrinks of their own. This is the
first half of SGMM (AdaFuse, arXiv 2603.11873, section 3). The decode kernel cuts `in` into slices,
so that many programs read one expert's A; the last of them adds their sums in a fixed order. An
expert that no token chose is not read. Rows of s are zero where the token did not choose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.configs import MAX_SHARED, MAX_SHRINK_SPLIT_K
from vllm_adafuse.kernels.launch import launch, overlap
from vllm_adafuse.kernels.plans import on_hopper
from vllm_adafuse.kernels.registry import matmul_f32
from vllm_adafuse.kernels.whole import cdiv, power_of_2
from vllm_adafuse.kernels.workspace import Workspace

BLOCK_IN = 256
SHRINK_STAGES = 3
# Elements of `in` that one program of a launch of its own reads, and about how many programs there
# are at most: with one or two experts chosen nothing else keeps the GPU busy. (Within a projection
# the shrink has time: the caller says how it is cut.)
_SLICE = 512
_PROGRAMS = 1024
# Programs that are no burden to the product which they stand in front of.
_FEW_PROGRAMS = 24


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


@triton.jit
def _shrink_slice(
    slot, linear_idx, expert, block, pid_k, used, x_ptr, a_ptr, gates_ptr, lora_a_out_ptr,
    partial_ptr, split_k_semaphore_ptr, semaphore_ptr, n_tokens, x_stride, size_in, n_experts, rank,
    n_linears, split_k, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A slice of `in` for one block of ranks of one expert of one linear: s [T, BLOCK_R].

    When its s is stored, the semaphore rises by one.
    """
    rows = tl.arange(0, BLOCK_T)
    ranks = block * BLOCK_R + tl.arange(0, BLOCK_R)
    token_mask, real = rows < n_tokens, ranks < rank
    sums = tl.zeros([BLOCK_R, BLOCK_T], dtype=tl.float32)
    last = True
    if used:
        a_rows = ((linear_idx * n_experts + expert) * rank + ranks).to(tl.int64) * size_in
        begin, end = range_of_k(size_in, pid_k, split_k, BLOCK_IN)
        for start in tl.range(begin, end, BLOCK_IN, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_IN)
            k_mask = k < end
            a = tl.load(
                a_ptr + a_rows[:, None] + k[None, :],
                mask=real[:, None] & k_mask[None, :], other=0.0,
            )  # fmt: skip
            x = tl.load(
                x_ptr + rows[None, :] * x_stride + k[:, None],
                mask=token_mask[None, :] & k_mask[:, None], other=0.0,
            )  # fmt: skip
            sums = tl.dot(a, x, sums, input_precision="ieee")
        if split_k > 1:
            sums, last = last_sums(
                sums, partial_ptr, split_k_semaphore_ptr, slot, pid_k, split_k, BLOCK_R, BLOCK_T
            )
    if last:
        gates = tl.load(gates_ptr + rows * n_experts + expert, mask=token_mask, other=0.0)
        at = ((rows * n_linears + linear_idx) * n_experts + expert)[None, :] * rank + ranks[:, None]
        # Not a bare product: what another token sees of this expert must not matter.
        lora_a_out = tl.where(gates[None, :] != 0, sums * gates[None, :], 0.0)
        lora_a_out = lora_a_out.to(lora_a_out_ptr.dtype.element_ty)
        tl.store(lora_a_out_ptr + at, lora_a_out, mask=token_mask[None, :] & real[:, None])
        tl.debug_barrier()
        tl.atomic_add(semaphore_ptr, 1, sem="release")


@triton.jit
def shrink_program(
    pid, x_ptr, a_ptr, gates_ptr, active_ptr, lora_a_out_ptr, partial_ptr, split_k_semaphore_ptr,
    semaphore_ptr, n_tokens, x_stride, size_in, n_experts, rank, n_linears, n_slots, split_k,
    LISTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The programs of a shrink: a slot for each linear, expert and block of ranks, or for those of
    the list of active experts, in turns if there are fewer slots."""
    slot, pid_k = pid // split_k, pid % split_k
    blocks = tl.cdiv(rank, BLOCK_R)
    if LISTED:
        of_expert = n_linears * blocks
        linear_idx, block = slot % of_expert // blocks, slot % blocks
        count = tl.load(active_ptr + 1).to(tl.int32)
        for i in range(slot // of_expert, count, n_slots // of_expert):
            expert = tl.load(active_ptr + 2 + i).to(tl.int32)
            _shrink_slice(
                i * of_expert + slot % of_expert, linear_idx, expert, block, pid_k, True,
                x_ptr, a_ptr, gates_ptr, lora_a_out_ptr, partial_ptr, split_k_semaphore_ptr,
                semaphore_ptr, n_tokens, x_stride, size_in, n_experts, rank, n_linears, split_k,
                BLOCK_T, BLOCK_R, BLOCK_IN, STAGES,
            )  # fmt: skip
    else:
        linear_idx, expert = slot // (n_experts * blocks), (slot // blocks) % n_experts
        used = (tl.load(active_ptr) >> expert) & 1 != 0
        # Of an expert that no token chose one program remains: it writes the zeros.
        if used | (pid_k == 0):
            _shrink_slice(
                slot, linear_idx, expert, slot % blocks, pid_k, used,
                x_ptr, a_ptr, gates_ptr, lora_a_out_ptr, partial_ptr, split_k_semaphore_ptr,
                semaphore_ptr, n_tokens, x_stride, size_in, n_experts, rank, n_linears, split_k,
                BLOCK_T, BLOCK_R, BLOCK_IN, STAGES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens"])
def _shrink_kernel(
    x_ptr, a_ptr, gates_ptr, active_ptr, lora_a_out_ptr, partial_ptr, split_k_semaphore_ptr,
    semaphore_ptr, n_tokens, x_stride, size_in, n_experts, rank, n_linears, split_k,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # launched before the kernel in front of it has ended
        tl.extra.cuda.gdc_wait()
    shrink_program(
        tl.program_id(0), x_ptr, a_ptr, gates_ptr, active_ptr, lora_a_out_ptr, partial_ptr,
        split_k_semaphore_ptr, semaphore_ptr, n_tokens, x_stride, size_in, n_experts, rank,
        n_linears, 0, split_k, False, BLOCK_T, BLOCK_R, BLOCK_IN, STAGES,
    )  # fmt: skip


@dataclass(frozen=True)
class ShrinkGrid:
    """How the programs of a bank's shrink are cut: slots, each of `split_k` programs."""

    block_r: int
    split_k: int
    slots: int

    @classmethod
    def of(cls, lora_a: torch.Tensor, split_k: int = 0) -> ShrinkGrid:
        """For an A, in so many slices of `in`; 0: a sane number."""
        linears, experts, rank, size_in = lora_a.shape
        block_r = min(32, max(16, power_of_2(rank)))
        slots = linears * experts * cdiv(rank, block_r)
        alone = max(1, min(MAX_SHRINK_SPLIT_K, size_in // _SLICE, _PROGRAMS // slots))
        return cls(block_r, split_k or alone, slots)

    def for_tokens(self, tokens: int, experts: int) -> ShrinkGrid:
        """With slots for an expert of each token, or two where one linear is all, as far as there
        are so many, which take turns if more are active: the tiles that follow share processors
        with slots, with empty ones too. (7bf8d2a: qkv at 8 tokens with 8 slots 19.2 to 20.3 us,
        with 16 27.3 to 29.7; b4c16c0: o of 4 mixtures with 8 20.3, with 16 17.0, of LoRAs 14.4.)"""
        of_expert = self.slots // experts
        own = power_of_2(tokens) * (2 if of_expert == 1 else 1)
        most = max(own, _FEW_PROGRAMS // (of_expert * self.split_k))
        return replace(self, slots=of_expert * min(experts, most))

    @property
    def programs(self) -> int:
        return self.slots * self.split_k


def fit_cols(wanted: int, block_r: int, block_t: int, itemsize: int) -> int:
    """Elements of `in` in a step of the shrink: as many as wanted, or as shared memory holds."""
    while SHRINK_STAGES * (block_r + block_t) * wanted * itemsize > MAX_SHARED:
        wanted //= 2
    return wanted


def shrink_triton(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    gates: torch.Tensor,
    active: torch.Tensor,
    workspace: Workspace,
) -> torch.Tensor:
    """Projects up to 64 tokens into the rank space of their experts, in one launch.

    Args:
        x: [T, in], the projection's input; rows contiguous.
        lora_a: [P, E, R, in] contiguous, dtype of x.
        gates: [N, E] float32, N >= T; rows past T are not read.
        active: [1] int64, a bit for each expert with a gate in the first T rows.
        workspace: of the device.

    Returns:
        lora_a_out: [T, P, E * R], dtype of x, in the workspace.
    """
    tokens = x.shape[0]
    linears, experts, rank, size_in = lora_a.shape
    grid = ShrinkGrid.of(lora_a)
    lora_a_out = workspace.view(x.dtype, tokens, linears, experts * rank)
    block_t = max(16, power_of_2(tokens))
    block_in = fit_cols(BLOCK_IN, grid.block_r, block_t, x.element_size())
    launch(
        _shrink_kernel, (grid.programs,),
        x, lora_a, gates, active, lora_a_out, workspace.partial_sums, workspace.split_k_semaphores,
        workspace.unused, tokens, x.stride(0), size_in, experts, rank, linears, grid.split_k,
        BLOCK_T=block_t, BLOCK_R=grid.block_r, BLOCK_IN=block_in, STAGES=SHRINK_STAGES, num_warps=4,
        num_stages=SHRINK_STAGES, **overlap(on_hopper(x)),
    )  # fmt: skip
    return lora_a_out


def shrink_torch(x: torch.Tensor, lora_a: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """The reference and the path of long batches: see `shrink_triton`."""
    tokens, size_in = x.shape
    linears, experts, rank, _ = lora_a.shape
    unweighted = matmul_f32(x, lora_a.view(-1, size_in).t()).view(tokens, linears, experts, rank)
    lora_a_out = torch.empty(tokens, linears, experts, rank, dtype=x.dtype, device=x.device)
    torch.mul(unweighted, gates[:tokens, None, :, None], out=lora_a_out)
    return lora_a_out.view(tokens, linears, experts * rank)
