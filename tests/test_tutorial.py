"""docs/tutorial.md, followed to the letter: its files and commands in order, in a new directory."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from serve_forks import session_members
from vllm_adafuse.server import running_server

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(bash|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n")
STOP = "Ctrl+C"
SERVER = "http://localhost:8000"
# What a reader's shell does not have, but conftest.py or a developer's may.
OURS = ("VLLM_", "TRITON_", "HF_", "OMP_", "COLUMNS")


def bare(text: str) -> str:
    """Without what differs from machine to machine: generated text, figures, order of experts."""
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    text = re.sub(r"goes on with .*", "goes on with TEXT", text)
    text = re.sub(r'"text": ?".*?(?<!\\)"(?=[,}])', '"text": TEXT', text)
    text = re.sub(r"\b(python|cpp|law|expert_\d)\b", "EXPERT", text)
    text = re.sub(r"\d[\d.,]*", "#", text)
    return " ".join(text.split())


def assert_shown(expected: str, output: str) -> None:
    """Every piece of what the page shows, between `…` and line ends, came, in this order."""
    found, at = bare(output), 0
    for piece in (bare(p) for line in expected.splitlines() for p in line.split("…")):
        before, rest = found[:at][-200:], found[at:][-2000:]
        assert piece in found[at:], f"the page shows {piece!r}; after {before!r} came {rest!r}"
        at = found.index(piece, at) + len(piece)


class Reader:
    """Someone with a shell and an editor. Exported variables stay, a server runs until stopped."""

    def __init__(self, directory: Path, exports: str = "set -e\n"):
        self.directory, self.exports, self.server = directory, exports, None
        self.stack = ExitStack()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        local = dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1")
        self.environment = kept | local | {"PATH": path, "COLUMNS": "80"}

    def follow(self, text: str) -> int:
        """Does what a part of the page says; stops its server at the end.

        Returns:
            The number of outputs that the page shows.
        """
        output, shown = "", 0
        with self.stack:
            for language, code in BLOCK.findall(text):
                if language == "python":
                    self.save(code)
                elif language == "bash":
                    output = self.run(code)
                else:
                    assert_shown(code, output)
                    shown += 1
            if self.server:
                assert STOP in text
                self.stop()
        return shown

    def save(self, code: str) -> None:
        name = FILE.match(code)
        assert name, f"a Python block that does not begin with its file's name:\n{code}"
        (self.directory / name[1]).write_text(self.at_server(code))

    def at_server(self, code: str) -> str:
        return code.replace(SERVER, self.server.url) if self.server else code

    def run(self, code: str) -> str:
        """The output of a block; of a server, that of its start."""
        self.exports += "".join(re.findall(r"^export .*\n", code, re.MULTILINE))
        if code.startswith("vllm serve"):
            return self.serve(code)
        done = subprocess.run(
            ["bash", "-c", self.exports + self.at_server(code)],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout[-3000:]}"
        return done.stdout

    def serve(self, code: str) -> str:
        # "$@" is what running_server adds: host and port. It passes on all of this process's
        # environment, of which a reader has only a part.
        script = f'cd "$0"\n{self.exports}exec {code.rstrip()} "$@"'
        environment = [f"{k}={v}" for k, v in self.environment.items()]
        argv = ["env", "-i", *environment, "bash", "-c", script, str(self.directory)]
        log = self.directory / "serve.log"
        self.server = self.stack.enter_context(running_server(argv, log))
        return log.read_text(errors="replace")

    def stop(self) -> None:
        assert self.server.healthy()
        self.stack.close()
        assert self.server.process.returncode == 0
        assert not session_members(self.server.process.pid)


def test_the_page_does_what_it_says(tmp_path):
    page = PAGE.read_text("utf-8")
    before, *parts = page.split("\n## Part ")
    assert len(parts) == 2 and page.count("\n```") % 2 == 0
    reader = Reader(tmp_path)
    shown = reader.follow(before)
    # The parts do not need each other: to save time, two read at once.
    with ThreadPoolExecutor() as pool:
        shown += sum(pool.map(lambda part: Reader(tmp_path, reader.exports).follow(part), parts))
    assert shown == len(re.findall("^```text$", page, re.MULTILINE)) >= 10
    perplexities = re.search(r"perplexity +([\d.]+) -> ([\d.]+)", page)
    assert float(perplexities[2]) < float(perplexities[1])


def test_a_page_that_has_rotted_is_noticed(tmp_path):
    shown = "ok: mixture: 3 experts\nwrote …/mixture; done"
    assert_shown(shown, "bar 10%\nok: mixture:  5 experts, top-2\nwrote /tmp/x/mixture; done\n")
    for rotten in ("ok: mixture: 3 adapters", "wrote /x/mixture; done\nok: mixture: 3 experts"):
        try:
            assert_shown(shown, rotten)
        except AssertionError:
            continue
        raise RuntimeError(f"not noticed: {rotten}")


def test_links_of_the_page_lead_somewhere():
    page = PAGE.read_text("utf-8")
    links = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page)
    assert len(links) > 10
    for file, anchor in links:
        if file.startswith("http"):
            continue
        target = (PAGE.parent / file if file else PAGE).read_text("utf-8")
        headings = re.findall(r"^#+ (.*)$", target, re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
        assert not anchor or anchor in slugs, f"{file}#{anchor}"
