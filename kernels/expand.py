"""LoRA expand of the chosen experts, added to the projection's output:

    y[t, n] + Σ_e B[n, e] s[t, p(n), e]                    p(n): the part that column n belongs to

and, for gate_up, at once the activation that follows: act(y_gate) * y_up. The second half of SGMM
(AdaFuse, arXiv 2603.11873, section 3). A program takes a tile of columns for a block of tokens and
reads B of the experts that are present; sums run over experts in rising order, whoever else is in
the batch. The additions ride on a pass over y that the activation needs anyway.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

ACTIVATIONS = ("", "silu", "gelu_tanh")
# With fewer tokens most experts are absent, and each is asked whether it is there.
_SKIP_TOKENS = 8


@triton.jit
def activate(gate, up, ACT: tl.constexpr):
    """act(gate) * up in float32: 1 is SiLU, 2 is GELU in its tanh form."""
    if ACT == 1:
        return gate / (1.0 + tl.exp(-gate)) * up
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-2.0 * z)) * up


@triton.jit
def _add_expert(
    sums, s_at, gates_ptr, b_at, rows, expert, start, here, inside, n_experts,
    RANK: tl.constexpr, RAW: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """sums + B s over a block of one expert's ranks."""
    r = start + tl.arange(0, BLOCK_R)
    at, real = expert * RANK + r, r < RANK
    s = tl.load(s_at + at[None, :], mask=here[:, None] & real[None, :], other=0.0)
    b = tl.load(b_at + at[:, None], mask=real[:, None] & inside[None, :], other=0.0)
    if RAW:
        gates_at = gates_ptr + rows * n_experts + expert
        gates = tl.load(gates_at, mask=here, other=0.0)[:, None]
        s = tl.where(gates != 0, s.to(tl.float32) * gates, 0.0).to(s.dtype)
    return tl.dot(s, b, sums, input_precision="ieee")


