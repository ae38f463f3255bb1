"""Launches of kernels: Triton's own `kernel[grid](...)` at less than half its cost to the CPU.

Steps that no CUDA graph covers wait for the CPU, and Triton works out anew on every launch which
binary it needs. Here that is a look in a dict; docs/kernel-notes.md has the figures. `compile_only`
has launches compile and no more, in threads.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# AMD's backend also tells tensors of more than 2 GiB from others.
_EXACT = not torch.version.hip
MAX_THREADS = 32


class _Ready(NamedTuple):
    """A binary, loaded: what its launcher takes before and behind the arguments."""

    binary: Any
    run: Callable
    function: int
    metadata: Any
    constants: tuple

    @classmethod
    def of(cls, binary: Any, constants: tuple) -> _Ready:
        run = binary.run  # loads it
        return cls(binary, run, binary.function, binary.packed_metadata, constants)


_bound: dict[tuple, Bound] = {}
_compiled: dict[tuple, _Ready] = {}
_pending: dict[tuple, tuple[Any, tuple]] | None = None


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **constants: Any) -> None:
    """Launches a kernel on the current device and stream; `bind` costs less where constants are
    kept.

    Args:
        kernel: of `triton.jit`.
        grid: one to three numbers of programs.
        arguments: what is not a constant: tensors, their descriptors, numbers, None.
        constants: all that are `tl.constexpr`, and options (num_warps and others). Always named
            in the same order.
    """
    bind(kernel, **constants)(grid, *arguments)


def bind(kernel: Any, **constants: Any) -> Bound:
    """A kernel with its constants, to be kept and called with a grid and arguments; see `launch`.
    The same one for the same constants."""
    key = kernel.fn, *constants.values()
    found = _bound.get(key)
    if found is None:
        found = _bound[key] = Bound(kernel, constants)
    return found


@functools.cache
def overlap(hopper: bool) -> dict[str, bool]:
    """What tells a kernel to wait itself for the one before it (`gdc_wait`) where it can."""
    return {"PDL": True, "launch_pdl": True} if hopper else {"PDL": False}


class Bound:
    """See `bind`. Only Triton's launch, the first of its kind, checks that tensors are on a GPU."""

    def __init__(self, kernel: Any, constants: dict[str, Any]):
        self.kernel, self.constants = kernel, constants
        self.interpreted = not isinstance(kernel, JITFunction)  # TRITON_INTERPRET=1
        self.orders: dict[tuple, _Order] = {}

    def __call__(self, grid: Sequence[int], *arguments: Any) -> None:
        if self.interpreted:
            self.kernel[grid](*arguments, **self.constants)
            return
        active = driver.active
        device = active.get_current_device()
        types = tuple(map(type, arguments))
        order = self.orders.get(types) or self._order(types)
        tensors = order.tensors(arguments)
        addresses = (*map(_address, tensors),)
        odd = math.gcd(*addresses) % 16
        key = (
            self, device, order, odd and tuple(a % 16 for a in addresses), *map(_dtype, tensors),
            order.kinds(order.numbers(arguments)),
        )  # fmt: skip
        if order.described:
            descriptors = order.descriptors(arguments)
            key += tuple((d.base.dtype, *d.block_shape) for d in descriptors)
        found = _compiled.get(key)
        if found is None:
            self._first_launch(key, grid, arguments)
        elif _pending is None:
            stream = active.get_current_stream(device)
            hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
            values = order.values(addresses + arguments)
            x, y, z = (*grid, 1, 1)[:3]
            if getattr(hooks[0], "calls", True) or getattr(hooks[1], "calls", True):
                found.binary[x, y, z](*values, *found.constants, stream=stream)
                return
            found.run(
                x, y, z, stream, found.function, found.metadata, None, None, None,
                *values, *found.constants,
            )  # fmt: skip

    def _order(self, types: tuple[type, ...]) -> _Order:
        order = self.orders[types] = _Order(self.kernel, types)
        return order

    def _first_launch(self, key: tuple, grid: Sequence[int], arguments: tuple) -> None:
        kernel, constants, count = self.kernel, self.constants, len(arguments)
        if any(p.is_constexpr != (i >= count) for i, p in enumerate(kernel.params)):
            raise TypeError(
                f"{kernel.__name__}: constants must be named, and stand behind arguments"
            )
        in_order = tuple(constants[name] for name in kernel.arg_names[count:])
        if _pending is None:
            binary = kernel[grid](*arguments, **constants)
            if _EXACT and binary is not None:
                _compiled[key] = _Ready.of(binary, in_order)
        elif key not in _pending or not _EXACT:
            _pending[key] = kernel.warmup(*arguments, grid=grid, **constants), in_order


class _Order:
    """Where in a launch's arguments there are tensors, numbers and descriptors."""

    def __init__(self, kernel: JITFunction, types: tuple[type, ...]):
        places = range(len(types))
        tensors = [i for i in places if issubclass(types[i], torch.Tensor)]
        numbers = [i for i in places if types[i] is int]
        self.tensors, self.numbers = _pick(tensors), _pick(numbers)
        self.described = [i for i in places if types[i] is TensorDescriptor]
        self.descriptors = _pick(self.described)
        # Of the tensors' addresses and the arguments, what Triton's launcher takes.
        at = {place: i for i, place in enumerate(tensors)}
        self.values = _pick([at.get(i, len(tensors) + i) for i in places])
        plain = {p.num for p in kernel.params if p.do_not_specialize}
        self._plain = [i in plain for i in numbers]
        self.kinds = functools.lru_cache(1024)(self._kinds)

    def _kinds(self, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n >> 31 if plain else _kind(n) for n, plain in zip(numbers, self._plain))


_address, _dtype = torch.Tensor.data_ptr, attrgetter("dtype")


def _pick(places: list[int]) -> Callable[[tuple], tuple]:
    if len(places) == 1:
        return lambda values: (values[places[0]],)
    return itemgetter(*places) if places else lambda values: ()


def _kind(number: int) -> int:
    """What a binary depends on in a number: it may count on multiples of 16, as in addresses, has
    one built in, and holds in 32 bits what fits."""
    # Itself, if it is one or does not fit; of all others, 0 for multiples and 2.
    return number if number == 1 or number >> 31 else 2 * (number % 16 != 0)


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
        distinct = set(binaries)
        # Triton 3.6 has gcc compile a launcher for each kind of arguments. Threads fill its cache
        # with them, and no more: what it loads, it loads into one module, out of which a thread
        # may take the launcher of another.
        list(pool.map(lambda b: active.launcher_cls(b.src, b.metadata), distinct))
    for binary in distinct:
        binary[(1, 1, 1)]  # to ask for a launch loads it
    if _EXACT:
        for (key, (_, constants)), binary in zip(pending.items(), binaries):
            _compiled[key] = _Ready.of(binary, constants)
