"""The router that sees a request's past: which k of E experts a token uses, after all before it.

    w_t = (W u_t + b) / temperature          c_t = scale * C u_t / temperature
    z_t = w_t + 1 / (t + 1) Σ_{s <= t} c_s                         t counts from the request's start
    z_t = w_t + Σ_{s <= t} l^(t - s) c_s / Σ_{s <= t} l^(t - s)    of a memory that fades, 0 < l < 1
    T, g                                     of z_t as in `gate`

w and c follow from the token's id: rows of tables, float32. Sums are float64, so that after any
number of tokens z is as good as its terms. What a request's tokens of earlier steps add up to lies
in a row of `sums`, which each step reads and writes: a request is one program's, all of its tokens.
The row is a ring of the sums over its first n tokens for the last R such n: where drafts of a step
are rejected, the next one starts before that step's end, and finds its sum there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.gate import Gate, choose, normed
from vllm_adafuse.kernels.launch import launch
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.whole import power_of_2

# Rows of `contexts`; FADING's double takes two; from CONTEXT_COLUMNS on the C columns of a slot, then
# LoRA's scales as bits.
EXPERTS, CHOSEN, SOFTMAX_FIRST, FADING = range(4)
CONTEXT_COLUMNS = 5
# The least log l: powers over half of a LONG_BLOCK stay finite. One token on 2e-9 is left.
LEAST_FADING = -20.0
# Rows of `requests`.
SUM_ROW, START, OFFSET = range(3)
# Numbers that a program holds of each kind: tokens at once times columns.
HELD = 2048
SHORT_STEP, SHORT_BLOCK, LONG_BLOCK = 512, 16, 64


class ContextRoutes(NamedTuple):
    """What `context_routes` writes.

    Attributes:
        rows: [N] int32: of tokens whose slot has a context FIRST + their place in the step, of the
            others their id, clamped into the vocabulary.
        ids, weights: [K, N] int32 and float32 of any strides: the k experts of a token by falling
            logit, their weights with LoRA's scale; weights 0 past the last request. Columns of
            other tokens are left alone.
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


@triton.jit
def _expm1(x):
    """e^x - 1 of x <= 0, to the last digits: what rounding does to the power cancels."""
    power = tl.exp(x)
    near = (power < 1) & (x > -1)
    exact = (power - 1) * x / tl.log(tl.where(near, power, 0.5))
    return tl.where(near, exact, tl.where(x > -1, x, power - 1))


