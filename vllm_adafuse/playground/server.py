"""Serves the playground's page on this machine, and passes on what it asks of a vLLM server."""

from __future__ import annotations

import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from vllm_adafuse.cli.page import STYLE
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.playground.routes import Upstream

PAGE = Path(__file__).with_name("page.html")
LARGEST = 1 << 20  # bytes of a request
LOOPBACK = "127.0.0.1", "localhost", "[::1]"
KINDS: dict[str, type | tuple[type, ...]] = {
    "model": str, "text": str, "max_tokens": int, "temperature": (int, float), "chat": bool,
}  # fmt: skip


class Playground(ThreadingHTTPServer):
    """Serves until `shutdown`.

    Args:
        address: host and port, 0 for a free one.
        upstream: the server that it asks.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], upstream: Upstream):
        self.upstream, self.host = upstream, address[0]
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{self.host}:{self.server_address[1]}/"


class _Refused(ValueError):
    """A request of the page's that makes no sense; the message is for its reader."""


class _Handler(BaseHTTPRequestHandler):
    server: Playground

    def do_GET(self) -> None:
        if self.path == "/":
            page = PAGE.read_text("utf-8").replace("/*STYLE*/", STYLE)
            self._send(200, page.encode(), "text/html; charset=utf-8")
        elif self.path == "/models":
            try:
                told = {"url": self.server.upstream.url, "models": self.server.upstream.models()}
                self._send_json(200, told)
            except ConnectionError as e:
                self._send_json(502, {"error": str(e)})
        else:
            self._send_json(404, {"error": f"{self.path} is no page of this playground"})

    def do_POST(self) -> None:
        # A page of another site may send requests here, but not without saying whose it is; one
        # whose name now leads to this machine says so in `Host`.
        origin, host = self.headers.get("Origin"), self.headers.get("Host", "")
        foreign = self.server.host in LOOPBACK and re.sub(r":\d+$", "", host) not in LOOPBACK
        if origin is not None and (foreign or origin != f"http://{host}"):
            return self._send_json(403, {"error": f"a page of {origin} may not ask this one"})
        if self.path != "/generate":
            return self._send_json(404, {"error": f"{self.path} is no page of this playground"})
        try:
            asked = self._asked()
        except _Refused as e:
            return self._send_json(400, {"error": str(e)})
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        try:
            for part in self.server.upstream.generate(asked):
                self._line(part)
        except (BrokenPipeError, ConnectionResetError):
            return  # the reader has gone; leaving the stream ends the server's work too
        except (ConnectionError, AdapterError) as e:
            self._line({"error": str(e)})

    def _asked(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            raise _Refused(f"a request has a length of at most {LARGEST} bytes, found {length!r}")
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except ValueError as e:
            raise _Refused(f"the request is no JSON: {e}") from e
        for key, kind in KINDS.items():
            if not isinstance(asked, dict) or not isinstance(asked.get(key), kind):
                raise _Refused(f"the request's `{key}` is missing or of another kind")
        return asked

    def _line(self, part: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(part).encode() + b"\n")
        self.wfile.flush()

    def _send_json(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        # Nothing but what is on this page runs or is fetched.
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
            "connect-src 'self'; img-src data:",
        )
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the terminal shows the address alone."""
