"""Headless Chromium, driven by its own protocol, where it is on this machine."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
PATIENCE = 60.0


class Page:
    """A page that is open."""

    def __init__(self, socket):
        self.socket, self.number = socket, 0

    def command(self, method: str, **params):
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (answer := json.loads(self.socket.recv(PATIENCE))).get("id") != self.number:
            continue
        assert "error" not in answer, answer
        return answer["result"]

    def js(self, expression: str):
        """The value of an expression, awaited."""
        told = self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    def until(self, expression: str):
        """Waits for an expression to be true; its value."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.js(expression)):
            assert time.monotonic() < deadline, expression
            time.sleep(0.05)
        return value

    def screenshot(self, file: Path) -> None:
        shot = self.command("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def opened(url: str, scratch: Path, width: int = 1000, height: int = 900):
    """A page of a browser of its own."""
    from websockets.sync.client import connect

    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--hide-scrollbars", "--remote-debugging-port=0",
        f"--user-data-dir={scratch}/user", f"--window-size={width},{height}", "about:blank",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        told, deadline = scratch / "user" / "DevToolsActivePort", time.monotonic() + PATIENCE
        targets = []
        while not targets:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
            if told.is_file() and len(lines := told.read_text().split()) == 2:
                direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
                with direct.open(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                    targets = [t for t in json.loads(answer.read()) if t["type"] == "page"]
        with connect(targets[0]["webSocketDebuggerUrl"], max_size=None, proxy=None) as socket:
            page = Page(socket)
            page.command("Page.navigate", url=url)  # answers once the page is another
            page.until("document.readyState === 'complete'")
            yield page
    finally:
        process.kill()
        process.wait()
