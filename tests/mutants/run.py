"""Shows that the tests would see a fault: breaks the code in one place, and a test must fail.

    python tests/mutants/run.py                     all mutants of the catalogue
    python tests/mutants/run.py --only wait --list  what there is, by a part of the name

Works in a copy of the tree. First the tests of all chosen mutants must pass there as it is; then
each mutant must fail its own. Exit code 0 if every one was killed, 1 if one lived or the catalogue
is wrong, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
# Which copies of the tree have no use for.
LEFT_OUT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "demo", "node_modules", "*.safetensors"
)
# For every eight tests that run together.
SECONDS = 300
# Folders that pyproject.toml maps into vllm_adafuse.
IN_PACKAGE = "kernels", "patches"
# What pytest's exit codes mean here; all others are no verdict.
PASSED, FAILED = 0, 1


class Misfit(Exception):
    """A mutant that cannot be made of this tree."""


def mutated(mutant: Mutant, root: Path) -> str:
    """Its file with the fault in it.

    Raises:
        Misfit: there is no such file, the old text does not stand in it exactly once, or the new
            one changes nothing.
    """
    path = root / mutant.file
    if not path.is_file():
        raise Misfit(f"{mutant.name}: {mutant.file} is not a file")
    text = path.read_text("utf-8")
    if (count := text.count(mutant.old)) != 1:
        raise Misfit(f"{mutant.name}: {mutant.file} has {count} times, expected once: {mutant.old}")
    if mutant.new == mutant.old:
        raise Misfit(f"{mutant.name}: the new text is the old one")
    return text.replace(mutant.old, mutant.new)


def copy_tree(root: Path, to: Path) -> Path:
    """Copies the tree, with its packages where the installed ones have them; returns the copy."""
    tree = to / "tree"
    shutil.copytree(root, tree, ignore=LEFT_OUT)
    for name in IN_PACKAGE:
        if (tree / name).is_dir():
            (tree / "vllm_adafuse" / name).symlink_to(tree / name)
    return tree


def environment(tree: Path) -> dict[str, str]:
    """Of a process that imports the copy."""
    before = os.environ.get("PYTHONPATH")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tree), *([before] if before else [])]),
        "PYTHONDONTWRITEBYTECODE": "1",  # a mutant may have the size and the second of another
    }


def foreign_modules(mutants: Sequence[Mutant], tree: Path) -> list[str]:
    """The files of mutants for which Python would import another than that of the copy."""
    files = sorted({mutant.file for mutant in mutants if mutant.file.endswith(".py")})
    if not files:
        return []
    names = [file.removesuffix(".py").replace("/", ".") for file in files]
    packages = tuple(f"{name}." for name in IN_PACKAGE)
    names = [f"vllm_adafuse.{n}" if n.startswith(packages) else n for n in names]
    code = (
        "import sys, importlib.util as u\n"
        "for name in sys.argv[1:]: print(getattr(u.find_spec(name), 'origin', None))"
    )
    command = [sys.executable, "-c", code, *names]
    done = subprocess.run(
        command, cwd=tree, env=environment(tree), capture_output=True, text=True, check=True
    )
    found = dict(zip(files, done.stdout.splitlines()[-len(files) :], strict=True))
    return [file for file, path in found.items() if Path(path).resolve() != tree.resolve() / file]


def run_tests(tests: Sequence[str], tree: Path) -> tuple[int | None, str]:
    """pytest's exit code, None past the time, and the last lines that it wrote."""
    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    seconds = SECONDS * -(-len(tests) // 8)
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment(tree), capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"still running after {seconds} s"
    return done.returncode, "\n".join((done.stdout + done.stderr).splitlines()[-15:])


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def tests_of(mutants: Sequence[Mutant]) -> list[str]:
    return list(dict.fromkeys(test for mutant in mutants for test in mutant.test.split()))


def check_unbroken(mutants: Sequence[Mutant], tree: Path) -> str:
    """Why the tests say nothing: they are of another tree, do not all pass, or some are skipped;
    "" if they do."""
    if foreign := foreign_modules(mutants, tree):
        return f"Python imports {', '.join(foreign)} from another place than the copy"
    code, said = run_tests(tests_of(mutants), tree)
    if code != PASSED or re.search(r"\d+ skipped", said):
        return f"without a mutant the tests do not all pass (exit code {code}):\n{said}"
    return ""


def verdict(mutant: Mutant, tree: Path) -> tuple[bool, str]:
    """Whether a test killed it, and what to say of it. The tree is afterwards as before."""
    path = tree / mutant.file
    whole = path.read_text("utf-8")
    path.write_text(mutated(mutant, tree), encoding="utf-8")
    try:
        code, said = run_tests(mutant.test.split(), tree)
    finally:
        path.write_text(whole, encoding="utf-8")
    if code == FAILED or code is None:
        first = re.search(r"^FAILED (\S+)", said, re.MULTILINE)
        return True, f"killed by {first[1] if first else mutant.test}"
    if code == PASSED:
        return False, f"LIVES: {mutant.test} passes"
    return False, f"NO VERDICT: pytest ended with {code}\n{said}"


def run(mutants: Sequence[Mutant], root: Path) -> int:
    """Runs mutants, a line for each; the exit code."""
    for mutant in mutants:
        mutated(mutant, root)  # before any time is spent
    chosen = [m for m in mutants if not m.gpu or has_gpu()]
    for mutant in mutants:
        if mutant not in chosen:
            print(f"{mutant.name}: skipped, needs a GPU")
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        tree, start = copy_tree(root, Path(scratch)), time.monotonic()
        print(f"{len(tests_of(chosen))} tests without a mutant ...", flush=True)
        if wrong := check_unbroken(chosen, tree):
            print(wrong)
            return 1
        killed = 0
        for number, mutant in enumerate(chosen, 1):
            dead, said = verdict(mutant, tree)
            killed += dead
            seconds = time.monotonic() - start
            print(f"{number}/{len(chosen)} {seconds:.0f} s {mutant.name}: {said}", flush=True)
    print(f"{killed} of {len(chosen)} killed")
    return int(killed < len(chosen) or not chosen)


def main(arguments: Sequence[str] | None = None) -> int:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from mutants.catalogue import MUTANTS

    parser = argparse.ArgumentParser(
        prog="python tests/mutants/run.py", description=__doc__.split("\n\n")[0],
        epilog=__doc__.split("\n\n")[2],
    )  # fmt: skip
    parser.add_argument("--only", default="", metavar="TEXT", help="those with it in their names")
    parser.add_argument("--list", action="store_true", help="only say which there are")
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if options.only in mutant.name]
    if not chosen:
        parser.error(f"no mutant has {options.only!r} in its name; --list names them")
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name}{' (GPU)' if mutant.gpu else ''}: {mutant.why}")
        return 0
    try:
        return run(chosen, ROOT)
    except Misfit as e:
        print(e, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
