"""An adapted projection, the residual's addition and the RMSNorm behind it:

    z[t] = residual[t] + W x[t] + Σ_e gates[t, e] B[:, e] A[e] x[t]
    out[t] = z[t] / sqrt(mean(z[t]²) + eps) * weight

for o_proj and down_proj, whose outputs go that way in most decoders. W and A stand in one tensor,
[W; A]. With few tokens one launch streams or tiles W, adds the deltas, and leaves split-K
sums, which the norm adds up: so a product with few rows gets programs enough, and none waits for
the last of them. Longer steps take cuBLAS GEMMs; up to some thousands of tokens an
expand adds the deltas before the norm, beyond that the norm does (add_norm.py), or if they
have many ranks cuBLAS (dense_expand.py). SGMM (AdaFuse, arXiv 2603.11873, section 3)
for the deltas. Which, says `dispatch.plan`.
"""

from __future__ import annotations

import torch
from vllm_adafuse.kernels import projection
from vllm_adafuse.kernels.add_norm import add_norm_torch, add_norm_triton
from vllm_adafuse.kernels.configs import MAX_SPLIT_K, GemmConfig
from vllm_adafuse.kernels.dense_expand import dense_expand_triton
from vllm_adafuse.kernels.dispatch import MAX_TILE_TOKENS
from vllm_adafuse.kernels.operands import Projection, Step
from vllm_adafuse.kernels.plans import ADD_NORM, NONE, Plan
from vllm_adafuse.kernels.projection import (
    expand_long,
    long_product,
    one_launch,
    projection_torch,
    split_k_product,
)


def workspace_sizes(lora_a: torch.Tensor, rows: int) -> tuple[int, int, int]:
    """What a projection of `rows` rows may need of a `Workspace`: bytes, floats, semaphores."""
    bytes_, floats, semaphores = projection.workspace_sizes(lora_a, rows)
    return bytes_, floats + MAX_SPLIT_K * MAX_TILE_TOKENS * rows, semaphores


def split_k_triton(x: torch.Tensor, p: Projection, step: Step, config: GemmConfig) -> torch.Tensor:
    """The projection of few tokens in one launch, split-K sums unadded.

    Args:
        config: how it is cut.

    Returns:
        [split_k, T, out] float32 in the workspace, whose sum over split_k is the projection.
    """
    sums = step.workspace.split_sums(config.split_k, x.shape[0], p.shape.size_out)
    return one_launch(x, p, step, config, sums)


def projection_norm_torch(
    x: torch.Tensor, residual: torch.Tensor, p: Projection, step: Step
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference; see `projection_norm`."""
    return add_norm_torch(projection_torch(x, p, step), residual, p.norm)


def projection_norm(
    x: torch.Tensor, residual: torch.Tensor, p: Projection, step: Step
) -> tuple[torch.Tensor, torch.Tensor]:
    """An adapted projection of one slice and no bias, and the norm behind it.

    Args:
        x: [T, in], dtype of the projection; rows contiguous.
        residual: [T, H], same dtype; rows contiguous.
        p: the projection, with the epilogue "norm".
        step: the step's buffers.

    Returns:
        The normed hidden states and the new residual, [T, H] each.
    """
    if x.is_cuda:
        return projection_norm_triton(x, residual, p, step, p.plans[x.shape[0]])
    return projection_norm_torch(x, residual, p, step)


def projection_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, p: Projection, step: Step, way: Plan
) -> tuple[torch.Tensor, torch.Tensor]:
    """`projection_norm` on a GPU, by a plan."""
    behind = residual, p.norm, p.lora_b, step.gates
    if way.config:
        return add_norm_triton(split_k_triton(x, p, step, way.config), None, *behind)
    if way.split_k > 1:
        y, lora_a_out = split_k_product(x, p, way.split_k)
    else:
        y, lora_a_out, _ = long_product(x, p, step, way)
    if way.expand == ADD_NORM:
        return add_norm_triton(y, lora_a_out, *behind)
    if way.expand == NONE:
        shape = p.shape
        dense_expand_triton(
            y, lora_a_out, p.lora_b, step.gates, shape.adapted, shape.widths, way.dense_from
        )
        return add_norm_triton(y, None, *behind)
    y = expand_long(y, lora_a_out, None, p, step, way)
    return add_norm_triton(y, None, *behind, z=y)
