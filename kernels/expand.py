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
_BLOCK_OUT = 128


@triton.jit
def activate(gate, up, ACT: tl.constexpr):
    """act(gate) * up in float32: 1 is SiLU, 2 is GELU in its tanh form."""
    if ACT == 1:
        return gate / (1.0 + tl.exp(-gate)) * up
    z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-2.0 * z)) * up


@triton.jit
def _delta(
    s_ptr, b_ptr, present_ptr, rows, here, columns, inside, part, b_first,
    n_parts, n_experts, rank,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ER: tl.constexpr,
):  # fmt: skip
    """Σ_e B[columns, e] s[rows, part, e], [BLOCK_T, BLOCK_OUT] float32."""
    size, at = n_experts * rank, tl.arange(0, BLOCK_ER)
    s_at = s_ptr + (rows.to(tl.int64) * n_parts + part)[:, None] * size
    b_at = b_ptr + (b_first + columns).to(tl.int64)[None, :] * size
    sums = tl.zeros([BLOCK_T, BLOCK_OUT], dtype=tl.float32)
    for start in range(0, size, BLOCK_ER):
        er = start + at
        used = tl.load(present_ptr + er // rank, mask=er < size, other=0) != 0
        if tl.max(used.to(tl.int32)) > 0:
            s = tl.load(s_at + er[None, :], mask=here[:, None] & used[None, :], other=0.0)
            b = tl.load(b_at + er[:, None], mask=used[:, None] & inside[None, :], other=0.0)
            sums = tl.dot(s, b, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["n_tokens"])
def _expand_kernel(
    y_ptr, out_ptr, s_ptr, b_ptr, present_ptr,
    n_tokens, y_stride, out_stride, n_parts, n_experts, rank,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, WIDTH2: tl.constexpr,
    PART0: tl.constexpr, PART1: tl.constexpr, PART2: tl.constexpr, ACT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ER: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    here = rows < n_tokens
    tile = tl.program_id(0)
    y_at = y_ptr + rows.to(tl.int64)[:, None] * y_stride
    out_at = out_ptr + rows.to(tl.int64)[:, None] * out_stride
    # Parts without experts have no tiles and no rows of B.
    B1: tl.constexpr = WIDTH0 if PART0 >= 0 else 0
    B2: tl.constexpr = B1 + (WIDTH1 if PART1 >= 0 else 0)
    if ACT == 0:
        TILES0: tl.constexpr = (B1 + BLOCK_OUT - 1) // BLOCK_OUT
        TILES01: tl.constexpr = TILES0 + (B2 - B1 + BLOCK_OUT - 1) // BLOCK_OUT
        second, third = tile >= TILES0, tile >= TILES01
        part = tl.where(third, PART2, tl.where(second, PART1, PART0))
        width = tl.where(third, WIDTH2, tl.where(second, WIDTH1, WIDTH0))
        offset = tl.where(third, WIDTH0 + WIDTH1, tl.where(second, WIDTH0, 0))
        b_first = tl.where(third, B2, tl.where(second, B1, 0))
        tile -= tl.where(third, TILES01, tl.where(second, TILES0, 0))
        columns = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        inside = columns < width
        mask = here[:, None] & inside[None, :]
        delta = _delta(
            s_ptr, b_ptr, present_ptr, rows, here, columns, inside, part, b_first,
            n_parts, n_experts, rank, BLOCK_T, BLOCK_OUT, BLOCK_ER,
        )  # fmt: skip
        at = offset + columns[None, :]
        y = tl.load(y_at + at, mask=mask, other=0.0).to(tl.float32) + delta
        tl.store(out_at + at, y.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        columns = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        inside = columns < WIDTH0
        mask = here[:, None] & inside[None, :]
        gate = tl.load(y_at + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        up = tl.load(y_at + WIDTH0 + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if PART0 >= 0:
            gate += _delta(
                s_ptr, b_ptr, present_ptr, rows, here, columns, inside, PART0, 0,
                n_parts, n_experts, rank, BLOCK_T, BLOCK_OUT, BLOCK_ER,
            )  # fmt: skip
        if PART1 >= 0:
            up += _delta(
                s_ptr, b_ptr, present_ptr, rows, here, columns, inside, PART1, B1,
                n_parts, n_experts, rank, BLOCK_T, BLOCK_OUT, BLOCK_ER,
            )  # fmt: skip
        out = activate(gate, up, ACT).to(out_ptr.dtype.element_ty)
        tl.store(out_at + columns[None, :], out, mask=mask)


def _launch(y, out, s, bank_b, present, parts, widths, act) -> None:
    tokens, n_parts, size = s.shape
    experts = bank_b.shape[1]
    # An activation takes gate and up in one tile.
    tiled = widths[:1] if act else [w for w, part in zip(widths, parts) if part >= 0]
    tiles = sum(triton.cdiv(w, _BLOCK_OUT) for w in tiled)
    widths, parts = [*widths, 0, 0][:3], [*parts, -1, -1][:3]
    block_t = min(64, max(16, triton.next_power_of_2(tokens)))
    _expand_kernel[(tiles, triton.cdiv(tokens, block_t))](
        y, out, s, bank_b, present,
        tokens, y.stride(0), out.stride(0), n_parts, experts, size // experts,
        WIDTH0=widths[0], WIDTH1=widths[1], WIDTH2=widths[2],
        PART0=parts[0], PART1=parts[1], PART2=parts[2], ACT=act,
        BLOCK_T=block_t, BLOCK_OUT=_BLOCK_OUT,
        BLOCK_ER=min(128, max(16, triton.next_power_of_2(size))),
        num_warps=4, num_stages=2,
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
        present: [E] int32, 0 for experts whose s is zero everywhere.
        parts: for each of up to three parts of y its index in s, -1 for one without experts.
        widths: columns of each part.
    """
    _launch(y, y, s, bank_b, present, parts, widths, 0)


def expand_act_triton(
    y: torch.Tensor,
    s: torch.Tensor,
    bank_b: torch.Tensor,
    present: torch.Tensor,
    parts: Sequence[int],
    widths: Sequence[int],
    activation: str,
) -> torch.Tensor:
    """act(gate + delta) * (up + delta), in one launch.

    Args:
        y: [T, 2 I], gate and up side by side: two parts of I columns.
        s, bank_b, present, parts, widths: as in `expand_triton`.
        activation: "silu" or "gelu_tanh".

    Returns:
        [T, I], dtype of y.
    """
    out = y.new_empty(y.shape[0], widths[0])
    _launch(y, out, s, bank_b, present, parts, widths, ACTIVATIONS.index(activation))
    return out


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
