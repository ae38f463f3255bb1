"""Registration of `torch.ops.vllm_adafuse.*`."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("vllm_adafuse", "FRAGMENT")
# Of each op that was registered, what runs it.
IMPLEMENTATIONS: dict[Callable, Callable] = {}


def register_op(schema: str, implementation: Callable, fake: Callable) -> Callable:
    """Defines an op for every device, with its fake for torch.compile.

    Strides are fixed: Inductor hands the op the layouts that eager execution would.

    Args:
        schema: `name(Tensor x, …) -> …`, mutated arguments marked `Tensor(a!)`.
        implementation: runs it; picks the kernel by device.
        fake: shapes and dtypes of the outputs only.

    Returns:
        The op, `torch.ops.vllm_adafuse.<name>`.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _LIBRARY.impl(name, implementation, dispatch_key="CompositeExplicitAutograd")
    _LIBRARY._register_fake(name, fake)
    op = getattr(torch.ops.vllm_adafuse, name).default
    IMPLEMENTATIONS[op] = implementation
    return op


def matmul_f32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [M, K] @ b [K, N], accumulated and returned in float32 (b has a's dtype)."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
