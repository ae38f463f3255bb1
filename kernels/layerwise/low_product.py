"""x in the rank space of all experts of a projection, and beside it what routers make of x:

    low[t] = rows x[t]                                     rows: those of A, then those of routers

Accumulated and returned in float32: a router's choice must not hang on a rounding. The first half
of layer-wise SGMM; `route_layer` decides on what comes out.
"""

from __future__ import annotations

import torch
from vllm_adafuse.kernels.registry import matmul_f32, register_op


def low_product_torch(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return matmul_f32(x, rows.t())


def _fake(x, rows):
    return x.new_empty(x.shape[0], rows.shape[0], dtype=torch.float32)


_op = register_op("low_product(Tensor x, Tensor rows) -> Tensor", low_product_torch, _fake)


def low_product(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x [T, in] times rows [C, in] of the same dtype: [T, C] float32."""
    return _op(x, rows)