@triton.jit
def _delta(
    s_ptr, s_stride, gates_ptr, present_ptr, b_at, rows, here, inside, part, n_experts,
    RANK: tl.constexpr, RAW: tl.constexpr, SKIP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Σ_e B[columns, e] s[rows, part, e], [BLOCK_T, BLOCK_OUT] float32."""
    s_at = s_ptr + rows.to(tl.int64)[:, None] * s_stride + part * n_experts * RANK
    sums = tl.zeros([BLOCK_T, BLOCK_OUT], dtype=tl.float32)
    BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    if not SKIP:  # nearly every expert is there: loads are asked for ahead
        for i in tl.range(n_experts * BLOCKS, num_stages=3):
            sums = _add_expert(
                sums, s_at, gates_ptr, b_at, rows, i // BLOCKS, i % BLOCKS * BLOCK_R, here,
                inside, n_experts, RANK, RAW, BLOCK_R,
            )  # fmt: skip
    else:
        present = tl.load(present_ptr)
        for i in range(n_experts * BLOCKS):
            if (present >> (i // BLOCKS)) & 1 != 0:
                sums = _add_expert(
                    sums, s_at, gates_ptr, b_at, rows, i // BLOCKS, i % BLOCKS * BLOCK_R, here,
                    inside, n_experts, RANK, RAW, BLOCK_R,
                )  # fmt: skip
    return sums


@triton.jit(do_not_specialize=["n_tokens"])
def _expand_kernel(
    y_ptr, bias_ptr, out_ptr, s_ptr, b_ptr, gates_ptr, present_ptr,
    n_tokens, y_stride, out_stride, s_stride, n_experts,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    PART0: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr,
    RAW: tl.constexpr, SKIP: tl.constexpr, ALL: tl.constexpr,
    RANK: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    tile, size = tl.program_id(0), n_experts * RANK
    # Parts without experts have no rows of B; no tiles either, unless they must be copied.
    B1: tl.constexpr = WIDTH0 if PART0 >= 0 else 0
    B2: tl.constexpr = B1 + (WIDTH1 if PART1 >= 0 else 0)
    TILED0: tl.constexpr = WIDTH0 if (PART0 >= 0 or ALL) else 0
    TILED1: tl.constexpr = WIDTH1 if (PART1 >= 0 or ALL) else 0
    if ACT == 0:
        TILES0: tl.constexpr = (TILED0 + BLOCK_OUT - 1) // BLOCK_OUT
        TILES01: tl.constexpr = TILES0 + (TILED1 + BLOCK_OUT - 1) // BLOCK_OUT
        second, third = tile >= TILES0, tile >= TILES01
        part = tl.where(third, PART2, tl.where(second, PART1, PART0))
        width = tl.where(third, WIDTH2, tl.where(second, WIDTH1, WIDTH0))
        offset = tl.where(third, WIDTH0 + WIDTH1, tl.where(second, WIDTH0, 0))
        b_first = tl.where(third, B2, tl.where(second, B1, 0))
        tile -= tl.where(third, TILES01, tl.where(second, TILES0, 0))
    else:
        part, width, offset, b_first = PART0, WIDTH0, 0, 0
    columns = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    # A mask that ends in the middle of a tile makes loads narrow: only where it must be.
    inside = columns >= 0 if EVEN else columns < width
    b_at = b_ptr + (b_first + columns).to(tl.int64)[None, :] * size
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = rows < n_tokens
    mask = here[:, None] & inside[None, :]
    y_at = y_ptr + rows.to(tl.int64)[:, None] * y_stride + (offset + columns)[None, :]
    y = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias_at = bias_ptr + offset + columns
        y += tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    if part >= 0:
        y += _delta(
            s_ptr, s_stride, gates_ptr, present_ptr, b_at, rows, here, inside, part,
            n_experts, RANK, RAW, SKIP, BLOCK_T, BLOCK_OUT, BLOCK_R,
        )  # fmt: skip
    if ACT != 0:
        up = tl.load(y_at + WIDTH0, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            up += tl.load(bias_at + WIDTH0, mask=inside, other=0.0).to(tl.float32)[None, :]
        if PART1 >= 0:
            up += _delta(
                s_ptr, s_stride, gates_ptr, present_ptr, b_at + B1 * size, rows, here,
                inside, PART1, n_experts, RANK, RAW, SKIP, BLOCK_T, BLOCK_OUT, BLOCK_R,
            )  # fmt: skip
        y = activate(y, up, ACT)
    out_at = out_ptr + rows.to(tl.int64)[:, None] * out_stride + (offset + columns)[None, :]
    tl.store(out_at, y.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(y, bias, out, s, s_stride, bank_b, gates, present, parts, widths, act) -> None:
    tokens, (_, experts, rank) = y.shape[0], bank_b.shape
    every = out is not y
    # An activation takes gate and up in one tile.
    tiled = widths[:1] if act else [w for w, part in zip(widths, parts) if part >= 0 or every]
    block_t = min(64, max(16, triton.next_power_of_2(tokens)))
    block_out = 128 if block_t == 64 else 64
    tiles = sum(triton.cdiv(w, block_out) for w in tiled)
    widths, parts = [*widths, 0, 0][:3], [*parts, -1, -1][:3]
    _expand_kernel[(tiles, triton.cdiv(tokens, block_t))](
        y, bias, out, s, bank_b, gates, present,
        tokens, y.stride(0), out.stride(0), s_stride, experts,
        WIDTH0=widths[0], WIDTH1=widths[1], WIDTH2=widths[2],
        PART0=parts[0], PART1=parts[1], PART2=parts[2],
        HAS_BIAS=bias is not None, ACT=act,
        RAW=gates is not None, SKIP=tokens < _SKIP_TOKENS, ALL=every,
        RANK=rank, EVEN=all(w % block_out == 0 for w in tiled),
        BLOCK_T=block_t, BLOCK_OUT=block_out,
        BLOCK_R=min(64, max(16, triton.next_power_of_2(rank))),
        num_warps=8 if block_t == 64 else 4, num_stages=2,
    )  # fmt: skip


def expand_triton(
    y: torch.Tensor,
    s: torch.Tensor,
    bank_b: torch.Tensor,
    present: torch.Tensor,
    parts: Sequence[int],
    widths: Sequence[int],
) -> None:
    """Adds the deltas of T tokens to y in place, in one launch.

    Args:
        y: [T, out], the projection's own output; rows contiguous.
        s: [T, P, E * R], dtype of y, from `shrink`.
        bank_b: [sum of the adapted widths, E, R] contiguous, dtype of y.
        present: [1] int64, bit 0 for experts whose s is zero everywhere.
        parts: for each of up to three parts of y its index in s, -1 for one without experts.
        widths: columns of each part.
    """
    _launch(y, None, y, s, s.stride(0), bank_b, None, present, parts, widths, 0)


def expand_joint_triton(
    joint: torch.Tensor,
    bias: torch.Tensor | None,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    parts: Sequence[int],
    widths: Sequence[int],
    activation: str = "",
) -> torch.Tensor:
    """From the outputs of [W; A] to those of the adapted projection, in one launch.

    Args:
        joint: [T, out + P E R]: W x, then A x of all experts, not yet weighted.
        bias: [out], or None.
        bank_b, present, parts, widths: as in `expand_triton`.
        gates: [N, E] float32, N >= T.
        activation: "", or "silu" or "gelu_tanh" of gate and up: two parts of I columns.

    Returns:
        [T, out], or [T, I] after an activation.
    """
    act, out = ACTIVATIONS.index(activation), sum(widths)
    result = joint.new_empty(joint.shape[0], widths[0] if act else out)
    s = joint[:, out:]
    _launch(joint, bias, result, s, joint.stride(0), bank_b, gates, present, parts, widths, act)
    return result


def expand_torch(
    y: torch.Tensor,
    s: torch.Tensor,
    bank_b: torch.Tensor,
    parts: Sequence[int],
    widths: Sequence[int],
) -> None:
    """The reference: see `expand_triton`."""
    b, row, column = bank_b.flatten(1), 0, 0
    for part, width in zip(parts, widths):
        if part >= 0:
            y[:, column : column + width].addmm_(s[:, part], b[row : row + width].t())
            row += width
        column += width


def activate_torch(y: torch.Tensor, activation: str) -> torch.Tensor:
    """act(gate) * up of y [T, 2 I]: the reference of `activate`."""
    gate, up = y.chunk(2, -1)
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return act * up
