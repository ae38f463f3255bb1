"""A real `vllm serve` process for as long as a `with` block lasts: for the demo and the tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# Seconds that a server's other processes may take to follow its front end.
GROUP_PATIENCE = 5.0
# Our own server on loopback: a proxy named in the environment has no part in it.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: its root, without a slash at the end ("http://127.0.0.1:40123").
        process: its front-end process.
        log: the file that takes its stdout and stderr.
    """

    url: str
    process: subprocess.Popen
    log: Path

    @property
    def api(self) -> str:
        """`base_url` of an OpenAI client."""
        return f"{self.url}/v1"

    def healthy(self) -> bool:
        """Whether it runs and /health answers."""
        if self.process.poll() is not None:
            return False
        try:
            with _DIRECT.open(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False


class ServerError(RuntimeError):
    """A server that did not come up; the message ends with the last lines of its log.

    Attributes:
        returncode: of the process that ended by itself, else None.
        log: the log file.
    """

    def __init__(self, message: str, log: Path, returncode: int | None = None):
        super().__init__(f"{message}; the end of {log}:\n{log_tail(log)}")
        self.returncode, self.log = returncode, log


def free_port() -> int:
    """A port of the loopback interface that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def log_tail(log: Path, lines: int = 25) -> str:
    """The last lines of a log file."""
    return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-lines:])


def vllm_serve(model: str | Path, *options: str) -> list[str]:
    """The command `vllm serve MODEL …` of this Python environment.

    Args:
        model: backbone or composed directory.
        *options: further arguments.
    """
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), *options]


@contextlib.contextmanager
def running_server(
    argv: Sequence[str],
    log: str | Path,
    timeout: float = 300.0,
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """`started_server`, once it is healthy.

    Args:
        argv, log, env: as there.
        timeout: seconds that it may take to become healthy.

    Yields:
        The healthy server.

    Raises:
        ServerError: it ended, or was not healthy in time.
    """
    with started_server(argv, log, env) as server:
        wait_until_healthy(server, timeout)
        yield server


@contextlib.contextmanager
def started_server(
    argv: Sequence[str], log: str | Path, env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """Starts a server on a free loopback port, stops it at the end.

    Args:
        argv: a command from `vllm_serve`; --host and --port are added.
        log: the file for its output, overwritten.
        env: variables to set over this process's own.

    Yields:
        The server, which answers nobody yet: `wait_until_healthy`.
    """
    port, log = free_port(), Path(log)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*argv, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # a group of its own: engine processes are stopped with it
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", process, log)
    finally:
        stop(process)


def wait_until_healthy(server: Server, timeout: float) -> None:
    """Waits for /health, at most `timeout` seconds.

    Raises:
        ServerError: the server ended, or was not healthy in time.
    """
    deadline = time.monotonic() + timeout
    while not server.healthy():
        if (code := server.process.poll()) is not None:
            raise ServerError(f"the server ended with exit code {code}", server.log, code)
        if time.monotonic() > deadline:
            raise ServerError(f"the server was not healthy after {timeout:.0f} s", server.log)
        time.sleep(0.25)


def stop(process: subprocess.Popen, patience: float = 20.0) -> int:
    """Interrupts a process that leads a group; after `patience` seconds kills the group.

    Returns:
        Its exit code.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    # Engine processes may outlive a front end that crashed or was killed.
    deadline = time.monotonic() + GROUP_PATIENCE
    with contextlib.suppress(ProcessLookupError):
        while process.poll() is not None and time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
