"""The catalogue of mutants fits the code that there is; who kills them is seen by running it."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import run
from mutants.catalogue import MUTANTS
from mutants.mutant import Mutant

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_can_be_made_of_this_tree(mutant):
    new = run.mutated(mutant, ROOT)
    if mutant.file.endswith(".py"):
        ast.parse(new)
    assert mutant.why
    for test in mutant.test.split():
        file, _, function = test.partition("::")
        text = (ROOT / file).read_text("utf-8")
        assert f"def {function.partition('[')[0]}(" in text or not function


def test_there_are_enough_of_them():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({(mutant.file, mutant.old, mutant.new) for mutant in MUTANTS}) == len(MUTANTS)
    assert sum(not mutant.gpu for mutant in MUTANTS) >= 20


BUGGY = "def add(a, b):\n    return a + b\n"
TEST = "from vllm_adafuse.sums import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"
SEEN = Mutant("seen", "vllm_adafuse/sums.py", "a + b", "a - b", "tests/test_sums.py", "wrong sums")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small one of this form."""
    monkeypatch.setattr(run, "SECONDS", 60)
    for name, text in (
        ("vllm_adafuse/__init__.py", ""), ("vllm_adafuse/sums.py", BUGGY),
        ("tests/test_sums.py", TEST), ("kernels/__init__.py", ""),
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_one_is_killed_and_one_lives(tree, capsys):
    lives = SEEN._replace(name="lives", new="b + a")
    broken = SEEN._replace(name="broken", new="a +")
    assert run.run([SEEN, lives, broken], tree) == 1
    out = capsys.readouterr().out
    assert "seen: killed by tests/test_sums.py::test_add" in out
    assert "lives: LIVES: tests/test_sums.py passes" in out
    assert "broken: NO VERDICT: pytest ended with 2" in out and "1 of 3 killed" in out
    assert (tree / "vllm_adafuse" / "sums.py").read_text() == BUGGY
    assert run.run([SEEN], tree) == 0 and "1 of 1 killed" in capsys.readouterr().out


def test_a_test_that_fails_already_says_nothing(tree, capsys):
    (tree / "vllm_adafuse" / "sums.py").write_text(BUGGY.replace("b\n", "b + 1\n"))
    assert run.run([SEEN], tree) == 1
    assert "without a mutant the tests do not all pass" in capsys.readouterr().out


def test_a_copy_that_is_not_imported_says_nothing(tree, capsys):
    (tree / "vllm_adafuse" / "sums.py").unlink()
    (tree / "vllm_adafuse" / "sums").mkdir()
    (tree / "vllm_adafuse" / "sums" / "__init__.py").write_text(BUGGY)
    (tree / "vllm_adafuse" / "sums.py").write_text(BUGGY)
    assert run.run([SEEN], tree) == 1
    said = capsys.readouterr().out
    assert "imports vllm_adafuse/sums.py from another place than the copy" in said


@pytest.mark.parametrize(
    "change, message",
    [
        ({"old": "a * b"}, "has 0 times, expected once: a * b"),
        ({"old": "a"}, "has 3 times, expected once: a"),
        ({"file": "vllm_adafuse/none.py"}, "vllm_adafuse/none.py is not a file"),
        ({"new": "a + b"}, "the new text is the old one"),
    ],
)
def test_what_does_not_fit_is_an_error(tree, change, message):
    with pytest.raises(run.Misfit, match=re.escape(message)):
        run.run([SEEN._replace(**change)], tree)


def test_the_command():
    command = [sys.executable, ROOT / "tests" / "mutants" / "run.py"]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == len(MUTANTS)
    wrong = subprocess.run([*command, "--only", "none"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "no mutant has 'none' in its name" in wrong.stderr