@triton.jit(do_not_specialize=["n_tokens"])
def _context_routes_kernel(
    token_ptr, slots_ptr, contexts_ptr, w_ptr, c_ptr, sums_ptr, requests_ptr,
    rows_ptr, ids_ptr, weights_ptr, n_tokens, vocab_size, first, n_slots, n_columns, n_offsets,
    w_stride, c_stride, out_k, stride_k, stride_t,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    offsets_ptr = requests_ptr + 2 * n_offsets
    begin = tl.load(offsets_ptr + request)
    end = tl.minimum(tl.load(offsets_ptr + request + 1), n_tokens)
    slot = tl.load(slots_ptr + tl.minimum(begin, n_tokens - 1))
    known = (slot >= 0) & (begin < end)
    slot = tl.maximum(slot, 0)
    experts = tl.where(known, tl.load(contexts_ptr + slot), 0)
    top_k = tl.where(known, tl.load(contexts_ptr + n_slots + slot), 0)
    softmax_first = tl.load(contexts_ptr + 2 * n_slots + slot)
    e = tl.arange(0, BLOCK_E)
    inside = e < experts
    low = tl.load(contexts_ptr + 3 * n_slots + slot).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(contexts_ptr + 4 * n_slots + slot).to(tl.int64) << 32
    fading = (high | low).to(tl.float64, bitcast=True)
    own = contexts_ptr + (5 + e) * n_slots + slot
    column = tl.load(own, mask=inside, other=0).to(tl.int64)
    scale = tl.load(own + n_columns * n_slots, mask=inside, other=0).to(tl.float32, bitcast=True)
    start = tl.load(requests_ptr + n_offsets + request)
    sum_at = sums_ptr + tl.load(requests_ptr + request).to(tl.int64) * RING * n_columns + e
    summed = e < tl.where(start > 0, experts, 0)
    past = tl.load(sum_at + start % RING * n_columns, mask=summed, other=0.0)
    if RING > 1:
        tl.debug_barrier()  # the past of other threads, before it is written over
    # Of tokens s <= t in a block: l^(t - s) = rising_s / rising_t, counted from its middle. Sums of
    # rising terms have none that outweighs the last; in a mean rising_t falls out.
    turn = tl.arange(0, BLOCK_T)
    rising = tl.exp(fading * (BLOCK_T // 2 - turn))
    risen = tl.cumsum(rising, 0)
    before = tl.exp(fading * (BLOCK_T // 2 + 1))
    for at in range(begin, end, BLOCK_T):
        row = at + turn
        here = row < end
        token = tl.load(token_ptr + row, mask=here, other=0).to(tl.int64)
        token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
        found = tl.where(experts > 0, first + row, token.to(tl.int32))
        tl.store(rows_ptr + row, found, mask=here)
        mask = here[:, None] & inside[None, :]
        c = tl.load(c_ptr + column[None, :] * c_stride + token[:, None], mask=mask, other=0.0)
        w = tl.load(w_ptr + column[None, :] * w_stride + token[:, None], mask=mask, other=0.0)
        c = c.to(tl.float64) * rising[:, None]
        told = (start + at - begin).to(tl.float64)
        faded = _expm1(fading * told) / _expm1(tl.minimum(fading, -1e-300))
        count = tl.where(fading < 0, faded, told) * before + risen
        sums = (past * before)[None, :] + tl.cumsum(c, 0)
        z = w.to(tl.float64) + sums / count[:, None]
        if RING > 1:
            to = (start + row - begin + 1) % RING
            last = mask & (row >= end - RING)[:, None]
            sums = sums / rising[:, None]
            tl.store(sum_at[None, :] + to[:, None] * n_columns, sums, mask=last)
        turns = tl.minimum(end - at, BLOCK_T)
        said = tl.sum(c, 0) * tl.exp(fading * (turns - 1 - BLOCK_T // 2))
        past = past * tl.exp(fading * turns) + said
        z = tl.where(inside[None, :], z.to(tl.float32), float("-inf"))
        best = tl.max(z, 1)
        powers = tl.where(inside[None, :], tl.exp(z - best[:, None]), 0.0)
        total = tl.zeros([BLOCK_T], dtype=tl.float32)
        left = z
        for _ in range(top_k):
            chosen = e[None, :] == tl.argmax(left, 1)[:, None]
            total += tl.sum(tl.where(chosen, powers, 0.0), 1)
            left = tl.where(chosen, float("-inf"), left)
        total = tl.where(softmax_first != 0, tl.sum(powers, 1), total)
        left = z
        for j in range(top_k):
            expert = tl.argmax(left, 1)
            chosen = e[None, :] == expert[:, None]
            weight = tl.sum(tl.where(chosen, powers * scale[None, :], 0.0), 1) / total
            out = j * stride_k + row.to(tl.int64) * stride_t
            tl.store(ids_ptr + out, expert.to(tl.int32), mask=here)
            tl.store(weights_ptr + out, weight, mask=here)
            left = tl.where(chosen, float("-inf"), left)
    if RING == 1:
        tl.store(sum_at, past, mask=inside)
    if request == 0:
        for at in range(tl.load(offsets_ptr + n_offsets - 1), n_tokens, BLOCK_T):
            row = at + tl.arange(0, BLOCK_T)
            here = row < n_tokens
            token = tl.load(token_ptr + row, mask=here, other=0).to(tl.int64)
            token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
            tl.store(rows_ptr + row, token.to(tl.int32), mask=here)
            for j in range(out_k):
                out = weights_ptr + j * stride_k + row.to(tl.int64) * stride_t
                tl.store(out, tl.zeros([BLOCK_T], dtype=tl.float32), mask=here)


def context_routes_triton(token_ids, slots, contexts, tables, sums, requests, out) -> None:
    """One launch; see `context_routes`."""
    (w, c), (rows, ids, weights) = tables, out
    tokens, (_, ring, columns) = token_ids.shape[0], sums.shape
    block_e = max(2, power_of_2(columns))
    longest = SHORT_BLOCK if tokens <= SHORT_STEP else LONG_BLOCK
    launch(
        _context_routes_kernel, (max(1, min(tokens, requests.shape[1] - 1)),),
        token_ids, slots, contexts, w, c, sums, requests, rows, ids, weights,
        tokens, w.shape[1], w.shape[1], contexts.shape[1], columns, requests.shape[1],
        w.stride(0), c.stride(0), ids.shape[0], ids.stride(0), ids.stride(1),
        BLOCK_T=max(2, min(longest, HELD // block_e)), BLOCK_E=block_e, RING=ring,
    )  # fmt: skip


def fading_of(half_life: float | None) -> float:
    """log l of a memory where what was said counts half after so many tokens; None: 0, it is kept."""
    return 0.0 if half_life is None else max(-math.log(2) / half_life, LEAST_FADING)


def faded_sums(c: torch.Tensor, fading: float) -> torch.Tensor:
    """Σ_{s <= t} l^(t - s) c_s of each t: [T, E] float64 of c [T, E], any float dtype."""
    sums, step = c.double(), 1
    if fading == 0:
        return sums.cumsum(0)
    while step < len(sums):  # so many terms are in each sum
        sums = torch.cat([sums[:step], sums[step:] + math.exp(fading * step) * sums[:-step]])
        step *= 2
    return sums


def faded_counts(counts: torch.Tensor, fading: float) -> torch.Tensor:
    """Σ_{s < n} l^s of each n of `counts`, in float64; of a memory that is kept n as it is."""
    if fading == 0:
        return counts
    return torch.expm1(fading * counts.double()) / math.expm1(fading)


def context_routes_torch(token_ids, slots, contexts, tables, sums, requests, out) -> None:
    """The reference; see `context_routes`."""
    (w, c), (rows, ids, weights) = tables, out
    tokens, vocab_size, columns = token_ids.shape[0], w.shape[1], sums.shape[2]
    token = token_ids.long().clamp(0, vocab_size - 1)
    rows[:tokens] = token
    offsets = requests[OFFSET].tolist()
    for request, (begin, end) in enumerate(zip(offsets, offsets[1:])):
        end = min(end, tokens)
        slot = int(slots[begin]) if begin < end else -1
        experts = int(contexts[EXPERTS, slot]) if slot >= 0 else 0
        if experts <= 0:
            continue
        own = contexts[:, slot]
        column = own[CONTEXT_COLUMNS : CONTEXT_COLUMNS + experts].long()
        scales = own[CONTEXT_COLUMNS + columns :][:experts].contiguous().view(torch.float32)
        own_w, own_c = (t[column][:, token[begin:end]].double().t() for t in (w, c))
        row, start = int(requests[SUM_ROW, request]), int(requests[START, request])
        ring, steps = sums[row, :, :experts], torch.arange(1, end - begin + 1, device=c.device)
        past = ring[start % len(ring)] if start > 0 else torch.zeros_like(ring[0])
        fading = float(own[FADING:CONTEXT_COLUMNS].clone().view(torch.float64))
        kept = torch.exp(fading * steps.double())[:, None]
        added = past * kept + faded_sums(own_c, fading)
        counts = faded_counts(start + steps, fading)[:, None]
        top_k, softmax_first = int(own[CHOSEN]), bool(own[SOFTMAX_FIRST])
        found = choose((own_w + added / counts).float(), scales, top_k, softmax_first)
        ids[:top_k, begin:end], weights[:top_k, begin:end] = (t.t() for t in found)
        last = min(len(ring), end - begin)
        ring[(start + steps[-last:]) % len(ring)] = added[-last:]
        rows[begin:end] = vocab_size + torch.arange(begin, end, device=rows.device)
    weights[:, offsets[-1] : tokens] = 0


def _run(token_ids, *arguments) -> None:
    slots, contexts, w, c, sums, requests, *out = arguments
    run = context_routes_triton if token_ids.is_cuda else context_routes_torch
    run(token_ids, slots, contexts, (w, c), sums, requests, ContextRoutes(*out))


def _fake(*arguments) -> None:
    return None


_op = register_op(
    "context_routes(Tensor token_ids, Tensor slots, Tensor contexts, Tensor w, Tensor c, "
    "Tensor(a!) sums, Tensor requests, Tensor(b!) rows, Tensor(c!) ids, Tensor(d!) weights) -> ()",
    _run,
    _fake,
)


def context_routes(
    token_ids: torch.Tensor,
    slots: torch.Tensor,
    contexts: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    sums: torch.Tensor,
    requests: torch.Tensor,
    out: ContextRoutes,
) -> None:
    """Routes the T tokens of a step whose adapters see the past, and moves their sums on.

    Args:
        token_ids: [T] int32 or int64; ids outside the vocabulary are clamped into it.
        slots: [N] int32, N >= T: of each token the slot of its adapter, below 0 for none; the same
            for all tokens of a request.
        contexts: [5 + 2 C, P] int32: of each slot the number of its experts (0: it sees no past),
            k, whether the softmax is over all of them; the two halves of log l as float64, the
            lower first (see `fading_of`); the rows that they have in the tables; the bits of
            their float32 LoRA scales.
        tables: w and c [D, V] float32, an expert a row; rows contiguous. Of embeddings, which have no
            ids, V is N, the terms of the step's own tokens, and ids are their places in the step.
        sums: [S, R, C] float64, of each request its experts' c added up over its first n tokens, as
            they have faded by the last of them, at n % R; of the last R such n after a step, as far
            as they were computed or seeded.
        requests: [3, R + 1] int32: of each request of the step its row of `sums`, how many of its
            tokens came before (0: its row is not read), and where its tokens begin; from the last
            one on all offsets are the number of tokens that are requests'.
        out: what is written. FIRST is V.
    """
    _op(token_ids, slots, contexts, *tables, sums, requests, *out)


def context_rows(
    hidden: torch.Tensor, router: Gate, context_weight: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of both tables.

    Args:
        hidden: [T, H], any float dtype: embeddings as they enter the first layer.
        router: W, b, the norm and the temperature.
        context_weight: [E, H] float32, C.
        scale: of the formula.

    Returns:
        w and c [T, E] float32, each rounded once from float64.
    """
    u = normed(hidden, router.norm_weight, router.norm_eps).double()
    w, c = u @ router.weight.double().t(), u @ context_weight.double().t()
    if router.bias is not None:
        w = w + router.bias
    return (w / router.temperature).float(), (c * (scale / router.temperature)).float()


def choose_by_past(
    w: torch.Tensor, c: torch.Tensor, scales: torch.Tensor, top_k: int, softmax_first: bool,
    fading: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routes a request from its first token on.

    Args:
        w, c: [T, E] float32, rows of its tokens.
        scales: [E] float32, multiplied into the weights.
        top_k: k.
        softmax_first: as in `gate`.
        fading: see `fading_of`.

    Returns:
        Expert ids [T, k] int32 by falling logit, and their weights [T, k] float32.
    """
    counts = faded_counts(torch.arange(1, len(c) + 1, device=c.device), fading)[:, None]
    z = w.double() + faded_sums(c, fading) / counts
    return choose(z.float(), scales, top_k, softmax_first)
