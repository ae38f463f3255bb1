"""Launches past Triton's own: the same binary, grid and arguments as by its way."""

import pytest
from uninterpreted import run_compiled


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return run_compiled("launch_kernels.py", tmp_path_factory.mktemp("triton"))


def test_every_launch_is_triton_s_own(seen):
    for name, (*ours, triton_s) in seen["rows"].items():
        assert triton_s[1:4] == [[3, 2, 1], 7, True]
        assert len(ours) == 3
        for launch in ours:  # descriptors are compared by what they print
            assert launch == triton_s, name


def test_what_a_binary_counts_on_gets_one_of_its_own(seen):
    binary = {name: launches[0][0] for name, launches in seen["rows"].items()}
    same = ("another number", "another long stride", "another address")
    usual = binary["usual"]
    assert [binary.pop(name) for name in same] == [usual] * len(same)
    assert binary.pop("odd like one") == binary["odd stride"]
    assert len(set(binary.values())) == len(binary) == 10


def test_compile_only_launches_nothing_and_later_launches_find_it(seen):
    binaries, launches, loaded_later, loaded_by_one_thread = seen["compiled only"]
    assert (binaries, launches) == (2, 1)
    assert loaded_later == 1  # the script's own count
    assert loaded_by_one_thread  # Triton 3.6 may mix up launchers that threads load


def test_a_constant_without_its_name_is_refused(seen):
    assert seen["refused"] == "kernel: constants must be named, and stand behind arguments"


def test_a_profiler_s_hooks_are_called(seen):
    assert seen["hooked"] == ["kernel"]
