"""A projection and its experts' shrinks, for `residual_norm` to end:

    both[t] = [W; A] x[t]                                   y, then s = A x of all experts

With few tokens one launch streams or tiles W, adds the deltas, and leaves float32 sums of slices of
`in` in the scratch: the norm behind adds them up, so that a product with few rows gets programs
enough and nobody waits for the last of them. Then `both` is not written. Some more tokens take one
product of the vendor's. In long batches, which are bound by arithmetic, a few rows more would cost
it a wave of programs: A has a product of its own.
"""

from __future__ import annotations

import torch
from vllm_adafuse.kernels import linear, stream_linear, tile_linear
from vllm_adafuse.kernels.blocks import on_hopper
from vllm_adafuse.kernels.linear import MAX_JOINT_TOKENS, bank_a_of, linear_torch
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.scratch import Scratch
from vllm_adafuse.kernels.stream_linear import MAX_STREAM_TOKENS, stream_linear_triton
from vllm_adafuse.kernels.tile_linear import MAX_TILE_TOKENS, tile_linear_triton
from vllm_adafuse.kernels.tiles import MAX_SPLIT, Tiles, find_tiles

# Up to so many tokens W is streamed where it could be tiled as well.
_STREAM_TOKENS = 16


def sliced_cut(x: torch.Tensor, size_in: int, width: int) -> Tiles | None:
    """How steps of few tokens are cut; None where `both` is written.

    Args:
        x: [T, …] of the step.
        size_in, width: of the projection.
    """
    tokens, itemsize = x.shape[0], x.element_size()
    if tokens > (MAX_TILE_TOKENS if x.is_cuda else MAX_STREAM_TOKENS):
        return None
    if _tiles(x, size_in):
        return tile_linear.choose_sliced(tokens, size_in, width, itemsize)
    if tokens > MAX_STREAM_TOKENS:
        return None
    return find_tiles(tokens, size_in, width, "", itemsize, x.device)


def _tiles(x: torch.Tensor, size_in: int) -> bool:
    even = size_in * x.element_size() % 16 == 0
    return _STREAM_TOKENS < x.shape[0] <= MAX_TILE_TOKENS and even and on_hopper(x)


def scratch_sizes(bank_a: torch.Tensor, rows: int) -> tuple[int, int, int]:
    """Bytes of s, floats of partial sums and tickets that a projection of `rows` rows may need."""
    low, floats, tickets = linear.scratch_sizes(bank_a, rows)
    return low, floats + MAX_SPLIT * MAX_TILE_TOKENS * rows, tickets


def joint_linear_torch(x, joint, bank_b, gates) -> torch.Tensor:
    """The reference; see `joint_linear`. With few tokens `both` holds the deltas."""
    both = x @ joint.t()
    if x.shape[0] <= MAX_STREAM_TOKENS:
        out = bank_b.shape[0]
        both[:, :out] = linear_torch(x, joint, None, bank_b, gates, [0], [out], "")
    return both


def leave_slices(
    x: torch.Tensor,
    joint: torch.Tensor,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    counter: torch.Tensor,
    scratch: Scratch,
    cut: Tiles,
) -> torch.Tensor:
    """The launch for few tokens: [split, T, out] float32 in the scratch, whose sum is y."""
    out = bank_b.shape[0]
    slices = scratch.slices(cut.split, x.shape[0], out)
    if _tiles(x, x.shape[1]):
        return tile_linear_triton(
            x, joint, None, bank_b, gates, present, counter, scratch, [0], [out],
            tiles=cut, out=slices,
        )  # fmt: skip
    return stream_linear_triton(
        x, joint[:out], None, bank_a_of(joint, bank_b, out), bank_b, gates, present,
        counter, scratch, [0], [out], tiles=cut, out=slices,
    )  # fmt: skip


def _run(x, joint, bank_b, gates, present, counters, index, low, partial, tickets, unread):
    if not x.is_cuda:
        return joint_linear_torch(x, joint, bank_b, gates)
    tokens, out = x.shape[0], bank_b.shape[0]
    both = x.new_empty(tokens, joint.shape[0])
    if cut := sliced_cut(x, x.shape[1], out):
        scratch = Scratch(low, partial, tickets, unread)
        leave_slices(x, joint, bank_b, gates, present, counters[index], scratch, cut)
    elif tokens <= MAX_JOINT_TOKENS:
        torch.mm(x, joint.t(), out=both)
    else:
        torch.mm(x, joint[:out].t(), out=both[:, :out])
        torch.mm(x, joint[out:].t(), out=both[:, out:])
    return both


def _fake(x, joint, *arguments):
    return x.new_empty(x.shape[0], joint.shape[0])


# The scratch is changed, and read by the `residual_norm` that takes `both`, which nothing that
# writes there can overtake: torch need not know.
_op = register_op(
    "joint_linear(Tensor x, Tensor joint, Tensor bank_b, Tensor gates, Tensor present, "
    "Tensor counters, int index, Tensor low, Tensor partial, Tensor tickets, Tensor unread) "
    "-> Tensor",
    _run,
    _fake,
)


def joint_linear(
    x: torch.Tensor,
    joint: torch.Tensor,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    counters: torch.Tensor,
    index: int,
    scratch: Scratch,
) -> torch.Tensor:
    """The first half of an adapted projection of one part and no bias.

    Args:
        x: [T, in]; rows contiguous.
        joint: [out + E R, in] contiguous, dtype of x: W, then A [1, E, R, in].
        bank_b: [out, E, R], dtype of x.
        gates, present, counters, index, scratch: as in `vllm_adafuse.kernels.linear.linear`.

    Returns:
        [T, out + E R].
    """
    return _op(
        x, joint, bank_b, gates, present, counters, index,
        scratch.low, scratch.partial, scratch.tickets, scratch.unread,
    )  # fmt: skip
