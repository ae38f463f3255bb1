"""The activations of an MLP whose experts are mixed at its output (MixLoRA's form):

    h[t, e] = act(y_gate[t] + B_gate[e] s[t, e]) * (y_up[t] + B_up[e] s[t, e])         e: chosen
    x[0, t] = Σ_e gates[t, e] h[t, e]                      what the backbone's down projection reads
    x[1 + j, t] = h[t, e_j]                                what the down experts read: e_j the j-th
                                                           chosen expert, in rising order
Parts that are always on belong to y_gate and y_up of every expert. So a token costs k activations
and the backbone's down projection once; see `ffn_down` for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from vllm_adafuse.kernels.device.epilogues import EPILOGUES, activate, activate_torch
from vllm_adafuse.kernels.launch import launch
from vllm_adafuse.kernels.registry import register_op
from vllm_adafuse.kernels.whole import cdiv, power_of_2

_BLOCK_T, _BLOCK_C = 16, 64


def slots_of(gates: torch.Tensor, slots: int) -> torch.Tensor:
    """Where x keeps the activation of an expert: [T, E] int64, 1 and more where it is chosen."""
    return (gates != 0).cumsum(-1).clamp(max=slots)


def ffn_mix_torch(gemm_out, gates, lora_b, adapted, width, slots, activation) -> torch.Tensor:
    """The reference; see `ffn_mix`."""
    tokens, (_, num_all_experts, rank), experts = gemm_out.shape[0], lora_b.shape, gates.shape[-1]
    y = gemm_out[:, : 2 * width].float()
    weighted = gemm_out[:, 2 * width :].reshape(tokens, -1, num_all_experts, rank).float()
    b = lora_b.float().split([width if linear_idx >= 0 else 0 for linear_idx in adapted])

    def delta(expert: int) -> torch.Tensor:
        of_linears = [
            weighted[:, p, expert] @ b[i][:, expert].t() if p >= 0 else y.new_zeros(tokens, width)
            for i, p in enumerate(adapted)
        ]
        return torch.cat(of_linears, -1)

    for expert in range(experts, num_all_experts):
        y = y + delta(expert)
    own = gates[:tokens, 0]
    places = slots_of(own, slots)
    mixed = y.new_zeros(tokens, width)
    x = gemm_out.new_zeros(1 + slots, tokens, width)
    for expert in range(experts):
        h, g = activate_torch(y + delta(expert), activation), own[:, expert, None]
        mixed += torch.where(g != 0, g * h, 0.0)
        for j in range(1, 1 + slots):
            chosen = (g != 0) & (places[:, expert, None] == j)
            x[j] = torch.where(chosen, h.to(x.dtype), x[j])
    x[0] = mixed
    return x


@triton.jit
def _add_expert(
    y, weighted_at, b_at, token_mask, col_mask, expert,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y [BLOCK_T, BLOCK_C] + s of one expert [BLOCK_T, RANK] times its B [BLOCK_C, RANK]."""
    for first in range(0, RANK, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        at = expert * RANK + ranks
        weighted = tl.load(
            weighted_at[:, None] + at[None, :],
            mask=token_mask[:, None] & (ranks < RANK)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            b_at[:, None] + at[None, :],
            mask=col_mask[:, None] & (ranks < RANK)[None, :], other=0.0,
        )  # fmt: skip
        y = tl.dot(weighted, tl.trans(b), y, input_precision="ieee")
    return y


@triton.jit(do_not_specialize=["n_tokens"])
def _ffn_mix_kernel(
    gemm_out_ptr, gates_ptr, b_ptr, x_ptr,
    n_tokens, gemm_out_stride,
    WIDTH: tl.constexpr, ADAPTED0: tl.constexpr, ADAPTED1: tl.constexpr,
    EXPERTS: tl.constexpr, NUM_ALL_EXPERTS: tl.constexpr, RANK: tl.constexpr,
    SLOTS: tl.constexpr, EPILOGUE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    token_mask, col_mask = rows < n_tokens, columns < WIDTH
    mask = token_mask[:, None] & col_mask[None, :]
    SIZE: tl.constexpr = NUM_ALL_EXPERTS * RANK
    row_at = gemm_out_ptr + rows.to(tl.int64) * gemm_out_stride
    base = tl.load(row_at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    base_up = tl.load(row_at[:, None] + (WIDTH + columns)[None, :], mask=mask, other=0.0)
    base_up = base_up.to(tl.float32)
    weighted_at = row_at + 2 * WIDTH + ADAPTED0 * SIZE
    weighted_up_at = row_at + 2 * WIDTH + ADAPTED1 * SIZE
    b_at = b_ptr + columns.to(tl.int64) * SIZE
    b_up_at = b_at + (WIDTH if ADAPTED0 >= 0 else 0) * SIZE
    for expert in range(EXPERTS, NUM_ALL_EXPERTS):
        if ADAPTED0 >= 0:
            base = _add_expert(base, weighted_at, b_at, token_mask, col_mask, expert, RANK, BLOCK_R)
        if ADAPTED1 >= 0:
            base_up = _add_expert(
                base_up, weighted_up_at, b_up_at, token_mask, col_mask, expert, RANK, BLOCK_R
            )  # fmt: skip
    mixed = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    place = tl.zeros([BLOCK_T], dtype=tl.int32)
    for expert in range(EXPERTS):
        g = tl.load(gates_ptr + rows * EXPERTS + expert, mask=token_mask, other=0.0)
        chosen = g != 0.0
        if tl.max(chosen.to(tl.int32)) > 0:
            place += chosen.to(tl.int32)
            gate, up = base, base_up
            if ADAPTED0 >= 0:
                gate = _add_expert(gate, weighted_at, b_at, chosen, col_mask, expert, RANK, BLOCK_R)
            if ADAPTED1 >= 0:
                up = _add_expert(
                    up, weighted_up_at, b_up_at, chosen, col_mask, expert, RANK, BLOCK_R
                )  # fmt: skip
            h = activate(gate, up, EPILOGUE)
            mixed += tl.where(chosen[:, None], g[:, None] * h, 0.0)
            if SLOTS > 0:
                slot = tl.minimum(place, SLOTS).to(tl.int64)
                x_at = x_ptr + (slot * n_tokens + rows)[:, None] * WIDTH + columns[None, :]
                tl.store(x_at, h.to(x_ptr.dtype.element_ty), mask=mask & chosen[:, None])
    x_at = x_ptr + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    tl.store(x_at, mixed.to(x_ptr.dtype.element_ty), mask=mask)


def ffn_mix_triton(gemm_out, gates, lora_b, adapted, width, slots, activation) -> torch.Tensor:
    """One launch; see `ffn_mix`."""
    tokens, (_, num_all_experts, rank), experts = gemm_out.shape[0], lora_b.shape, gates.shape[-1]
    x = gemm_out.new_empty(1 + slots, tokens, width)
    grid = cdiv(width, _BLOCK_C), cdiv(tokens, _BLOCK_T)
    launch(
        _ffn_mix_kernel, grid,
        gemm_out, gates, lora_b, x, tokens, gemm_out.stride(0),
        WIDTH=width, ADAPTED0=adapted[0], ADAPTED1=adapted[1],
        EXPERTS=experts, NUM_ALL_EXPERTS=num_all_experts, RANK=rank, SLOTS=slots,
        EPILOGUE=EPILOGUES.index(activation), BLOCK_T=_BLOCK_T, BLOCK_C=_BLOCK_C,
        BLOCK_R=min(64, max(16, power_of_2(rank))), num_warps=4,
    )  # fmt: skip
    return x


def _run(gemm_out, gates, lora_b, adapted, width, slots, activation):
    run = ffn_mix_triton if gemm_out.is_cuda else ffn_mix_torch
    return run(gemm_out, gates, lora_b, adapted, width, slots, activation)


def _fake(gemm_out, gates, lora_b, adapted, width, slots, activation):
    return gemm_out.new_empty(1 + slots, gemm_out.shape[0], width)


_op = register_op(
    "ffn_mix(Tensor gemm_out, Tensor gates, Tensor lora_b, int[] adapted, int width, int slots, "
    "str activation) -> Tensor",
    _run,
    _fake,
)


def ffn_mix(
    gemm_out: torch.Tensor,
    gates: torch.Tensor,
    lora_b: torch.Tensor,
    adapted: Sequence[int],
    width: int,
    slots: int,
    activation: str,
) -> torch.Tensor:
    """The inputs of an MLP's down projection and of its experts.

    Args:
        gemm_out: [T, 2 I + P E' R]: W x of gate_up, then s [P, E', R] with LoRA's scale but without
            gates (`LayerGate.plain`); rows contiguous.
        gates: [N, 1, E] float32, N >= T.
        lora_b: [sum of the adapted widths, E', R] of gate and up, dtype of `gemm_out`.
        adapted: for gate and for up the index in s, -1 for none.
        width: I.
        slots: k where the down projection has experts, else 0.
        activation: "silu" or "gelu_tanh".

    Returns:
        [1 + slots, T, I]: the mixture, then the activations of each token's chosen experts; what
        a token with fewer has in the last of them is undefined.
    """
    return _op(gemm_out, gates, lora_b, adapted, width, slots, activation)
