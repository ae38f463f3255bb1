"""Runs many `vllm serve` commands in one warm process: it imports vLLM once and forks per command.

A child runs vLLM's own `main()` in a session of its own, so that whatever it leaves behind is
found. Start it with `ServeForks()`; as a script it is the warm process, one JSON line per command.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

TIME_LIMIT = 60
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # a pool of threads does not survive a fork
}

# What a refused command imports; what is not listed is imported again by every child.
WARM = [
    *(f"vllm.entrypoints.cli.{name}" for name in ("openai", "serve", "launch", "collect_env")),
    "vllm.entrypoints.cli.benchmark.main",
    "vllm.entrypoints.cli.run_batch",
    "vllm.model_executor.model_loader",
    "transformers.models.llama.modeling_llama",
    "vllm_adafuse.serving.attach",
]


class ServeForks:
    """The warm process, as a context manager."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def run(self, arguments: list[str], output: Path, user: int = 0) -> dict:
        """Runs `vllm *arguments`; its output goes to a file.

        Returns:
            code: the exit status, negative for a signal; hung: it was stopped after TIME_LIMIT;
            left: processes of it that were still there when it had ended.
        """
        line = json.dumps({"arguments": arguments, "output": str(output), "user": user})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def session_members(session: int) -> list[int]:
    """Living processes of a session."""
    members = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue  # not a process, or it has just ended
        if entry.name.isdigit() and int(fields[3]) == session and fields[0] != "Z":
            members.append(int(entry.name))
    return members


def stop_session(session: int) -> None:
    """Kills what is left of a session that was started here."""
    for pid in session_members(session):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # ended by itself meanwhile


def _child(main, request: dict) -> None:
    """Runs the command as the console script would, and ends the process."""
    os.setsid()
    file = os.open(request["output"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["vllm", *request["arguments"]]
    os.seteuid(request["user"])
    code = 1
    try:
        sys.exit(main())
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int) -> dict:
    end = time.monotonic() + TIME_LIMIT
    ended, status = os.waitpid(pid, os.WNOHANG)
    while not ended and time.monotonic() < end:
        time.sleep(0.02)
        ended, status = os.waitpid(pid, os.WNOHANG)
    left = [member for member in session_members(pid) if member != pid]
    stop_session(pid)
    if not ended:
        _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "hung": not ended, "left": left}


def _serve_requests() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints must not mix with the answers
    for name in WARM:
        importlib.import_module(name)
    from vllm.entrypoints.cli.main import main

    for line in sys.stdin:
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            _child(main, json.loads(line))
        answers.write(json.dumps(_wait(pid)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve_requests()
