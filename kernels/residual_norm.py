"""LoRA expand of a projection, the residual's addition and the RMSNorm behind it, in one launch:

    z[t] = residual[t] + y[t] + Σ_e B[:, e] (gates[t, e] s[t, e])
    out[t] = z[t] / sqrt(mean(z[t]²) + eps) * weight

for o_proj and down_proj, whose outputs go that way in most decoders. y and s = A x of all experts
come side by side from `joint_linear`. Few tokens find the deltas in y already (`stream_linear`);
they take the addition and the norm alone.

A program takes a block of tokens and a group of columns, writes z and leaves its sums of squares;
the last of the programs of a block of tokens reads z again and writes out. In long batches one
program has all columns. The experts so ride on a pass that the model makes anyway (AdaFuse, arXiv
2603.11873, section 3, for the deltas).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.expand import _add_delta, _load_b, _load_s, can_overlap, expert_blocks
from vllm_adafuse.kernels.order_routes import ORDER_TILE, Order
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.scratch import Scratch
from vllm_adafuse.kernels.stream_linear import MAX_STREAM_TOKENS

# Programs that share a block of tokens, at most, and tokens in steps that are cut so.
MAX_GROUPS = 64
MAX_GROUPED_TOKENS = 512


@triton.jit(do_not_specialize=["n_tokens"])
def _residual_norm_kernel(
    y_ptr, s_ptr, residual_ptr, weight_ptr, b_ptr, gates_ptr, present_ptr, order_ptr,
    z_ptr, out_ptr, sums_ptr, ticket_ptr,
    n_tokens, y_stride, residual_stride, n_experts, eps,
    WIDTH: tl.constexpr, EXPAND: tl.constexpr, ORDER: tl.constexpr, PDL: tl.constexpr,
    RANK: tl.constexpr, SKIP: tl.constexpr, EVEN_K: tl.constexpr, ONE: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_T: tl.constexpr, COLS: tl.constexpr, NORM_COLS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    group, block = tl.program_id(0), tl.program_id(1)
    EVEN: tl.constexpr = WIDTH % (COLS * LOOP) == 0
    KEEP: tl.constexpr = GROUPS == 1 and LOOP == 1
    rows = block * BLOCK_T + tl.arange(0, BLOCK_T)
    here = rows < n_tokens
    size = n_experts * RANK
    columns = group * (COLS * LOOP) + tl.arange(0, COLS)
    inside = columns < WIDTH
    first_b = tl.zeros([COLS, BLOCK_E * BLOCK_R], dtype=b_ptr.dtype.element_ty)
    if ONE and LOOP == 1:  # B needs no kernel before this one: asked for while that one ends
        b_at = b_ptr + columns.to(tl.int64) * size
        first_b = _load_b(b_at, inside, 0, n_experts, 0, RANK, EVEN, EVEN_K, BLOCK_E, BLOCK_R)
    if PDL:
        tl.extra.cuda.gdc_wait()
    present = tl.load(present_ptr + (block if ORDER else 0))
    if ORDER:
        rows = tl.load(order_ptr + rows, mask=here, other=0)
    wide_rows = rows.to(tl.int64)
    s_at = s_ptr + wide_rows * y_stride
    first_s = tl.zeros([BLOCK_T, BLOCK_E * BLOCK_R], dtype=y_ptr.dtype.element_ty)
    if ONE:
        first_s = _load_s(
            s_at, gates_ptr, rows, 0, here, n_experts, 0,
            RANK, True, EVEN_K, BLOCK_T, BLOCK_E, BLOCK_R,
        )  # fmt: skip
    squares = tl.zeros([BLOCK_T], dtype=tl.float32)
    z = tl.zeros([BLOCK_T, COLS], dtype=tl.float32)
    for i in tl.range(LOOP, num_stages=STAGES):
        at = columns + i * COLS
        inside = at < WIDTH
        mask = here[:, None] & (inside[None, :] if not EVEN else (at >= 0)[None, :])
        b_at = b_ptr + at.to(tl.int64) * size
        b = first_b
        if ONE and LOOP > 1:
            b = _load_b(b_at, inside, 0, n_experts, 0, RANK, EVEN, EVEN_K, BLOCK_E, BLOCK_R)
        z = tl.load(y_ptr + wide_rows[:, None] * y_stride + at[None, :], mask=mask, other=0.0)
        before_at = residual_ptr + wide_rows[:, None] * residual_stride + at[None, :]
        before = tl.load(before_at, mask=mask, other=0.0)
        z = z.to(tl.float32) + before.to(tl.float32)
        if EXPAND:
            z = _add_delta(
                z, b, first_s, s_at, gates_ptr, present, b_at, rows, here, inside, n_experts,
                RANK, True, SKIP, EVEN, EVEN_K, ONE, BLOCK_T, BLOCK_E, BLOCK_R,
            )  # fmt: skip
        # What the next layer adds to is what is normed.
        rounded = z.to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + wide_rows[:, None] * WIDTH + at[None, :], rounded, mask=mask)
        z = tl.where(mask, rounded.to(tl.float32), 0.0)
        squares += tl.sum(z * z, 1)

    last = True
    if GROUPS > 1:
        slots = block * (GROUPS * BLOCK_T) + tl.arange(0, BLOCK_T)
        tl.store(sums_ptr + slots + group * BLOCK_T, squares, cache_modifier=".cg")
        tl.debug_barrier()
        last = tl.atomic_add(ticket_ptr + block, 1, sem="acq_rel") == GROUPS - 1
        tl.debug_barrier()
        if last:
            tl.store(ticket_ptr + block, 0)  # as the next launch expects it
            groups = tl.arange(0, BLOCK_GROUPS)
            every = sums_ptr + slots[None, :] + groups[:, None] * BLOCK_T
            sums = tl.load(every, mask=(groups < GROUPS)[:, None], other=0.0, cache_modifier=".cg")
            squares = tl.sum(sums, 0)
    else:
        tl.debug_barrier()
    if last:
        scale = tl.rsqrt(squares / WIDTH + eps)
        for start in tl.range(0, WIDTH, NORM_COLS):
            at = start + tl.arange(0, NORM_COLS)
            mask = here[:, None] & (at < WIDTH)[None, :]
            place = wide_rows[:, None] * WIDTH + at[None, :]
            if KEEP:
                value = z
            else:
                value = tl.load(z_ptr + place, mask=mask, other=0.0, cache_modifier=".cg")
                value = value.to(tl.float32)
            weight = tl.load(weight_ptr + at, mask=at < WIDTH, other=0.0).to(tl.float32)
            # Rounded before the weight, as the models do it.
            normed = (value * scale[:, None]).to(out_ptr.dtype.element_ty).to(tl.float32)
            normed = (normed * weight[None, :]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + place, normed, mask=mask)


@dataclass(frozen=True)
class NormBlocks:
    """How the work is cut.

    Attributes:
        tokens: of a program.
        columns: of a step of its loop.
        loop: steps; a program has `columns * loop` columns.
        norm_columns: of a step of the norm.
        warps: of a program.
        stages: loads in flight in the loop.
    """

    tokens: int
    columns: int
    loop: int
    norm_columns: int
    warps: int
    stages: int = 1

    @classmethod
    def choose(cls, tokens: int, width: int, expand: bool, itemsize: int) -> NormBlocks:
        """Sane cuts; docs/kernel-notes.md says what was measured."""
        whole = triton.next_power_of_2(width)
        if not expand:
            return cls(1, whole, 1, whole, 4 if whole <= 4096 else 8)
        if tokens <= MAX_GROUPED_TOKENS:
            columns = 256 if itemsize == 2 else 64
            columns = max(columns, triton.next_power_of_2(triton.cdiv(width, MAX_GROUPS)))
            return cls(16, columns, 1, min(1024, whole), 8 if itemsize == 2 else 4)
        columns = 128 if itemsize == 2 else 32
        return cls(ORDER_TILE, columns, triton.cdiv(width, columns), columns, 8)


def scratch_sizes() -> tuple[int, int, int]:
    """Bytes of s, floats of sums and tickets that a launch may need."""
    blocks = triton.cdiv(MAX_GROUPED_TOKENS, 16)
    return 0, blocks * 16 * MAX_GROUPS, blocks


def residual_norm_triton(
    both: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    scratch: Scratch,
    expand: bool,
    order: Order | None = None,
    blocks: NormBlocks | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch; see `residual_norm`.

    Args:
        expand: the deltas are still to be added.
        order: tokens side by side that share experts, for blocks of `ORDER_TILE` tokens.
        blocks: how to cut, default `NormBlocks.choose`.
    """
    tokens, width = residual.shape
    _, experts, rank = bank_b.shape
    out, z = residual.new_empty(tokens, width), residual.new_empty(tokens, width)
    cut = blocks or NormBlocks.choose(tokens, width, expand, both.element_size())
    groups = triton.cdiv(width, cut.columns * cut.loop)
    if order is not None and (not expand or cut.tokens != ORDER_TILE):
        order = None
    kept = groups == cut.loop == 1  # z stays in registers
    pdl = can_overlap(both)
    constants = expert_blocks(experts, rank, order is not None)
    if not expand:
        constants |= {"ONE": False, "BLOCK_E": 1, "BLOCK_R": 16}
    _residual_norm_kernel[(groups, triton.cdiv(tokens, cut.tokens))](
        both, both[:, width:], residual, weight, bank_b, gates,
        present if order is None else order.present, order and order.rows,
        z, out, scratch.partial, scratch.tickets,
        tokens, both.stride(0), residual.stride(0), experts, eps,
        WIDTH=width, EXPAND=expand, ORDER=order is not None, PDL=pdl,
        GROUPS=groups, BLOCK_GROUPS=triton.next_power_of_2(groups),
        LOOP=cut.loop, STAGES=cut.stages,
        BLOCK_T=cut.tokens, COLS=cut.columns,
        NORM_COLS=cut.columns if kept else cut.norm_columns,
        num_warps=cut.warps, **constants, **({"launch_pdl": True} if pdl else {}),
    )  # fmt: skip
    return out, z


