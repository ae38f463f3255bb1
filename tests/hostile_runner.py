"""Runs commands of `vllm-adafuse`, each in a fork of one warm process, and measures them.

    python tests/hostile_runner.py WARM_ADAPTER

reads one JSON line for each command, {"argv": […], "answers": text on stdin}, and answers with one:
exit code (None: it had to be killed), output, seconds of CPU time, and the MiB by which the process
grew. Imports were done before the fork, so they are not counted.
"""

import contextlib
import io
import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

WALL, SPACE = 60, 4 << 30  # seconds; bytes of address space that a fork may add


def run(argv: list[str], answers: str) -> dict:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as stdin:
        stdin.write(answers.encode())
        stdin.seek(0)
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            child(argv, out.fileno(), stdin.fileno() if answers else None)
        _, status, usage = os.wait4(pid, 0)
        out.seek(0)
        text = out.read().decode(errors="replace")
    text, _, grown = text.rpartition("\ngrown ")
    code = os.waitstatus_to_exitcode(status)
    return {
        "code": None if code < 0 else code,
        "text": text,
        "seconds": usage.ru_utime + usage.ru_stime,
        "grown": int(grown or 1 << 20) / 1024,
    }


def child(argv: list[str], out: int, stdin: int | None) -> None:
    signal.alarm(WALL)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + SPACE
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    os.dup2(os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdin = io.TextIOWrapper(io.FileIO(0))
    code = 99
    try:
        code = main(argv)
    except SystemExit as e:
        code = e.code
    except BaseException:
        import traceback

        traceback.print_exc()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"\ngrown {grown}", flush=True)
    os._exit(code)


if __name__ == "__main__":
    from vllm_adafuse.cli.main import main

    adapter = sys.argv[1]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sys.stdout.reconfigure = sys.stderr.reconfigure = lambda **kwargs: None
        for argv in (["check", adapter], ["route", adapter, "--text", "a"]):
            assert main(argv) == 0, argv
        import vllm_adafuse.convert.registry
        import vllm_adafuse.experts.compose
        import vllm_adafuse.format.merge
        import vllm_adafuse.training.distill_run  # noqa: F401 - imported before the forks
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
