"""The fused switch: one launch merges the experts of one route into every adapted weight.

    W_live = W + Σ_j g_j B[e_j] A[e_j]          e, g: the k experts of the route and their weights

for all linears of all layers (AdaFuse, arXiv 2603.11873, section 3, where it decodes one stream).
The pristine W is kept, read, and W_live written beside it: the previous route leaves with the
overwriting, so that any number of switches later W_live is W + delta rounded once. Per bf16 weight
that moves 4 bytes and keeps 2. Adding and subtracting in place moves as much and drifts; a
remainder of 8 bits beside the live weight would keep 1 byte, move 6, and still not give W back
where the delta outweighs it.

The chosen experts stand side by side: B [out, k r], each column times its gate, stays in registers
while a program goes along a strip of W, and the stacked A [k r, in] streams past with W. The gated
B is kept as a sum of two values of its type: products then err by 2^-17 of the delta, where
rounding W_live to bf16 errs by 2^-9.

Not a torch op: the weights are reached through a table of pointers, which torch cannot follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
# Columns of the table: pointers, sizes, the first program of the linear; padded to 64 bytes.
FIELDS = 8
# Columns of all chosen B side by side up to which they stay in registers.
MAX_COLUMNS = 128


@dataclass(frozen=True)
class SwitchConfig:
    """How the work is cut.

    Attributes:
        rows, cols: of the tile that is held in registers; powers of two from 16.
        strip: columns that one program goes over, a multiple of `cols`.
        warps: of a program.
        stages: of the pipeline over a strip.
    """

    rows: int = 64
    cols: int = 128
    strip: int = 2048
    warps: int = 4
    stages: int = 3

    def __post_init__(self):
        for name, least in (("rows", 16), ("cols", 16), ("warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"switch: {name} is {value}, expected a power of two from {least}")
        if self.strip <= 0 or self.strip % self.cols:
            raise ValueError(f"switch: strip is {self.strip}, expected a multiple of {self.cols}")
        if self.stages < 1:
            raise ValueError(f"switch: stages is {self.stages}, expected 1 or more")

    @classmethod
    def choose(cls, itemsize: int, columns: int, sizes_in: Sequence[int]) -> SwitchConfig:
        """The default was found on an H200 for 32 columns of bfloat16 (docs/switch.md). More
        columns, or wider numbers, get tiles that registers and shared memory hold (not measured).

        Args:
            itemsize: bytes of a weight.
            columns: k r, of all chosen B side by side.
            sizes_in: `in` of all linears.
        """
        if itemsize > 2:
            return cls(64 if columns <= 32 else 32 if columns <= 64 else 16, 64)
        # A last tile that is cut off puts masks on all of them.
        wide = all(size % 128 == 0 for size in sizes_in) or any(size % 64 for size in sizes_in)
        return cls(64 if columns <= 64 else 32, 128 if wide else 64)


@dataclass(frozen=True)
class SwitchPlan:
    """All adapted weights of a model, and where one launch finds them.

    Attributes:
        live: per linear W_live [out, in], written by every switch.
        pristine: per linear W [out, in], only read.
        banks_a: per linear A [E, r, in].
        banks_b: per linear B [E, out, r].
        table: [linears, FIELDS] int64, pointers and sizes.
        places: [programs] int32, the linear of each program.
        config: the one that `places` was made for.
        align: the largest power of two up to 16 that divides every `in`.
        even: every weight is cut into whole tiles.
    """

    live: tuple[torch.Tensor, ...]
    pristine: tuple[torch.Tensor, ...]
    banks_a: tuple[torch.Tensor, ...]
    banks_b: tuple[torch.Tensor, ...]
    table: torch.Tensor
    places: torch.Tensor
    config: SwitchConfig
    align: int
    even: bool

    @classmethod
    def make(
        cls,
        live: Sequence[torch.Tensor],
        pristine: Sequence[torch.Tensor],
        banks_a: Sequence[torch.Tensor],
        banks_b: Sequence[torch.Tensor],
        config: SwitchConfig | None = None,
    ) -> SwitchPlan:
        """Builds the table, once.

        Args:
            live, pristine, banks_a, banks_b: as in the class; all contiguous, of one dtype
                (float32, float16 or bfloat16), device, E and r. They must not be freed or moved.
            config: default `SwitchConfig.choose` for routes of any number of experts.

        Raises:
            ValueError: tensors that do not fit each other.
        """
        if problem := _misfit(live, pristine, banks_a, banks_b):
            raise ValueError(f"switch: {problem}")
        if config is None:
            experts, rank = banks_a[0].shape[:2]
            sizes_in = [w.shape[1] for w in live]
            config = SwitchConfig.choose(live[0].itemsize, experts * rank, sizes_in)
        rows, places, first, align, even = [], [], 0, 16, True
        for i, (w, w0, a, b) in enumerate(zip(live, pristine, banks_a, banks_b)):
            size_out, size_in = w.shape
            align = math.gcd(align, size_in)
            even = even and size_out % config.rows == 0 and size_in % config.cols == 0
            programs = triton.cdiv(size_out, config.rows) * triton.cdiv(size_in, config.strip)
            pointers = [t.data_ptr() for t in (w0, w, a, b)]
            rows.append([*pointers, size_in, size_out, first, 0])
            places += [i] * programs
            first += programs
        device = live[0].device
        return cls(
            tuple(live), tuple(pristine), tuple(banks_a), tuple(banks_b),
            torch.tensor(rows, dtype=torch.int64, device=device),
            torch.tensor(places, dtype=torch.int32, device=device),
            config, align, even,
        )  # fmt: skip

    def with_config(self, config: SwitchConfig) -> SwitchPlan:
        """The same weights, cut otherwise."""
        return SwitchPlan.make(self.live, self.pristine, self.banks_a, self.banks_b, config)

    def moved_bytes(self, top_k: int) -> int:
        """Bytes that a switch must move: W read, W_live written, k experts read."""
        experts = self.banks_a[0].shape[0]
        banks = sum(t.nbytes for t in (*self.banks_a, *self.banks_b))
        return sum(2 * w.nbytes for w in self.live) + banks * top_k // experts


def _misfit(live, pristine, banks_a, banks_b) -> str | None:
    if not live or not len(live) == len(pristine) == len(banks_a) == len(banks_b):
        counts = [len(t) for t in (live, pristine, banks_a, banks_b)]
        return f"{counts} live and pristine weights, A and B; expected as many of each, not none"
    dtype, device = live[0].dtype, live[0].device
    experts, rank = banks_a[0].shape[:2]
    if dtype not in TRITON_TYPES:
        return f"weights are {dtype}, expected float32, float16 or bfloat16"
    for i, (w, w0, a, b) in enumerate(zip(live, pristine, banks_a, banks_b)):
        size_out, size_in = w.shape
        shapes = [tuple(t.shape) for t in (w0, a, b)]
        wanted = [(size_out, size_in), (experts, rank, size_in), (experts, size_out, rank)]
        if shapes != wanted:
            return f"linear {i}: W, A, B have shapes {shapes}, expected {wanted}"
        for t in (w, w0, a, b):
            if t.dtype != dtype or t.device != device or not t.is_contiguous():
                return (
                    f"linear {i}: a tensor of {t.dtype} on {t.device} with strides {t.stride()}, "
                    f"expected contiguous {dtype} on {device}"
                )
            if t.is_cuda and t.data_ptr() % 16:
                past = t.data_ptr() % 16
                return f"linear {i}: a tensor begins {past} bytes past a multiple of 16"
    return None


@triton.jit
def _chosen(
    ids_ptr, weights_ptr, route, chunk,
    TOP_K: tl.constexpr, RANK: tl.constexpr, BLOCK_C: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_C columns of [B[e_0] … B[e_k-1]]: expert, its gate, the column's rank, validity."""
    column = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    expert = tl.zeros([BLOCK_C], dtype=tl.int64)
    gate = tl.zeros([BLOCK_C], dtype=tl.float32)
    first = chunk * BLOCK_C // RANK
    for i in tl.static_range(SLOTS):  # scalars: a gather would load once per column
        slot = first + i
        mine = column // RANK == slot
        one = tl.load(ids_ptr + route + slot, mask=slot < TOP_K, other=0).to(tl.int64)
        expert = tl.where(mine, one, expert)
        weight = tl.load(weights_ptr + route + slot, mask=slot < TOP_K, other=0.0)
        gate = tl.where(mine, weight, gate)
    return expert, gate, column % RANK, column < TOP_K * RANK


