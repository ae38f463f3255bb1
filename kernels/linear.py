"""An adapted projection whose own weight is not quantised, with what follows it:

    y = x Wᵀ + bias + Σ_e gates[:, e] B[e] A[e] x          (SGMM, see sgmm.py)
    out = y, act(y_gate) * y_up for gate_up, or y with q and k turned for qkv (see pairs.py)

W and A stand in one tensor, [W; A]. Few tokens take one launch that streams it (stream_linear.py),
some dozens one that tiles it where the product is large (tile_linear.py). Otherwise one product of
the vendor's gives W x and A x together, and one pass adds the expand (expand.py, wide_expand.py)
and goes on to the activation. Which, says `dispatch.plan`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from vllm_adafuse.kernels import stream_linear, tile_linear
from vllm_adafuse.kernels.dense_expand import dense_expand_triton
from vllm_adafuse.kernels.dispatch import plan
from vllm_adafuse.kernels.expand import expand_raw_triton, expand_torch
from vllm_adafuse.kernels.paged_cache import claim_pages, paged_cache_torch
from vllm_adafuse.kernels.pairs import (
    activate_torch,
    is_gate_up,
    result_width,
    rotate_torch,
)
from vllm_adafuse.kernels.plans import TMA_EXPAND, Device, Plan, Shape
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.scratch import Scratch
from vllm_adafuse.kernels.shrink import shrink_torch
from vllm_adafuse.kernels.stream_linear import stream_linear_triton
from vllm_adafuse.kernels.tile_linear import tile_linear_triton
from vllm_adafuse.kernels.wide_expand import wide_expand_triton


def scratch_sizes(bank_a: torch.Tensor, rows: int) -> tuple[int, int, int]:
    """Bytes of s, floats of partial sums and tickets that a projection of `rows` rows may need."""
    needs = stream_linear.scratch_sizes(bank_a, rows), tile_linear.scratch_sizes(bank_a)
    low, floats, tickets = map(max, *needs)
    return low, floats, tickets


def linear_torch(
    x, joint, bias, bank_b, gates, parts, widths, activation, cos_sin=None, pages=None
):
    """The reference; see `linear`."""
    out = sum(widths)
    y = F.linear(x, joint[:out], bias)
    expand_torch(y, shrink_torch(x, bank_a_of(joint, bank_b, out), gates), bank_b, parts, widths)
    if activation == "rotary":
        y = rotate_torch(y, cos_sin, widths[0] + widths[1])
        if pages:
            paged_cache_torch(y, pages, widths)
        return y
    return activate_torch(y, activation) if activation else y


def bank_a_of(joint: torch.Tensor, bank_b: torch.Tensor, out: int) -> torch.Tensor:
    """The view [P, E, R, in] of a joint tensor's last rows."""
    return joint[out:].view(-1, *bank_b.shape[1:], joint.shape[1])


@functools.cache
def shape_of(
    size_in: int, experts: int, rank: int, itemsize: int, parts: tuple[int, ...],
    widths: tuple[int, ...], epilogue: str, head_dim: int, has_bias: bool,
) -> Shape:  # fmt: skip
    """The shape of a step's projection, the same one for the same numbers."""
    return Shape(
        size_in, widths, parts, experts, rank, itemsize, epilogue,
        head_dim if epilogue == "rotary" else 0, has_bias,
    )  # fmt: skip


def stays_in_place(
    joint: torch.Tensor,
    bias: torch.Tensor | None,
    widths: Sequence[int],
    activation: str,
    in_place: bool,
) -> bool:
    """Whether the result has the rows of the product [T, out + P E R], gaps and all: what follows
    gate_up then takes no tensor of its own, which would be a quarter of a long step's memory.

    By shapes alone: a compiled model holds steps of all lengths to one layout. Not with a bias, for
    then long products are of W alone; in multiples of 16, for which the next kernel is compiled.
    """
    whole = joint.shape[0] % 16 == 0 and widths[0] % 16 == 0
    return in_place and is_gate_up(activation) and bias is None and whole


