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
        nothing where the GPU cannot be profiled. Without a GPU `kernels` are the operators that call no other, about as many.
    """
    events = profiler.events()
    if not torch.cuda.is_available():
        return {"kernels": sum(1 for e in events if not e.cpu_children and "::" in e.name)}
    device = [e for e in events if e.device_type == DeviceType.CUDA]
    if not device:  # a machine that keeps its counters to itself
        return {}
    copies = [e for e in device if e.name.startswith(COPIES)]
    return {
        "kernels": len(device) - len(copies),
        "copies": len(copies),
        "device_us": round(sum(e.time_range.elapsed_us() for e in device)),
    }


def count_launches(work: Callable[[], object]) -> dict[str, int]:
    """See `counted`; the work runs once before, to compile and warm up."""
    work()
    with launch_profiler() as profiler:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return counted(profiler)
