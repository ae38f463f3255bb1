"""Launches of kernels: Triton's own `kernel[grid](...)` at about half its cost to the CPU.

Steps that no CUDA graph covers wait for the CPU, and Triton works out anew on every launch which
binary it needs. Here that is a look in a dict; docs/kernel-notes.md has the figures. `compile_only`
has launches compile and no more, in threads.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# AMD's backend also tells tensors of more than 2 GiB from others.
_EXACT = not torch.version.hip
MAX_THREADS = 32

_compiled: dict[tuple, tuple[Any, tuple]] = {}  # key -> a binary, and constants in their order
_plain: dict[Hashable, list[int]] = {}  # of a kernel, the arguments that it is not specialised for
_pending: dict[tuple, tuple[Any, tuple]] | None = None


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """Launches a kernel on the current device and stream.

    Args:
        kernel: of `triton.jit`.
        grid: one to three numbers of programs.
        arguments: what is not a constant: tensors, their descriptors, numbers, None.
        constants: all that are `tl.constexpr`, and options (num_warps and others). Always named
            in the same order.
    """
    if not isinstance(kernel, JITFunction):  # TRITON_INTERPRET=1
        return kernel[grid](*arguments, **constants)
    device = driver.active.get_current_device()
    kinds = [_kind(value) for value in arguments]
    for i in _plain.get(kernel.fn, ()):
        kinds[i] = arguments[i] >> 31
    key = (kernel.fn, device, *kinds, *constants.values())
    found = _compiled.get(key)
    if found is None:
        _first_launch(key, kernel, grid, arguments, constants)
    elif _pending is None:
        stream = driver.active.get_current_stream(device)
        found[0][(*grid, 1, 1)[:3]](*arguments, *found[1], stream=stream)


def _kind(value: Any) -> Hashable:
    """What a binary depends on in an argument: it may count on addresses and numbers that are
    multiples of 16, has ones built in, and holds numbers in 32 bits if they fit."""
    kind = type(value)
    if kind is int:
        # Itself, if it is one or does not fit; of all others, 0 for multiples and 2.
        return value if value == 1 or value >> 31 else 2 * (value % 16 != 0)
    if kind is TensorDescriptor:
        return value.base.dtype, *value.block_shape
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16
    return kind


def _first_launch(key, kernel, grid, arguments, constants) -> None:
    count = len(arguments)
    if any(p.is_constexpr != (i >= count) for i, p in enumerate(kernel.params)):
        raise TypeError(f"{kernel.__name__}: constants must be named, and stand behind arguments")
    if kernel.fn not in _plain:  # the key is not yet what it is to be
        _plain[kernel.fn] = [p.num for p in kernel.params if p.do_not_specialize]
        return launch(kernel, grid, *arguments, **constants)
    entry = tuple(constants[name] for name in kernel.arg_names[count:])
    if _pending is None:
        binary = kernel[grid](*arguments, **constants)
        if _EXACT and binary is not None:
            _compiled[key] = binary, entry
    elif key not in _pending or not _EXACT:
        _pending[key] = kernel.warmup(*arguments, grid=grid, **constants), entry


@contextmanager
def compile_only() -> Iterator[dict]:
    """`launch` launches nothing meanwhile; at the end all its kernels are compiled and loaded.

    Gives a dict with an entry for each of them.

    For the thread that launches alone. Triton's compiler keeps other threads waiting for a tenth
    of its time only, so they share the work.

    Raises:
        Exception: Triton's, where a kernel does not compile.
    """
    global _pending
    active = driver.active
    here = active.get_current_device()
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, "compile", active.set_current_device, (here,)) as pool:
        _pending = pending = {}
        try:
            with triton.AsyncCompileMode(pool):
                yield pending
        finally:
            _pending = None
        binaries = [b.result() if hasattr(b, "result") else b for b, _ in pending.values()]
        # To ask for a launch loads the binary, and Triton 3.6 has its launcher compiled then.
        list(pool.map(lambda binary: binary[(1, 1, 1)], set(binaries)))
    if _EXACT:
        _compiled.update({k: (b, e) for b, (k, (_, e)) in zip(binaries, pending.items())})
