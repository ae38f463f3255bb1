"""Layer-wise routing of one projection, and the weights of its experts at once:

    z[t, p] = (logits[t, p] + bias[p], or its absolute value) / temperature       ties: lower expert
    g[t, p] = softmax of the k largest, or softmax of all of which the k largest are kept
    s[t, p, e] = g[t, p, e] scale[e] low[t, p, e]         low[t, p, e] = A[p, e] x[t], in rank space

p counts the linears of a packed projection (q, k, v): each has a router of its own, or all share
that of their block, whose gates later projections read. Experts past those of a router are always
on: their gate is 1. The logits come out of the same product as `low` and are never rounded below
float32; a router that the model's dtype cannot hold stands there in pieces that add up to it. So
MoLA, MixLoRA, HydraLoRA, LoRAMoE and Arrow route.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.dispatch import MAX_LAYER_ACTIVE_TOKENS, MAX_SMALL_ROUTE_TOKENS
from vllm_adafuse.kernels.launch import launch, overlap
from vllm_adafuse.kernels.layerwise.operands import LayerGate, LayerGates, LayerProjection
from vllm_adafuse.kernels.plans import on_hopper

# The i-th piece of a router is larger than its due by this factor to the power i, so that float16
# does not lose it below its normal numbers.
SPLIT_FACTOR = 2048.0
# Experts that a signed word has bits for.
_MAX_BITS = 63


def split_router(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A router as rows of a dtype that add up to it.

    Args:
        weight: [E, in], float32.
        dtype: of the rows.

    Returns:
        [S, E, in]: weight = Σ_i rows[i] / SPLIT_FACTOR**i, to float32's precision. S is 1 where
        the dtype holds every value, else 3.
    """
    if torch.equal(weight.to(dtype).float(), weight):
        return weight.to(dtype)[None]
    pieces, rest = [], weight.double()
    for i in range(3):
        pieces.append((rest * SPLIT_FACTOR**i).to(dtype))
        rest = rest - pieces[-1].double() / SPLIT_FACTOR**i
    return torch.stack(pieces)


def gates_torch(logits: torch.Tensor, gate: LayerGate, count: int) -> torch.Tensor:
    """Gates [T, E] of logits [T, E] float32, of which the first `count` are experts."""
    z = (logits.abs() if gate.absolute else logits) / gate.temperature
    z[:, count:] = float("-inf")
    ordered, order = torch.sort(z, dim=-1, descending=True, stable=True)
    k = min(gate.top_k, count)
    weights = torch.softmax(ordered, -1) if gate.softmax_first else ordered[:, :k].softmax(-1)
    return torch.zeros_like(z).scatter(1, order[:, :k], weights[:, :k])


def _sum_splits(logits: torch.Tensor, routers: int, experts: int) -> torch.Tensor:
    """[T, routers, E] of logits [T, S routers E]."""
    splits = logits.view(logits.shape[0], -1, routers, experts)
    total = splits[:, 0].clone()
    for i in range(1, splits.shape[1]):
        total += splits[:, i] / SPLIT_FACTOR**i
    return total


def _active_bits(gates: torch.Tensor, always: int) -> torch.Tensor | int:
    """The word of the experts with a gate in [T, …, E], those always on included."""
    experts = gates.shape[-1]
    if experts + always > _MAX_BITS:
        return -1
    used = (gates != 0).flatten(0, -2).any(0).long()
    bits = (used << torch.arange(experts, device=used.device)).sum()
    return bits + (((1 << always) - 1) << experts)


def route_layer_torch(
    lora_a_out: torch.Tensor,
    logits: torch.Tensor | None,
    p: LayerProjection,
    layer: LayerGates,
    weighted: torch.Tensor,
) -> None:
    """The reference; see `route_layer`. s [T, P, E' R] is written."""
    gate, scales, bias, gates, active = p.rule, p.scales, p.router_bias, layer.gates, layer.active
    tokens, experts, num_all_experts = weighted.shape[0], gates.shape[-1], scales.shape[0]
    own = gates[:tokens]
    if logits is not None and experts:
        z = _sum_splits(logits, len(gate.experts), experts)
        if bias is not None:
            z = z + bias
        for router, count in enumerate(gate.experts):
            own[:, router] = gates_torch(z[:, router], gate, count) if count else 0.0
    if tokens <= MAX_LAYER_ACTIVE_TOKENS:
        active.fill_(_active_bits(own, gate.always))
    else:
        active.fill_(-1)
    linears = weighted.shape[1]
    if not linears:
        return
    rank = weighted.shape[2] // num_all_experts
    lora_a_out = lora_a_out.reshape(tokens, linears, -1, rank)
    if gate.shared:
        a = [0] * experts + list(range(1, 1 + gate.always))
        lora_a_out = lora_a_out[:, :, a]
    weights = ((own != 0).float() if gate.plain else own) * scales[:experts]
    weights = weights.expand(-1, linears, -1)
    weighted = weighted.view(tokens, linears, num_all_experts, rank)
    # Not a bare product: what is computed of an expert that was not chosen must not matter.
    weighted[:, :, :experts] = torch.where(
        weights[..., None] != 0, lora_a_out[:, :, :experts] * weights[..., None], 0.0
    )
    weighted[:, :, experts:] = lora_a_out[:, :, experts:] * scales[experts:, None]


