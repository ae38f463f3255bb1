"""Makes `benchmarks` importable without the repository's root on the path: `kernels`, which lies
there too, would be mistaken for Hugging Face's package of that name. Import it first."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _load() -> None:
    folder = ROOT / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["benchmarks"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


if "benchmarks" not in sys.modules:
    _load()
