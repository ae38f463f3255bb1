"""`every_kernel.py` launches each kernel that there is, and says what a sanitizer found."""

import functools

import every_kernel
import pytest
import sanitize
import torch
from fake_gpu import computing
from launches import kernel_modules
from ops import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu_stress.py runs them there")


@functools.cache
def ran(name: str) -> tuple[str, frozenset[str]]:
    """What is wrong with what a case left, and the kernels that it launched."""
    with computing() as names:
        wrong = every_kernel.run_twice(name)
    return wrong, frozenset(names)


@pytest.mark.parametrize("name", every_kernel.CASES)
def test_a_case_is_finite_and_leaves_the_same_twice(name):
    wrong, names = ran(name)
    assert wrong == "" and names


def test_no_kernel_is_left_out():
    kernels = {
        name for module in kernel_modules() for name in vars(module) if name.endswith("_kernel")
    }
    assert kernels == set().union(*(ran(name)[1] for name in every_kernel.CASES)) & kernels


def test_other_bits_and_what_is_not_finite_are_told(monkeypatch):
    values = iter([1.0, 2.0])
    monkeypatch.setitem(every_kernel.CASES, "a", lambda: lambda: [torch.tensor([next(values)])])
    assert every_kernel.run_twice("a") == "leaves other bits each time"
    monkeypatch.setitem(every_kernel.CASES, "a", lambda: lambda: [torch.tensor([torch.nan])])
    assert every_kernel.run_twice("a") == "leaves what is not finite"
    minus = [torch.tensor([0.0])], [torch.tensor([-0.0])]
    assert every_kernel.differ(*minus) and not every_kernel.differ(minus[0], minus[0])


LOG = """========= COMPUTE-SANITIZER
case: shrink
  equal, 0.1 s
case: expand
========= Invalid __global__ write of size 4 bytes
=========     at _expand_kernel+0x90
case: switch
  equal, 0.1 s
========= ERROR SUMMARY: 1 error
"""


def test_a_sanitizers_log_is_summarised_by_case():
    assert sanitize.summary("memcheck", LOG, 9) == [
        f"memcheck   {'expand':32} 1 lines of errors",
        "memcheck   3 cases, exit code 9: ERROR SUMMARY: 1 error",
    ]
    (told,) = sanitize.summary("racecheck", "case: shrink\n", 1)
    assert told.endswith("1 cases, exit code 1: no summary: the tool did not run to the end")


def test_without_the_sanitizer_it_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="compute-sanitizer is not on the PATH"):
        sanitize.sanitized("memcheck", tmp_path)