def _new_result(x, joint, widths, activation, in_place) -> torch.Tensor:
    width = result_width(widths, activation)
    return x.new_empty_strided((x.shape[0], width), (joint.shape[0] if in_place else width, 1))


def run(
    x, joint, bias, bank_b, gates, present, counters, index, low, partial, tickets, unread,
    cos_sin, parts, widths, activation, cache, in_place,
):  # fmt: skip
    """What the op does, for ops that do it at times."""
    pages = claim_pages(cache, x)
    in_place = stays_in_place(joint, bias, widths, activation, in_place)
    if not x.is_cuda:
        y = linear_torch(x, joint, bias, bank_b, gates, parts, widths, activation, cos_sin, pages)
        return _new_result(x, joint, widths, activation, True).copy_(y) if in_place else y
    shape = shape_of(
        x.shape[1], *bank_b.shape[1:], x.element_size(), tuple(parts), tuple(widths), activation,
        0 if cos_sin is None else cos_sin.shape[1], bias is not None,
    )  # fmt: skip
    way = plan(shape, x.shape[0], Device.of(x.device))
    return linear_triton(
        x, joint, bias, bank_b, gates, present, counters[index] if way.config else None,
        Scratch(low, partial, tickets, unread), parts, widths, activation, cos_sin, way, pages,
        in_place,
    )  # fmt: skip


def linear_triton(
    x, joint, bias, bank_b, gates, present, counter, scratch, parts, widths, activation,
    cos_sin, way, pages=None, in_place=False,
):  # fmt: skip
    """`linear` on a GPU, by a `Plan`. in_place: `stays_in_place`."""
    if way.config:
        out = _new_result(x, joint, widths, activation, in_place)
        return one_launch(
            x, joint, bias, bank_b, gates, present, counter, scratch, parts, widths, activation,
            way.config, out, cos_sin, pages,
        )  # fmt: skip
    y, s, bias = joint_product(x, joint, bias, sum(widths), way.one_gemm)
    return expand_long(
        y, s, bias, bank_b, gates, present, parts, widths, activation, way,
        cos_sin=cos_sin, pages=pages, in_place=in_place,
    )  # fmt: skip


def expand_long(
    y: torch.Tensor,
    s: torch.Tensor,
    bias: torch.Tensor | None,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    parts: Sequence[int],
    widths: Sequence[int],
    activation: str,
    way: Plan,
    **behind: Any,
) -> torch.Tensor:
    """From W x and A x to the projection, by a `Plan`. y and s may be overwritten."""
    if way.expand == TMA_EXPAND:
        if way.dense_from is not None:
            dense_expand_triton(y, s, bank_b, gates, parts, widths, way.dense_from)
        return wide_expand_triton(y, s, bank_b, gates, widths, activation, **behind)
    return expand_raw_triton(
        y, s, bias, bank_b, gates, present, parts, widths, activation, **behind
    )


def one_launch(
    x, joint, bias, bank_b, gates, present, counter, scratch, parts, widths, activation, cut,
    out=None, cos_sin=None, pages=None,
):  # fmt: skip
    """The projection of few tokens by the kernel that a cut is for; see both."""
    shared = counter, scratch, parts, widths, activation, cut, out, cos_sin, pages
    if cut.tma:
        return tile_linear_triton(x, joint, bias, bank_b, gates, *shared)
    rows = sum(widths)
    bank_a = bank_a_of(joint, bank_b, rows)
    return stream_linear_triton(
        x, joint[:rows], bias, bank_a, bank_b, gates, present, *shared
    )  # fmt: skip


