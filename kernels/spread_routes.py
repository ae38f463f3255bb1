"""What every layer of a step needs to know of its routes, once per step:

    gates[t, e] = Σ_j weights[t, j] [expert_ids[t, j] = e]
    bit e of active[0] = any_t gates[t, e] ≠ 0, active[1] = how many, active[2:] = which

Rows of `gates` mask the experts of a token, `active` skips the bytes of experts that no token
chose: by bits where experts are few, by the list where many would only be skipped. The semaphores
by which the programs of one launch wait for each other begin at zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.configs import MAX_BITS
from vllm_adafuse.kernels.dispatch import MAX_ACTIVE_TOKENS
from vllm_adafuse.kernels.launch import launch
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.whole import cdiv, power_of_2


def new_active(experts: int, device: torch.device | str | None = None) -> torch.Tensor:
    """[2 + E] int64 for `spread_routes` to write: no expert yet."""
    return torch.zeros(2 + experts, dtype=torch.int64, device=device)


def list_active(used: torch.Tensor, active: torch.Tensor) -> None:
    """Writes the bits, the number and the list of experts (or pages) [E] that are used."""
    experts = used.nonzero()[:, 0]
    active[0] = (1 << experts).sum() if len(used) <= MAX_BITS else -1
    active[1], active[2 : 2 + len(experts)] = len(experts), experts


@triton.jit
def _block_of_gates(
    ids_ptr, weights_ptr, gates_ptr, rows, experts, token_mask, top_k, n_experts,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Writes and returns the gates [BLOCK_T, BLOCK_E] of rows and experts."""
    gates = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for slot in range(top_k):
        ids = tl.load(ids_ptr + rows * top_k + slot, mask=token_mask, other=-1)
        weights = tl.load(weights_ptr + rows * top_k + slot, mask=token_mask, other=0.0)
        gates += tl.where(ids[:, None] == experts[None, :], weights[:, None], 0.0)
    mask = token_mask[:, None] & (experts < n_experts)[None, :]
    tl.store(gates_ptr + rows[:, None] * n_experts + experts[None, :], gates, mask=mask)
    return gates


@triton.jit(do_not_specialize=["n_tokens"])
def _spread_routes_kernel(
    ids_ptr, weights_ptr, gates_ptr, active_ptr, semaphores_ptr,
    n_tokens, top_k, n_experts, n_semaphores,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    rows = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask = rows < n_tokens
    AT_ONCE: tl.constexpr = BLOCK_E if BLOCK_E <= 64 else 32
    bits, count = tl.full([], -1, tl.int64), tl.zeros([], tl.int64)
    for first in range(0, BLOCK_E, AT_ONCE):
        experts = first + tl.arange(0, AT_ONCE)
        gates = _block_of_gates(
            ids_ptr, weights_ptr, gates_ptr, rows, experts, token_mask, top_k, n_experts,
            BLOCK_T, AT_ONCE,
        )  # fmt: skip
        if ONE:  # one program
            used = tl.max((gates != 0.0).to(tl.int64), 0)
            if BLOCK_E <= 64:
                bits = tl.sum(used << experts.to(tl.int64), 0)
            place = count + tl.cumsum(used, 0)
            tl.store(active_ptr + 1 + place, experts.to(tl.int64), mask=used != 0)
            count += tl.sum(used, 0)
    if pid == 0:
        tl.store(active_ptr, bits)
        if ONE:
            tl.store(active_ptr + 1, count)
        at = tl.arange(0, 256)
        for start in range(0, n_semaphores, 256):
            tl.store(semaphores_ptr + start + at, at * 0, mask=start + at < n_semaphores)


def spread_routes_triton(
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gates: torch.Tensor,
    active: torch.Tensor,
    semaphores: torch.Tensor,
    tokens: int,
) -> None:
    """One launch; see `spread_routes`."""
    top_k, experts = expert_ids.shape[1], gates.shape[1]
    one = tokens <= MAX_ACTIVE_TOKENS
    block = max(16, power_of_2(tokens)) if one else 64
    launch(
        _spread_routes_kernel, (cdiv(tokens, block),),
        expert_ids, weights, gates, active, semaphores,
        tokens, top_k, experts, semaphores.numel(),
        BLOCK_T=block, BLOCK_E=max(2, power_of_2(experts)), ONE=one,
        num_warps=8 if block >= 128 else 4,
    )  # fmt: skip


def spread_routes_torch(
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gates: torch.Tensor,
    active: torch.Tensor,
    semaphores: torch.Tensor,
    tokens: int,
) -> None:
    """The reference; see `spread_routes`."""
    rows = gates[:tokens].zero_()
    rows.scatter_(1, expert_ids[:tokens].long(), weights[:tokens])
    if tokens <= MAX_ACTIVE_TOKENS:
        list_active((rows != 0).any(0), active)
    else:
        active[0] = -1
    semaphores.zero_()


def _run(expert_ids, weights, gates, active, semaphores, tokens) -> None:
    run = spread_routes_triton if gates.is_cuda else spread_routes_torch
    run(expert_ids, weights, gates, active, semaphores, tokens)


def _fake(expert_ids, weights, gates, active, semaphores, tokens) -> None:
    return None


_op = register_op(
    "spread_routes(Tensor expert_ids, Tensor weights, Tensor(a!) gates, Tensor(b!) active, "
    "Tensor(c!) semaphores, SymInt tokens) -> ()",
    _run,
    _fake,
)


def spread_routes(
    expert_ids: torch.Tensor,
    weights: torch.Tensor,
    gates: torch.Tensor,
    active: torch.Tensor,
    semaphores: torch.Tensor,
    tokens: int,
) -> None:
    """Writes a step's gates, the active experts, and zeroes the semaphores.

    Args:
        expert_ids: [N, k] int32 routes, each row without repeats; contiguous like all here.
        weights: [N, k] float32.
        gates: [N, E] float32, its first T rows written.
        active: [2 + E] int64, written: a bit for each expert with a gate, then their number, then
            which they are, in rising order. Of more than 64 experts all bits; in batches of more
            than 256 all bits, and no list.
        semaphores: int32 of any shape, zeroed.
        tokens: T <= N.
    """
    _op(expert_ids, weights, gates, active, semaphores, tokens)
