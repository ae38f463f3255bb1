"""Counting what a piece of work launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

COPIES = ("Memcpy", "Memset")


def count_launches(work: Callable[[], object]) -> dict[str, int]:
    """Kernels and copies that reach the GPU, by torch's profiler.

    Without a GPU it counts the operators that call no other, which would be about as many.

    Args:
        work: run once before, to compile and warm up, and once while counted.

    Returns:
        `kernels`, and with a GPU `copies` (memcpy and memset) and `device_us`, their summed time.
    """
    work()
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize()
    events = profiler.events()
    if not cuda:
        leaves = [e for e in events if not e.cpu_children and e.name.startswith("aten::")]
        return {"kernels": len(leaves)}
    device = [e for e in events if e.device_type == DeviceType.CUDA]
    copies = [e for e in device if e.name.startswith(COPIES)]
    return {
        "kernels": len(device) - len(copies),
        "copies": len(copies),
        "device_us": round(sum(e.device_time for e in device)),
    }
