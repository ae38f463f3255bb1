"""Launches are those of the last commit that meant to change them; see launches.py."""

import json

import pytest
from launches import CASES, DIGESTS, changed, digests, launches_of
from ops import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="kernels are recorded, not run")


@pytest.mark.parametrize("case", CASES)
def test_steps_launch_what_they_did(case):
    known = json.loads(DIGESTS.read_text())[case]
    assert changed(known, digests(launches_of(case))) == []  # else: python tests/launches.py


def test_a_case_for_each_line():
    assert list(json.loads(DIGESTS.read_text())) == list(CASES)


def test_the_digest_sees_a_grid_a_stride_a_constant_and_no_name():
    found = launches_of("8/16 before Hopper")[:40]
    before = digests(found)
    for field, value in (("grid", (1, 2, 3)), ("arguments", ()), ("constants", (0,))):
        first = type(found[0])(**{**vars(found[0]), field: value})
        assert len(changed(before, digests([first, *found[1:]]))) == 2
    renamed = {f"{name}_by_another_name": digest for name, digest in before.items()}
    assert changed(before, renamed) == []
