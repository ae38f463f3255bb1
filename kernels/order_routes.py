"""An order of a long step's tokens in which neighbours share their experts, once per step:

    rows = argsort over t of Σ_j 2^expert_ids[t, j]            equal sets side by side
    present[i] = the experts of rows[64 i : 64 i + 64], a bit each

Kernels that take 64 tokens to a tile then multiply the two or three experts of a tile instead of
all: SGMM's segments (AdaFuse, arXiv 2603.11873, section 3), made once per step and not per layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.dispatch import MIN_ORDER_TOKENS, keeps_order
from vllm_adafuse.kernels.launch import launch
from vllm_adafuse.kernels.plans import Device
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.whole import cdiv, power_of_2

# Tokens of a tile.
ORDER_TILE = 64


class Order(NamedTuple):
    """Attributes:
    rows: [N] int32, the tokens of a step in their order, in the first T places.
    present: [ceil(N / ORDER_TILE)] int64, a bit for each expert of a tile.
    """

    rows: torch.Tensor
    present: torch.Tensor

    @classmethod
    def make(cls, tokens: int, experts: int, rank: int, device: torch.device) -> Order:
        """Buffers for steps of up to so many tokens; empty where no step is put into order, since
        products take the ranks of all experts, or since they are too many."""
        if not keeps_order(experts, rank, tokens, Device.of(torch.empty(0, device=device).device)):
            tokens = 0
        return cls(
            torch.zeros(tokens, dtype=torch.int32, device=device),
            torch.zeros(cdiv(tokens, ORDER_TILE), dtype=torch.int64, device=device),
        )

    def of(self, tokens: int) -> Order | None:
        """The order of a step of T tokens, None if it has none."""
        return self if MIN_ORDER_TOKENS <= tokens <= self.rows.shape[0] else None


@triton.jit(do_not_specialize=["n_tokens"])
def _tile_present_kernel(
    sets_ptr, present_ptr, n_tokens, n_experts, TILE: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    sets = tl.load(sets_ptr + at, mask=at < n_tokens, other=0)
    experts = tl.arange(0, BLOCK_E).to(tl.int64)
    used = tl.max((sets[:, None] >> experts[None, :]) & 1, 0)
    tl.store(present_ptr + tl.program_id(0), tl.sum(used << experts, 0))


def _order_triton(expert_ids, rows, present, tokens, experts) -> None:
    sets, order = _sorted_sets(expert_ids, tokens)
    rows[:tokens].copy_(order)
    launch(
        _tile_present_kernel, (cdiv(tokens, ORDER_TILE),),
        sets, present, tokens, experts,
        TILE=ORDER_TILE, BLOCK_E=max(2, power_of_2(experts)),
    )  # fmt: skip


def _order_torch(expert_ids, rows, present, tokens, experts) -> None:
    sets, order = _sorted_sets(expert_ids, tokens)
    rows[:tokens].copy_(order)
    bits = torch.arange(experts, device=sets.device)
    for i, tile in enumerate(sets.split(ORDER_TILE)):
        present[i] = (((tile[:, None] >> bits) & 1).amax(0) << bits).sum()


def _sorted_sets(expert_ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    sets = (1 << expert_ids[:tokens].long()).sum(1)
    return torch.sort(sets, stable=True)


def _run(expert_ids, rows, present, tokens, experts) -> None:
    if Order(rows, present).of(tokens) is None:
        return
    run = _order_triton if rows.is_cuda else _order_torch
    run(expert_ids, rows, present, tokens, experts)


def _fake(expert_ids, rows, present, tokens, experts) -> None:
    return None


_op = register_op(
    "order_routes(Tensor expert_ids, Tensor(a!) rows, Tensor(b!) present, SymInt tokens, "
    "int experts) -> ()",
    _run,
    _fake,
)


def order_routes(expert_ids: torch.Tensor, order: Order, tokens: int, experts: int) -> None:
    """Orders the tokens of a step, if it is one of those for which `Order.of` gives an order.

    Args:
        expert_ids: [N, k] int32 routes, each row without repeats.
        order: written: its first T rows, and a word for each tile of them.
        tokens: T <= N.
        experts: E.
    """
    _op(expert_ids, order.rows, order.present, tokens, experts)