def sliced_product(
    x: torch.Tensor, joint: torch.Tensor, out: int, split: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices of W x and A x, [split, T, …] each, by one product of the vendor's for all slices of
    `in`: programs enough where one for the whole would have few. Slices are rounded as the whole
    would be, which costs the sum no more than that.
    """
    of_x = x.view(x.shape[0], split, -1).transpose(0, 1)
    of_rows = joint.view(joint.shape[0], split, -1).permute(1, 2, 0)
    y, s = torch.split_with_sizes(torch.bmm(of_x, of_rows), (out, joint.shape[0] - out), 2)
    return y, s


def joint_product(
    x: torch.Tensor, joint: torch.Tensor, bias: torch.Tensor | None, out: int, one_gemm: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """W x and A x by cuBLAS, and the bias if it is still to be added.

    One product of both: a few rows more cost nearly nothing at any number of tokens, a second
    launch 6 to 30 us (H200, shapes of Llama-2-7B; docs/kernel-notes.md).
    """
    if one_gemm:
        both = F.linear(x, joint)
        y, s = torch.split_with_sizes(both, (out, joint.shape[0] - out), 1)  # cheaper than slices
        return y, s, bias
    return F.linear(x, joint[:out], bias), F.linear(x, joint[out:]), None


def _fake(x, joint, bias, bank_b, *arguments):
    *_, widths, activation, _, in_place = arguments
    in_place = stays_in_place(joint, bias, widths, activation, in_place)
    return _new_result(x, joint, widths, activation, in_place)


# The scratch is changed and nothing of it is read by any other op: torch need not know.
_op = register_op(
    "linear(Tensor x, Tensor joint, Tensor? bias, Tensor bank_b, Tensor gates, "
    "Tensor present, Tensor counters, int index, Tensor low, Tensor partial, Tensor tickets, "
    "Tensor unread, Tensor? cos_sin, int[] parts, "
    "int[] widths, str activation, str cache, bool in_place) -> Tensor",
    run,
    _fake,
)


def linear(
    x: torch.Tensor,
    joint: torch.Tensor,
    bias: torch.Tensor | None,
    bank_b: torch.Tensor,
    gates: torch.Tensor,
    present: torch.Tensor,
    counters: torch.Tensor,
    index: int,
    scratch: Scratch,
    parts: Sequence[int],
    widths: Sequence[int],
    activation: str = "",
    cos_sin: torch.Tensor | None = None,
    cache: str = "",
    in_place: bool = False,
) -> torch.Tensor:
    """An adapted projection of T tokens.

    Args:
        x: [T, in]; rows contiguous.
        joint: [out + P E R, in] contiguous, dtype of x: W, then A [P, E, R, in].
        bias: [out] or None.
        bank_b: [sum of the adapted widths, E, R], dtype of x.
        gates: [N, E] float32, N >= T, LoRA's scale included; rows past T are not read.
        present: [2 + E] int64, see `spread_routes`, which also zeroes the next.
        counters: [C, 4] int32, a row for each projection.
        index: of this projection's row.
        scratch: of the device.
        parts: for each of up to three parts of the output its index in the banks, -1 for none.
        widths: columns of each part.
        activation: "", or "silu" or "gelu_tanh" of gate_up, whose two parts are equally wide, or
            "rotary" of q, k, v.
        cos_sin: [N, D] with "rotary", dtype of x: cosines of each token's position, then sines, D
            the size of a head, for which `can_rotate` holds; rows past T are not read.
        cache: with "rotary", the source of pages (paged_cache.py) that is asked where k and v go,
            if there is one of this name.
        in_place: the reader of silu's or gelu_tanh's result minds no gaps between rows.

    Returns:
        [T, out], or [T, out / 2] after silu or gelu_tanh; contiguous, but for rows as far apart as
        those of the product where `stays_in_place` holds. Columns of k and v that went to pages
        may hold anything.
    """
    return _op(
        x, joint, bias, bank_b, gates, present, counters, index,
        scratch.low, scratch.partial, scratch.tickets, scratch.unread,
        cos_sin, parts, widths, activation, cache, in_place,
    )  # fmt: skip
