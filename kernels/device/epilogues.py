"""What becomes of two columns of a projection that belong together:

    gate_up   out[j] = act(y[j]) * y[I + j]                       1: SiLU, 2: GELU (tanh form)
    qkv       the rotary embedding, of halves a and b of a head   3
              out = a cos - b sin, b cos + a sin

Kernels compute both columns in one program, so that this needs no pass of its own. Heads are cut
into first and second halves as Llama's are ("neox style"); v is not turned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

EPILOGUES = ("", "silu", "gelu_tanh", "rotary")
ROTARY = EPILOGUES.index("rotary")
# Halves of a head that kernels can cut into tiles.
MIN_HALF = 16


@triton.jit
def activate(gate, up, EPILOGUE: tl.constexpr):
    """act(gate) * up in float32: 1 is SiLU, 2 is GELU in its tanh form.

    Both are gate / (1 + 2^z), here in 7 instructions: exp() and a division take 14.
    """
    if EPILOGUE == 1:
        z = gate * -1.4426950408889634  # log2(e)
    else:  # -2 sqrt(2 / pi) log2(e) (gate + 0.044715 gate^3)
        z = gate * (-2.302208198144325 - 0.10294323958002303 * gate * gate)
    root = tl.rsqrt(1.0 + tl.exp2(z))
    return gate * up * root * root


@triton.jit
def rotate(a, b, cos, sin):
    """The two halves of a head, turned."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def turns_of_heads(
    cos_sin_ptr, rows, token_mask, slice_idx, first, HALF: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Cosines and sines [rows, COLS] for tiles of columns `first` and on of a head's first half,
    and of its second; those of v turn nothing."""
    turn = cos_sin_ptr + rows[:, None] * (2 * HALF) + (first + tl.arange(0, COLS))[None, :]
    cos = tl.load(turn, mask=token_mask[:, None], other=0.0)
    sin = tl.load(turn + HALF, mask=token_mask[:, None], other=0.0)
    if slice_idx == 2:
        cos, sin = tl.full(cos.shape, 1.0, cos.dtype), tl.full(sin.shape, 0.0, sin.dtype)
    return cos, sin


def is_gate_up(epilogue: str) -> bool:
    """Whether both members of a pair end in one column."""
    return epilogue not in ("", "rotary")


def result_width(widths: Sequence[int], epilogue: str) -> int:
    """Columns that are left of slices of these widths by the epilogue."""
    return widths[0] if is_gate_up(epilogue) else sum(widths)


def result_of(
    y: torch.Tensor, widths: Sequence[int], epilogue: str, in_place: bool = False
) -> torch.Tensor:
    """Where a pass over y [T, out] leaves its result: y itself, or a new contiguous tensor where y
    has gaps or another width. in_place: gate's columns of y for gate_up, whose pairs end there."""
    width = result_width(widths, epilogue)
    if is_gate_up(epilogue):
        return y[:, :width] if in_place else y.new_empty(y.shape[0], width)
    return y if y.stride(0) == width else y.new_empty(y.shape[0], width)


def tiled_widths(widths: Sequence[int], epilogue: str) -> list[int]:
    """Columns of each slice that are cut into tiles: where they come in pairs, of one member."""
    if epilogue == "rotary":
        return [width // 2 for width in widths]
    return list(widths[:1] if epilogue else widths)


def can_rotate(head_dim: int) -> bool:
    """Whether tiles can be cut along halves of heads of this size."""
    half = head_dim // 2
    return head_dim % 2 == 0 and half >= MIN_HALF and half & (half - 1) == 0


def activate_torch(y: torch.Tensor, epilogue: str) -> torch.Tensor:
    """act(gate) * up of y [T, 2 I]: the reference of `activate`."""
    gate, up = y.chunk(2, -1)
    act = F.silu(gate) if epilogue == "silu" else F.gelu(gate, approximate="tanh")
    return act * up


def rotate_torch(y: torch.Tensor, cos_sin: torch.Tensor, rotated: int) -> torch.Tensor:
    """y [T, out] with its first `rotated` columns turned: the reference of `rotate`.

    Args:
        cos_sin: [>= T, D], cosines of a token's position, then sines; D is the size of a head.
        rotated: columns of q and k.
    """
    tokens, head_dim = y.shape[0], cos_sin.shape[1]
    cos, sin = cos_sin[:tokens, None].to(y.dtype).chunk(2, -1)
    a, b = y[:, :rotated].view(tokens, -1, head_dim).chunk(2, -1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(1)
    return torch.cat([turned, y[:, rotated:]], 1)
