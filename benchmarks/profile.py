"""Counting what a piece of work launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COPIES = ("Memcpy", "Memset")


def launch_profiler() -> profile:
    """torch's profiler, set to hear only of what reaches the GPU; without one, of operators."""
    cuda = torch.cuda.is_available()
    return profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])


def counted(profiler: profile) -> dict[str, int]:
    """What a stopped profiler saw.

    Returns:
        `kernels`, and with a GPU `copies` (memcpy and memset) and `device_us`, their summed time;
        nothing where the GPU cannot be profiled. Without a GPU `kernels` are the operators that
        call no other, about as many.
    """
    device = _reached(profiler)
    if not torch.cuda.is_available():
        return {"kernels": len(device)}
    if not device:  # a machine that keeps its counters to itself
        return {}
    copies = [e for e in device if e.name.startswith(COPIES)]
    return {
        "kernels": len(device) - len(copies),
        "copies": len(copies),
        "device_us": round(sum(e.time_range.elapsed_us() for e in device)),
    }


def _reached(profiler: profile) -> list:
    """The events of the GPU; without one, of operators that call no other."""
    events = profiler.events()
    if not torch.cuda.is_available():
        return [e for e in events if not e.cpu_children and "::" in e.name]
    return [e for e in events if e.device_type == DeviceType.CUDA]


def listed(profiler: profile) -> list[tuple[str, float, float]]:
    """Name, begin and duration in microseconds of every kernel and copy that a stopped profiler
    saw, in order of time; names of copies begin like one of COPIES."""
    spans = [(e.name, e.time_range.start, e.time_range.elapsed_us()) for e in _reached(profiler)]
    return sorted(spans, key=lambda span: span[1])


def count_launches(work: Callable[[], object]) -> dict[str, int]:
    """See `counted`; the work runs once before, to compile and warm up."""
    work()
    with launch_profiler() as profiler:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return counted(profiler)