@triton.jit
def _gates_of(
    z, count, temperature, columns,
    TOP_K: tl.constexpr, SOFTMAX_FIRST: tl.constexpr, ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """Gates [BLOCK_T, BLOCK_E] of logits, zero where an expert is not chosen."""
    if ABSOLUTE:
        z = tl.abs(z)
    valid = (columns < count)[None, :]
    z = tl.where(valid, z / temperature, float("-inf"))
    chosen, rest = z > float("inf"), z
    for _ in range(TOP_K):
        best = tl.max(rest, 1)
        # Of equals the lower expert.
        first = tl.min(tl.where(rest == best[:, None], columns[None, :], 1 << 20), 1)
        pick = columns[None, :] == first[:, None]
        chosen = chosen | pick
        rest = tl.where(pick, float("-inf"), rest)
    powers = tl.where(valid, tl.exp(z - tl.max(z, 1)[:, None]), 0.0)
    kept = tl.where(chosen, powers, 0.0)
    total = tl.sum(powers if SOFTMAX_FIRST else kept, 1)
    return tl.where(count > 0, kept / total[:, None], 0.0)


@triton.jit
def router_gates(
    logits_ptr, bias_ptr, rows, logits_stride, router, count, temperature, token_mask,
    ROUTERS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_FACTOR: tl.constexpr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SOFTMAX_FIRST: tl.constexpr,
    ABSOLUTE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gates [BLOCK_T, BLOCK_E] of one router, zero where an expert is not chosen."""
    columns = tl.arange(0, BLOCK_E)
    mask = token_mask[:, None] & (columns < EXPERTS)[None, :]
    z = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    factor = 1.0
    for split in tl.static_range(SPLITS):
        at = (split * ROUTERS + router) * EXPERTS + columns
        z_at = logits_ptr + rows.to(tl.int64)[:, None] * logits_stride + at[None, :]
        z += tl.load(z_at, mask=mask, other=0.0) * factor
        factor = factor / SPLIT_FACTOR
    if HAS_BIAS:
        bias_at = bias_ptr + router * EXPERTS + columns
        z += tl.load(bias_at, mask=columns < EXPERTS, other=0.0)[None, :]
    gates = _gates_of(z, count, temperature, columns, TOP_K, SOFTMAX_FIRST, ABSOLUTE)
    return tl.where(mask, gates, 0.0)


@triton.jit(do_not_specialize=["n_tokens"])
def _route_layer_kernel(
    lora_a_out_ptr, logits_ptr, bias_ptr, scales_ptr, gates_ptr, active_ptr, weighted_ptr,
    n_tokens, lora_a_stride, logits_stride, count0, count1, count2, temperature,
    ROUTERS: tl.constexpr, SPLITS: tl.constexpr, SPLIT_FACTOR: tl.constexpr,
    EXPERTS: tl.constexpr, NUM_ALL_EXPERTS: tl.constexpr, LINEARS: tl.constexpr, RANK: tl.constexpr,
    TOP_K: tl.constexpr, SOFTMAX_FIRST: tl.constexpr, ABSOLUTE: tl.constexpr,
    SHARED: tl.constexpr, PLAIN: tl.constexpr, HAS_LOGITS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ONE: tl.constexpr, PDL: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask, columns = rows < n_tokens, tl.arange(0, BLOCK_E)
    if PDL:  # the expand behind it may begin, and ask for B, before it waits for this kernel
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    used = tl.zeros([BLOCK_E], dtype=tl.int64)
    for router in tl.static_range(ROUTERS):
        gates_at = gates_ptr + (rows * ROUTERS + router)[:, None] * EXPERTS + columns[None, :]
        mask = token_mask[:, None] & (columns < EXPERTS)[None, :]
        if HAS_LOGITS:
            gates = router_gates(
                logits_ptr, bias_ptr, rows, logits_stride, router,
                count0 if router == 0 else (count1 if router == 1 else count2), temperature,
                token_mask, ROUTERS, SPLITS, SPLIT_FACTOR, EXPERTS, TOP_K, SOFTMAX_FIRST, ABSOLUTE,
                HAS_BIAS, BLOCK_T, BLOCK_E,
            )  # fmt: skip
            tl.store(gates_at, gates, mask=mask)
        else:
            gates = tl.load(gates_at, mask=mask, other=0.0)
        used |= tl.max((gates != 0.0).to(tl.int64), 0)
    if tl.program_id(0) == 0:
        if ONE:
            ids = columns.to(tl.int64)
            used = tl.where(columns >= EXPERTS, (columns < NUM_ALL_EXPERTS).to(tl.int64), used)
            tl.store(active_ptr, tl.sum(used << ids, 0))
        else:
            tl.store(active_ptr, -1)
    # Columns of s read gates of other lanes.
    tl.debug_barrier()
    SIZE: tl.constexpr = NUM_ALL_EXPERTS * RANK
    LORA_A_SIZE: tl.constexpr = (NUM_ALL_EXPERTS - EXPERTS + 1) * RANK if SHARED else SIZE
    for linear_idx in tl.static_range(LINEARS):
        for start in range(0, SIZE, BLOCK_C):
            at = start + tl.arange(0, BLOCK_C)
            expert = at // RANK
            col_mask = at < SIZE
            within = token_mask[:, None] & col_mask[None, :]
            lora_a_out_at = at
            if SHARED:
                lora_a_out_at = tl.where(expert < EXPERTS, at % RANK, at - (EXPERTS - 1) * RANK)
            lora_a_out = tl.load(
                lora_a_out_ptr + rows.to(tl.int64)[:, None] * lora_a_stride
                + (linear_idx * LORA_A_SIZE + lora_a_out_at)[None, :],
                mask=within, other=0.0,
            )  # fmt: skip
            chosen = within & (expert < EXPERTS)[None, :]
            weights = tl.load(
                gates_ptr
                + (rows * ROUTERS + (linear_idx if ROUTERS > 1 else 0))[:, None] * EXPERTS
                + expert[None, :],
                mask=chosen, other=1.0,
            )  # fmt: skip
            if PLAIN:
                weights = (weights != 0.0).to(tl.float32)
            scale = tl.load(scales_ptr + expert, mask=col_mask, other=0.0)
            weights *= scale[None, :]
            # Not a bare product: what an expert that was not chosen gives must not matter.
            weighted = tl.where(weights != 0.0, lora_a_out * weights, 0.0)
            row = (rows.to(tl.int64) * LINEARS + linear_idx)[:, None]
            weighted_at = weighted_ptr + row * SIZE + at[None, :]
            tl.store(weighted_at, weighted.to(weighted_ptr.dtype.element_ty), mask=within)


def route_layer_triton(
    lora_a_out: torch.Tensor,
    logits: torch.Tensor | None,
    p: LayerProjection,
    layer: LayerGates,
    weighted: torch.Tensor,
) -> None:
    """One launch; see `route_layer`. s [T, P, E' R] is written."""
    gate, scales, bias, gates, active = p.rule, p.scales, p.router_bias, layer.gates, layer.active
    tokens, linears, _ = weighted.shape
    (_, routers, experts), num_all_experts = gates.shape, scales.shape[0]
    block_e = max(2, triton.next_power_of_2(num_all_experts))
    one = tokens <= MAX_LAYER_ACTIVE_TOKENS and num_all_experts <= _MAX_BITS
    # Many small programs: the work is short, and what counts is when the last of them ends.
    several = 2 if tokens <= MAX_SMALL_ROUTE_TOKENS else 8
    block_t = triton.next_power_of_2(tokens) if one else max(1, min(several, 4096 // block_e))
    rank = weighted.shape[2] // num_all_experts if num_all_experts else 0
    block_c = min(1024, max(16, triton.next_power_of_2(num_all_experts * rank)))
    counts = [*gate.experts, 0, 0, 0][:3]
    splits = logits.shape[1] // (routers * experts) if logits is not None and experts else 0
    launch(
        _route_layer_kernel, (triton.cdiv(tokens, block_t),),
        lora_a_out, logits, bias, scales, gates, active, weighted,
        tokens, lora_a_out.stride(0), logits.stride(0) if logits is not None else 0,
        *counts, gate.temperature,
        ROUTERS=routers if experts else 0, SPLITS=splits, SPLIT_FACTOR=SPLIT_FACTOR,
        EXPERTS=experts, NUM_ALL_EXPERTS=num_all_experts, LINEARS=linears, RANK=rank,
        TOP_K=gate.top_k, SOFTMAX_FIRST=gate.softmax_first, ABSOLUTE=gate.absolute,
        SHARED=gate.shared, PLAIN=gate.plain,
        HAS_LOGITS=logits is not None, HAS_BIAS=bias is not None,
        ONE=one, BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_C=block_c,
        num_warps=4, **overlap(on_hopper(lora_a_out)),
    )  # fmt: skip


def route_layer(
    lora_a_out: torch.Tensor,
    logits: torch.Tensor | None,
    p: LayerProjection,
    layer: LayerGates,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Decides for T tokens, and weights what they are in rank space.

    Args:
        low: [T, P EA R] float32, rows contiguous; EA is E' = E + always, or 1 + always where A is
            shared.
        logits: [T, S routers E] float32, rows contiguous, of routers in S pieces (see
            `split_router`); None: the gates are read.
        p: the projection.
        layer: written (or read).
        dtype: of s.

    Returns:
        s: [T, P, E' R]; where P is 0 nothing hangs on it.
    """
    shape = lora_a_out.shape[0], p.linears, p.scales.shape[0] * p.rank
    weighted = lora_a_out.new_empty(shape, dtype=dtype)
    run = route_layer_triton if lora_a_out.is_cuda else route_layer_torch
    run(lora_a_out, logits, p, layer, weighted)
    return weighted
