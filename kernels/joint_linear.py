"""A projection and its experts' shrinks, for `residual_norm` to end:

    both[t] = [W; A] x[t]                                   y, then s = A x of all experts

With few tokens y holds the deltas already (`stream_linear`, one launch) and s is left as it is.
Some more take one product of the vendor's. In long batches, which are bound by arithmetic, a few
rows more would cost it a wave of programs: A has a product of its own.
"""

from __future__ import annotations

import torch
from vllm_adafuse.kernels.linear import MAX_JOINT_TOKENS, bank_a_of, linear_torch
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.scratch import Scratch
from vllm_adafuse.kernels.stream_linear import MAX_STREAM_TOKENS, stream_linear_triton


def joint_linear_torch(x, joint, bank_b, gates) -> torch.Tensor:
    """The reference; see `joint_linear`."""
    both = x @ joint.t()
    if x.shape[0] <= MAX_STREAM_TOKENS:
        out = bank_b.shape[0]
        both[:, :out] = linear_torch(x, joint, None, bank_b, gates, [0], [out], "")
    return both


def _run(x, joint, bank_b, gates, present, counters, index, low, partial, tickets, unread):
    if not x.is_cuda:
        return joint_linear_torch(x, joint, bank_b, gates)
    tokens, out = x.shape[0], bank_b.shape[0]
    both = x.new_empty(tokens, joint.shape[0])
    if tokens <= MAX_STREAM_TOKENS:
        stream_linear_triton(
            x, joint[:out], None, bank_a_of(joint, bank_b, out), bank_b, gates, present,
            counters[index], Scratch(low, partial, tickets, unread), [0], [out],
            out=both[:, :out],
        )  # fmt: skip
    elif tokens <= MAX_JOINT_TOKENS:
        torch.mm(x, joint.t(), out=both)
    else:
        torch.mm(x, joint[:out].t(), out=both[:, :out])
        torch.mm(x, joint[out:].t(), out=both[:, out:])
    return both


def _fake(x, joint, *arguments):
    return x.new_empty(x.shape[0], joint.shape[0])


# The scratch is changed and nothing of it is read by any other op: torch need not know.
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
