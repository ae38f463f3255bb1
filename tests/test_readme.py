"""README: short, its links lead somewhere, its commands are those of the program."""

import re
import shlex
from pathlib import Path

import pytest
from vllm_adafuse.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SERVING = ROOT / "docs" / "serving.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


def test_it_is_short():
    assert len(README.read_text("utf-8").splitlines()) <= 150


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"`[^`]*`", "", page.read_text("utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(page, program):
    """Of the console blocks of a page."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text("utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]
    return [w for w in words if program in w[:2]]


@pytest.mark.parametrize("page", [README, SERVING], ids=lambda page: page.name)
def test_our_commands_are_parsed(page):
    found = commands(page, "vllm-adafuse")
    assert found
    for words in found:
        assert callable(build_parser().parse_args(words[1:]).run)


def test_every_command_of_the_program_is_told_of_and_no_other():
    told = set(re.findall(r"^\| `vllm-adafuse ([\w-]+)", SERVING.read_text("utf-8"), re.M))
    (choices,) = (a.choices for a in build_parser()._actions if a.dest not in ("help", "version"))
    assert told == set(choices)


def test_the_address_of_the_repository_stands_in_pyproject_alone():
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    address = re.search(r'^Repository = "(.*)"$', pyproject, re.M)[1]
    named = [page.name for page in PAGES if address in page.read_text("utf-8")]
    deploy = [f.name for f in (ROOT / "deploy").iterdir() if address in f.read_text("utf-8")]
    assert not named and not deploy and pyproject.count(address) == 1
