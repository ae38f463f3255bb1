"""A GPU that is not there, and computes: ops go its way, Triton's interpreter runs their kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from launches import keep_no_kernel, kernel_modules
from triton.runtime import interpreter
from vllm_adafuse.kernels.plans import Device


@contextmanager
def computing(hopper: bool = True) -> Iterator[list[str]]:
    """Names of the kernels that are launched within it, in their order; tensors stay on the CPU."""
    names: list[str] = []
    call, mm = interpreter.GridExecutor.__call__, torch.mm

    def named(self, *arguments, **constants):
        names.append(self.fn.__name__)
        return call(self, *arguments, **constants)

    def mm_of_a_gpu(a, b, out_dtype=None, **options):
        return mm(a, b, **options) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype))

    keep_no_kernel()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        patch.setattr(torch, "mm", mm_of_a_gpu)
        patch.setattr(interpreter.GridExecutor, "__call__", named)
        gpu = Device("a GPU", 9 if hopper else 8)
        patch.setattr(Device, "of", staticmethod(lambda device: gpu))
        for module in kernel_modules():  # of instructions that the interpreter has not
            if hasattr(module, "overlap"):
                patch.setattr(module, "overlap", lambda hopper: {"PDL": False})
            if hasattr(module, "waits_in_loops"):
                patch.setattr(module, "waits_in_loops", lambda tensor: False)
        yield names
    keep_no_kernel()