@triton.jit
def _gated_b(
    b_ptr, expert, gate, rank, valid, rows, rows_in, size_out,
    TYPE: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """gate B as a sum of two values of B's type, which leaves 2^-17 of it where one leaves 2^-9."""
    place = expert[None, :] * RANK * size_out + rows[:, None] * RANK + rank[None, :]
    b = tl.load(b_ptr + place, mask=rows_in[:, None] & valid[None, :], other=0.0)
    gated = b.to(tl.float32) * gate[None, :]
    high = gated.to(TYPE)
    return high, (gated - high.to(tl.float32)).to(TYPE)


@triton.jit
def _plus_product(
    delta, high, low, a_ptr, expert, rank, valid, cols, cols_in, size_in,
    TYPE: tl.constexpr, RANK: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """delta + (high + low) [A[e_0]; …]"""
    place = ((expert * RANK + rank) * size_in)[:, None] + cols[None, :]
    if EVEN and FULL:
        a = tl.load(a_ptr + place)
    else:
        a = tl.load(a_ptr + place, mask=valid[:, None] & cols_in[None, :], other=0.0)
    delta = tl.dot(high, a, delta, input_precision="ieee")
    if TYPE != tl.float32:
        delta = tl.dot(low, a, delta, input_precision="ieee")
    return delta


@triton.jit
def _switch_kernel(
    table_ptr, places_ptr, ids_ptr, weights_ptr, row_ptr, merged_ptr,
    TYPE: tl.constexpr, TOP_K: tl.constexpr, RANK: tl.constexpr, FIELDS: tl.constexpr,
    ALIGN: tl.constexpr, EVEN: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr,
    SLOTS: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STRIP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    at = table_ptr + tl.load(places_ptr + pid) * FIELDS
    # What comes from memory has no alignment that the compiler could know.
    w0_ptr = tl.multiple_of(tl.load(at).to(tl.pointer_type(TYPE)), 16)
    w_ptr = tl.multiple_of(tl.load(at + 1).to(tl.pointer_type(TYPE)), 16)
    a_ptr = tl.multiple_of(tl.load(at + 2).to(tl.pointer_type(TYPE)), 16)
    b_ptr = tl.multiple_of(tl.load(at + 3).to(tl.pointer_type(TYPE)), 16)
    size_in = tl.multiple_of(tl.load(at + 4).to(tl.int32), ALIGN)
    size_out = tl.load(at + 5).to(tl.int32)
    local = pid - tl.load(at + 6).to(tl.int32)
    route = tl.load(row_ptr) * TOP_K
    if merged_ptr is not None:
        merged = tl.load(merged_ptr) * TOP_K
        others = 0
        for j in range(TOP_K):
            new_id, old_id = tl.load(ids_ptr + route + j), tl.load(ids_ptr + merged + j)
            new, old = tl.load(weights_ptr + route + j), tl.load(weights_ptr + merged + j)
            others += ((new_id != old_id) | (new != old)).to(tl.int32)
        if others == 0:
            return

    strips = tl.cdiv(size_in, STRIP)
    row0, col0 = local // strips * ROWS, local % strips * STRIP
    base = row0.to(tl.int64) * size_in
    tall = tl.arange(0, ROWS)
    rows = row0 + tall
    rows_in = rows < size_out
    if CHUNKS == 1:  # B serves the whole strip
        expert, gate, rank, valid = _chosen(
            ids_ptr, weights_ptr, route, 0, TOP_K, RANK, BLOCK_C, SLOTS
        )  # fmt: skip
        high, low = _gated_b(
            b_ptr, expert, gate, rank, valid, rows, rows_in, size_out, TYPE, RANK
        )  # fmt: skip
    for start in tl.range(col0, tl.minimum(col0 + STRIP, size_in), COLS, num_stages=STAGES):
        start = tl.multiple_of(start, COLS)
        cols = start + tl.arange(0, COLS)
        cols_in = cols < size_in
        inside = rows_in[:, None] & cols_in[None, :]
        place = tall[:, None] * size_in + cols[None, :]
        if EVEN:
            w = tl.load(w0_ptr + base + place, eviction_policy="evict_first")
        else:
            w = tl.load(w0_ptr + base + place, mask=inside, other=0.0)
        delta = tl.zeros([ROWS, COLS], dtype=tl.float32)
        if CHUNKS == 1:
            delta = _plus_product(
                delta, high, low, a_ptr, expert, rank, valid, cols, cols_in, size_in,
                TYPE, RANK, EVEN, FULL,
            )  # fmt: skip
        else:
            for chunk in range(CHUNKS):
                expert_c, gate_c, rank_c, valid_c = _chosen(
                    ids_ptr, weights_ptr, route, chunk, TOP_K, RANK, BLOCK_C, SLOTS
                )  # fmt: skip
                high_c, low_c = _gated_b(
                    b_ptr, expert_c, gate_c, rank_c, valid_c, rows, rows_in, size_out, TYPE, RANK
                )  # fmt: skip
                delta = _plus_product(
                    delta, high_c, low_c, a_ptr, expert_c, rank_c, valid_c, cols, cols_in, size_in,
                    TYPE, RANK, EVEN, FULL,
                )  # fmt: skip
        result = (w.to(tl.float32) + delta).to(TYPE)
        if EVEN:
            tl.store(w_ptr + base + place, result, eviction_policy="evict_first")
        else:
            tl.store(w_ptr + base + place, result, mask=inside)


def switch_constants(plan: SwitchPlan, top_k: int) -> dict:
    """The kernel's compile-time arguments."""
    config, columns = plan.config, top_k * plan.banks_a[0].shape[1]
    block_c = min(MAX_COLUMNS, max(16, triton.next_power_of_2(columns)))
    return {
        "TYPE": TRITON_TYPES[plan.live[0].dtype], "TOP_K": top_k, "RANK": columns // top_k,
        "FIELDS": FIELDS, "ALIGN": plan.align, "EVEN": plan.even, "FULL": columns % block_c == 0,
        "BLOCK_C": block_c, "CHUNKS": triton.cdiv(columns, block_c),
        "SLOTS": min(top_k, triton.cdiv(block_c, columns // top_k) + 1),
        "ROWS": config.rows, "COLS": config.cols, "STRIP": config.strip, "STAGES": config.stages,
    }  # fmt: skip


def switch_triton(
    plan: SwitchPlan,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    row: torch.Tensor,
    merged: torch.Tensor | None = None,
) -> None:
    """One launch; see `switch`."""
    _switch_kernel[(plan.places.numel(),)](
        plan.table, plan.places, expert_ids, weights, row, merged,
        **switch_constants(plan, expert_ids.shape[1]),
        num_warps=plan.config.warps,
    )  # fmt: skip


def switch_torch(
    plan: SwitchPlan,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    row: torch.Tensor,
    merged: torch.Tensor | None = None,
) -> None:
    """The reference, linear by linear; see `switch`."""
    ids, gates = expert_ids[row][0].long(), weights[row][0]
    if merged is not None:
        if torch.equal(expert_ids[row], expert_ids[merged]) and torch.equal(
            weights[row], weights[merged]
        ):
            return
    for w, w0, a, b in zip(plan.live, plan.pristine, plan.banks_a, plan.banks_b):
        # [out, k, r] and [k, r, in] become one product over k r.
        tall = (b[ids].float() * gates[:, None, None]).transpose(0, 1).flatten(1)
        w.copy_(torch.addmm(w0.float(), tall, a[ids].float().flatten(0, 1)))


def switch(
    plan: SwitchPlan,
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    row: torch.Tensor,
    merged: torch.Tensor | None = None,
) -> None:
    """Merges one route into all live weights; whatever was merged before is gone.

    Reads nothing back to the host, so that it can be captured in a CUDA graph. Weights of the
    same plan must not be read by another stream meanwhile.

    Args:
        plan: of the model.
        expert_ids: [N, k] int32 routes, contiguous; ids from 0 to E - 1.
        weights: [N, k] float32, LoRA's scale included; contiguous.
        row: [1] integer on the device: which of the N routes. With the passports of a vocabulary
            as routes it is the token's id.
        merged: [1] integer on the device: the row that the live weights hold already, if that is
            known. Where its route is the new one to the last bit, nothing is moved.
    """
    run = switch_triton if plan.table.is_cuda else switch_torch
    run(plan, expert_ids, weights, row, merged)
