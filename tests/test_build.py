"""What is handed out: an sdist, the wheel made of it, and both of them on a clean environment."""

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import vllm_adafuse

ROOT = Path(__file__).resolve().parents[1]
# Each runs in a directory of its own; the last line that it prints is the file's name.
HOOK = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"


def build(what: str, tree: Path, out: Path) -> Path:
    """As `python -m build --no-isolation` does: setuptools' hook of that name, in the tree."""
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", HOOK, f"build_{what}", str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Made of a copy of what git tracks, so that nothing that lies about gets in, or helps."""
    tree = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    return build("sdist", tree, tree.with_name("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Of the unpacked sdist, which must hold all that it takes."""
    out = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as tar:
        tar.extractall(out, filter="data")
    return build("wheel", next(out.iterdir()), out.with_name("wheel"))


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """The bin directory of an environment with the wheel, and with what it needs from this one."""
    root = tmp_path_factory.mktemp("clean") / "env"
    venv.create(root, with_pip=False)
    site = next(root.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Their .pth files are not read there, so the package that is under test stays unknown.
    paths = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "needs.pth").write_text("\n".join(paths))
    return root / "bin"


def names(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {name.partition("/")[2] for name in tar.getnames()}


def test_the_sdist_has_what_the_wheel_is_made_of_and_no_tests(sdist):
    assert sdist.name == f"vllm_adafuse-{vllm_adafuse.__version__}.tar.gz"
    held = names(sdist)
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= held
    assert not [name for name in held if name.startswith(("tests/", "benchmarks/", ".venv"))]


def test_the_wheel_has_every_module_and_all_data(wheel):
    held = names(wheel)
    mapped = {"kernels": "vllm_adafuse/kernels", "patches": "vllm_adafuse/patches"}
    for top in ("vllm_adafuse", "kernels", "patches"):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".json", ".safetensors", ".typed"):
                name = path.relative_to(ROOT / top).as_posix()
                assert f"{mapped.get(top, top)}/{name}" in held
    assert {name.partition("/")[0] for name in held if "dist-info" not in name} == {"vllm_adafuse"}
    about = next(name for name in held if name.endswith("dist-info/METADATA"))
    said = zipfile.ZipFile(wheel).read(about).decode()
    assert f"Version: {vllm_adafuse.__version__}\n" in said
    assert "License-Expression: Apache-2.0\n" in said and "Project-URL: Repository, https:" in said


def test_it_runs_on_a_clean_environment(clean, tmp_path):
    program = clean / "vllm-adafuse"
    program.write_text(  # what pip writes for the entry point
        f"#!{clean}/python\nimport sys\nfrom importlib.metadata import entry_points\n"
        "(found,) = entry_points(group='console_scripts', name='vllm-adafuse')\n"
        "sys.exit(found.load()())\n"
    )
    program.chmod(0o755)
    helped = subprocess.run([program, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert helped.returncode == 0 and "check" in helped.stdout, helped.stderr
    code = (
        "import vllm_adafuse, vllm_adafuse.kernels, vllm_adafuse.patches\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from vllm import ModelRegistry\n"
        "print(*{m.__path__[0] for m in (vllm_adafuse, vllm_adafuse.kernels)}, sep='\\n')\n"
        "print('AdaFuseLlamaForCausalLM' in ModelRegistry.models)"
    )
    done = subprocess.run(
        [clean / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    *paths, known = done.stdout.splitlines()[-3:]
    assert known == "True" and all(path.startswith(str(clean.parent)) for path in paths)


def test_each_version_and_the_address_stand_in_one_place():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    pinned = re.findall(r"additional_dependencies: \[(.+)\]", hooks)
    assert sorted(pinned) == sorted(project["optional-dependencies"]["lint"])
    newest = re.findall(r"^## \[(\d\S+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)[0]
    assert newest == vllm_adafuse.__version__
    address = project["urls"]["Repository"]
    listed = subprocess.run(
        ["git", "grep", "-lIF", address], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.returncode in (0, 128) and listed.stdout in ("", "pyproject.toml\n")
