"""LoRA shrink of the chosen experts: s[t, p, j] = weights[t, j] * A[p, expert_ids[t, j]] x[t].

p counts the parts of a packed projection (q, k, v), which have shrinks of their own. SGMM's first
half (AdaFuse, arXiv 2603.11873, section 3): here all experts are multiplied and the chosen ones
kept, which is right for any routing and any T; the gathering kernels replace it.
"""

from __future__ import annotations

import torch

from vllm_adafuse.kernels.registry import matmul_f32, register_op


def shrink_torch(
    x: torch.Tensor, bank_a: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    tokens, top_k = x.shape[0], expert_ids.shape[1]
    parts, experts, rank, size_in = bank_a.shape
    every = matmul_f32(x, bank_a.view(-1, size_in).t()).view(tokens, parts, experts, rank)
    index = expert_ids[:tokens].long()[:, None, :, None].expand(-1, parts, -1, rank)
    return every.gather(2, index) * weights[:tokens, None, :, None].view(tokens, 1, top_k, 1)


def _fake(x, bank_a, expert_ids, weights):
    shape = (x.shape[0], bank_a.shape[0], expert_ids.shape[1], bank_a.shape[2])
    return x.new_empty(shape, dtype=torch.float32)


_op = register_op(
    "shrink(Tensor x, Tensor bank_a, Tensor expert_ids, Tensor weights) -> Tensor",
    shrink_torch,
    _fake,
)


def shrink(
    x: torch.Tensor, bank_a: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Projects T tokens into the rank space of their experts.

    Args:
        x: [T, in], the projection's input.
        bank_a: [P, E, R, in], dtype of x.
        expert_ids: [N, k] int32, N >= T; rows past T are not read.
        weights: [N, k] float32.

    Returns:
        s: [T, P, k, R] float32, weighted.
    """
    return _op(x, bank_a, expert_ids, weights)
