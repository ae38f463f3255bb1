"""docs/tutorial.md, followed to the letter: its files and commands, in order, in a new directory."""

import os
import re
import subprocess
import sys
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
    """Every piece of the page's output, between `…` and line ends, is in the real one, in order."""
    found, at = bare(output), 0
    for piece in (bare(p) for line in expected.splitlines() for p in line.split("…")):
        assert piece in found[at:], f"the page shows {piece!r}; after {found[:at][-200:]!r} came " + (
            repr(found[at:][-2000:])
        )
        at = found.index(piece, at) + len(piece)


class Reader:
    """Someone with a shell and an editor. Exported variables stay, a server runs until stopped."""

    def __init__(self, directory: Path):
        self.directory, self.exports, self.server = directory, "set -e\n", None
        self.stack = ExitStack()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        local = dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1")
        self.environment = kept | local | {"PATH": path, "COLUMNS": "80"}

    def save(self, code: str) -> None:
        name = FILE.match(code)
        assert name, f"a Python block that does not begin with its file's name:\n{code}"
        (self.directory / name[1]).write_text(self.at_server(code))

    def at_server(self, code: str) -> str:
        return code.replace(SERVER, self.server.url) if self.server else code

    def run(self, code: str) -> str:
        """The output of a block; of a server, that of its start."""
        exports = re.findall(r"^export .*\n", code, re.MULTILINE)
        self.exports += "".join(exports)
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
        # running_server adds host and port: the shell's "$@". It keeps this process's environment,
        # of which only what a reader has is passed on.
        script = f'cd {self.directory}\n{self.exports}exec {code.rstrip()} "$@"'
        clean = ["env", "-i", *(f"{k}={v}" for k, v in self.environment.items())]
        argv = [*clean, "bash", "-c", script, "bash"]
        log = self.directory / "serve.log"
        self.server = self.stack.enter_context(running_server(argv, log))
        return log.read_text(errors="replace")

    def stop(self) -> None:
        server, self.server = self.server, None
        assert server and server.healthy()
        self.stack.close()
        assert server.process.returncode == 0 and not session_members(server.process.pid)


def test_the_page_does_what_it_says(tmp_path):
    page = PAGE.read_text("utf-8")
    assert page.count(STOP) == 1 and page.count("\n```") % 2 == 0
    reader, output, told = Reader(tmp_path), "", 0
    with reader.stack:
        for block in BLOCK.finditer(page):
            language, code = block.groups()
            if reader.server and block.start() > page.index(STOP):
                reader.stop()
            if language == "python":
                reader.save(code)
            elif language == "bash":
                output = reader.run(code)
            else:
                assert_shown(code, output)
                told += 1
    assert reader.server is None and told >= 10
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