def residual_norm_torch(
    both: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    expand: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference; see `residual_norm`."""
    tokens, width = residual.shape
    z = both[:, :width].float() + residual.float()
    if expand:
        _, experts, rank = bank_b.shape
        s = both[:, width:].float().view(tokens, experts, rank) * gates[:tokens, :, None]
        z += s.to(both.dtype).float().flatten(1) @ bank_b.flatten(1).float().t()
    z = z.to(residual.dtype)
    wide = z.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(z.dtype).float() * weight.float()).to(z.dtype), z


def _run(
    both, residual, weight, eps, bank_b, gates, present, low, partial, tickets, unread,
    order_rows, order_present,
):  # fmt: skip
    expand = both.shape[0] > MAX_STREAM_TOKENS
    if not both.is_cuda:
        return residual_norm_torch(both, residual, weight, eps, bank_b, gates, expand)
    order = Order(order_rows, order_present).of(both.shape[0])
    return residual_norm_triton(
        both, residual, weight, eps, bank_b, gates, present,
        Scratch(low, partial, tickets, unread), expand, order,
    )  # fmt: skip


def _fake(both, residual, *arguments):
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


# The scratch is changed and nothing of it is read by any other op: torch need not know.
_op = register_op(
    "residual_norm(Tensor both, Tensor residual, Tensor weight, float eps, Tensor bank_b, "
    "Tensor gates, Tensor present, Tensor low, Tensor partial, Tensor tickets, Tensor unread, "
    "Tensor order_rows, Tensor order_present) -> (Tensor, Tensor)",
    _run,
    _fake,
)


def residual_norm(
    both: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    scratch: Scratch,
    order: Order,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends a projection: deltas, residual, RMSNorm.

    Args:
        both: [T, H + E R], from `joint_linear`; rows contiguous.
        residual: [T, H], dtype of both; rows contiguous.
        weight: [H], factors of the norm.
        eps: its epsilon.
        bank_b: [H, E, R], dtype of both.
        gates: [N, E] float32, N >= T, LoRA's scale included.
        present: [1] int64, see `spread_routes`.
        scratch: of the device.
        order: of the step's tokens, see `order_routes`.

    Returns:
        The normed hidden states and the new residual, [T, H] each.
    """
    return _op(
        both, residual, weight, eps, bank_b, gates, present,
        scratch.low, scratch.partial, scratch.tickets, scratch.unread,
        order.rows, order.present,
    )  # fmt: skip
