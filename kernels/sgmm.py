"""SGMM, segmented gather matrix multiplication: the deltas of all chosen experts of one projection.

    y[t] += Σ_e gates[t, e] B[e] (A[e] x[t])

(AdaFuse, arXiv 2603.11873, section 3; for a packed projection every linear has its own A.) It is
`shrink`, then `expand`, added to whatever the projection itself computed: the way over a quantised
backbone. Which kernels run depends on the number of tokens alone, so that one captured CUDA graph
per size is right for every routing.
"""

from __future__ import annotations

import torch
from vllm_adafuse.kernels.expand import expand_torch, expand_triton
from vllm_adafuse.kernels.fp8_shrink import fp8_shrink_triton
from vllm_adafuse.kernels.operands import Projection, Step
from vllm_adafuse.kernels.plans import FP8_SHRINK, SHRINK
from vllm_adafuse.kernels.shrink import shrink_torch, shrink_triton


def sgmm_torch(y: torch.Tensor, x: torch.Tensor, p: Projection, step: Step) -> None:
    """The reference; see `sgmm`."""
    lora_a_out = shrink_torch(x, p.lora_a, step.gates, p.lora_scale)
    expand_torch(y, lora_a_out, p.lora_b, p.shape.adapted, p.shape.widths)


def sgmm(y: torch.Tensor, x: torch.Tensor, p: Projection, step: Step) -> None:
    """Adds the experts' deltas of T tokens to a projection's output, in place.

    Args:
        y: [T, out], the projection's own output, changed; rows contiguous.
        x: [T, in], its input, dtype of y; rows contiguous.
        p: the projection.
        step: the step's buffers; of `active` the bits are read.
    """
    if not x.is_cuda:
        return sgmm_torch(y, x, p, step)
    kernel, tile_blocks = p.plans[x.shape[0]].kernel, None
    if kernel == SHRINK:
        lora_a_out = shrink_triton(x, p.lora_a, step.gates, step.active, step.workspace)
    elif kernel == FP8_SHRINK:
        tile_blocks = step.blocks_of(p.shape, x.shape[0])
        lora_a_out = fp8_shrink_triton(x, p.lora_a, step.gates, tile_blocks)
    else:
        lora_a_out = shrink_torch(x, p.lora_a, step.gates)
    of = p.shape.adapted, p.shape.widths
    expand_triton(y, lora_a_out, p.lora_b, step.active, *of, tile_blocks)
    return None
