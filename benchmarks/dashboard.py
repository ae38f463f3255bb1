"""The picture of the Grafana dashboard in docs/production.md: every query of deploy/grafana-dashboard.json,
asked of a real Prometheus that scrapes a real server of tiny adapters.

    apt-get install prometheus
    python -m benchmarks.dashboard --minutes 3

What Prometheus answered is drawn, panel for panel, as Grafana lays it out; not its buttons. Where the
rules in deploy/ do not load, or a panel has no data, it fails.
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_adafuse.format.random_adapter import make_random_adapter
from vllm_adafuse.server import free_port, running_server, vllm_serve
from vllm_adafuse.tiny import make_tiny_backbone, real_prompts

from benchmarks.engine import make_lora
from benchmarks.soak_traffic import ask

ROOT = Path(__file__).resolve().parents[1]
BOARD = ROOT / "deploy" / "grafana-dashboard.json"
RULES = ROOT / "deploy" / "prometheus-rules.yaml"
PICTURE = ROOT / "docs" / "plots" / "dashboard.svg"
JOB = "vllm"
SCRAPE, INTERVAL = 1, 15  # seconds between scrapes, and of a rate
POINTS = 40  # of a line


@dataclass
class Panel:
    """A panel as it was answered.

    Attributes:
        title: its own.
        kind: "timeseries" or "table".
        unit: as Grafana names it.
        lines: (legend or cells, [(seconds since the start, value)]).
    """

    title: str
    kind: str
    unit: str
    lines: list[tuple[Any, list[tuple[float, float]]]]


def filled(expression: str, seconds: float) -> str:
    """A query with what Grafana puts for its variables."""
    for name, value in (
        ("$__rate_interval", f"{INTERVAL}s"), ("$__range", f"{int(seconds)}s"), ("$job", ".+"),
    ):  # fmt: skip
        expression = expression.replace(name, value)
    if "$" in expression:
        raise ValueError(f"{expression}: a variable that is not known here")
    return expression


def legend(form: str, labels: dict[str, str]) -> str:
    """What `{{label}}` stand for."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], "") or "(base)", form)


def asked(url: str, board: dict[str, Any], start: float, end: float) -> list[Panel]:
    """All panels from left to right and from top to bottom.

    Args:
        url: of Prometheus.
        board: the dashboard.
        start, end: seconds since the epoch.

    Raises:
        ValueError: a query failed, or a panel has no data.
    """
    panels = []
    for panel in sorted(board["panels"], key=lambda p: (p["gridPos"]["y"], p["gridPos"]["x"])):
        lines = []
        for target in panel["targets"]:
            query = {
                "query": filled(target["expr"], end - start), "start": start, "end": end,
                "step": (end - start) / POINTS,
            }  # fmt: skip
            address = f"{url}/api/v1/query_range?{urllib.parse.urlencode(query)}"
            try:
                with urllib.request.urlopen(address) as answer:
                    found = json.loads(answer.read())["data"]["result"]
            except urllib.error.HTTPError as e:
                raise ValueError(f"{panel['title']}: {e.read().decode()}") from e
            for one in found:
                points = [(at - start, float(value)) for at, value in one["values"]]
                points = [(at, value) for at, value in points if value == value]  # not of 0 / 0
                named = one["metric"] if panel["type"] == "table" else legend(
                    target.get("legendFormat", ""), one["metric"]
                )  # fmt: skip
                if points:
                    lines.append((named, points))
        if not lines:
            raise ValueError(f"{panel['title']}: no data")
        unit = panel["fieldConfig"]["defaults"].get("unit", "short")
        panels.append(Panel(panel["title"], panel["type"], unit, lines))
    return panels


UNITS = {"short": "", "reqps": "requests / s", "ops": "1 / s", "s": "seconds"}
COLOURS = ("#3366cc", "#dc3912", "#e69f00", "#109618", "#990099", "#0099c6", "#dd4477", "#66aa00",
           "#b82e2e", "#316395", "#22aa99", "#6633cc")  # fmt: skip
# Points of a panel, and of its plot from the left and from the top; a letter's width.
WIDTH, HEIGHT, LEFT, TOP, LETTER = 480, 180, 34, 24, 4.7
PLOT = WIDTH - LEFT - 10, 90
STYLE = "text{font:9px sans-serif;fill:#333}.t{font-weight:bold;font-size:10px}path{fill:none}.g{stroke:#ddd}"


def draw(panels: list[Panel], path: Path) -> None:
    """Saves the panels as SVG, two in a line; by hand, since matplotlib's takes five times the bytes."""
    lines = (len(panels) + 1) // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {lines * HEIGHT}">',
        f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
    ]
    for number, panel in enumerate(panels):
        x, y = number % 2 * WIDTH, number // 2 * HEIGHT
        parts.append(f'<g transform="translate({x},{y})">{_text(8, 14, panel.title, "t")}')
        parts += (_table if panel.kind == "table" else _plot)(panel)
        parts.append("</g>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>\n"]), "utf-8")


def _text(x: float, y: float, words: str, kind: str = "", colour: str = "") -> str:
    extra = f' class="{kind}"' * bool(kind) + f' style="fill:{colour}"' * bool(colour)
    return f'<text x="{x:g}" y="{y:g}"{extra}>{html.escape(words)}</text>'


def _plot(panel: Panel) -> list[str]:
    """Axes, a path for each line, and a legend."""
    (width, height), end = PLOT, max(points[-1][0] for _, points in panel.lines)
    top = max(value for _, points in panel.lines for _, value in points) or 1.0
    parts = [f'<path class="g" d="M{LEFT} {TOP + height / 2:g}h{width}M{LEFT} {TOP}h{width}"/>']
    parts.append(f'<path stroke="#999" d="M{LEFT} {TOP}v{height}h{width}"/>')
    parts += [_text(4, TOP + 3 + height * (1 - part), f"{top * part:.3g}") for part in (0, 0.5, 1)]
    parts.append(_text(LEFT + width - 60, TOP + height + 11, f"{end:.0f} seconds"))
    parts.append(_text(LEFT + 4, TOP + 9, UNITS[panel.unit]))
    x, y = float(LEFT), TOP + height + 22
    for number, (name, points) in enumerate(panel.lines):
        colour = COLOURS[number % len(COLOURS)]
        at = [(LEFT + width * t / end, TOP + height * (1 - value / top)) for t, value in points]
        path = "L".join(f"{a:.0f} {b:.0f}" for a, b in _bends([(round(a), round(b)) for a, b in at]))
        parts.append(f'<path stroke="{colour}" d="M{path}"/>')
        if x + LETTER * len(name) > WIDTH:
            x, y = float(LEFT), y + 11
        parts.append(_text(round(x), y, name, colour=colour))
        x += LETTER * (len(name) + 3)
    return parts


def _bends(points: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without the points that lie on the way of the others."""
    kept = points[:1]
    for before, point, after in zip(points, points[1:], points[2:]):
        straight = (point[0] - before[0]) * (after[1] - point[1])
        if straight != (after[0] - point[0]) * (point[1] - before[1]):
            kept.append(point)
    return kept + points[1:][-1:]


def _table(panel: Panel) -> list[str]:
    """What was there at the end."""
    last = max(points[-1][0] for _, points in panel.lines)
    names = ["adapter", "kind", "content"]
    rows = [
        [labels.get(name, "")[:12] for name in names]
        for labels, points in panel.lines
        if points[-1][0] == last
    ]
    return [
        _text(8 + 100 * column, TOP + 10 + 13 * line, cell, "t" * (line == 0))
        for line, row in enumerate([names, *sorted(rows)])
        for column, cell in enumerate(row)
    ]


@contextmanager
def prometheus(target: str, root: Path) -> Iterator[str]:
    """A Prometheus that scrapes a server and has our rules; its URL.

    Args:
        target: host and port.
        root: folder for its files.

    Raises:
        RuntimeError: it is not installed, or does not start.
    """
    if (program := shutil.which("prometheus")) is None:
        raise RuntimeError("prometheus is not on the PATH: apt-get install prometheus")
    config = {
        "global": {"scrape_interval": f"{SCRAPE}s", "evaluation_interval": f"{SCRAPE}s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": JOB, "static_configs": [{"targets": [target]}]}],
    }
    (root / "prometheus.yaml").write_text(json.dumps(config))  # which is YAML, too
    address = f"127.0.0.1:{free_port()}"
    command = [
        program, f"--config.file={root / 'prometheus.yaml'}", f"--storage.tsdb.path={root / 'tsdb'}",
        f"--web.listen-address={address}",
    ]  # fmt: skip
    with (root / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(f"http://{address}/-/ready", process, root / "prometheus.log")
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"prometheus does not start: {log.read_text()[-600:]}") from None
            time.sleep(0.2)


def traffic(url: str, root: Path, names: list[str], end: float) -> None:
    """Requests of all adapters, more and more of the last; two that come and go; one that is refused."""
    prompts, start = real_prompts(12), time.monotonic()

    def requests(seed: int) -> None:
        draw_of = random.Random(seed)
        while (now := time.monotonic()) < end:
            late = (now - start) / (end - start)
            name = draw_of.choices(names, [1 + late * i for i in range(len(names))])[0]
            body = {"model": name, "prompt": draw_of.choice(prompts), "max_tokens": draw_of.randrange(8, 60)}
            ask(url, "/v1/completions", body)
            time.sleep(draw_of.random() * 0.3)

    def changes() -> None:
        for turn in range(1 << 20):
            for name in ("guest", "other"):
                load = {"lora_name": name, "lora_path": str(root / name)}
                ask(url, "/v1/load_lora_adapter", load)
                ask(url, "/v1/completions", {"model": name, "prompt": "a", "max_tokens": 4})
                if turn % 3 == 1:
                    ask(url, "/v1/load_lora_adapter", {"lora_name": "none", "lora_path": str(root / "none")})
                time.sleep(2)
                ask(url, "/v1/unload_lora_adapter", {"lora_name": name})
                if time.monotonic() > end:
                    return

    threads = [threading.Thread(target=requests, args=(seed,)) for seed in range(3)]
    threads.append(threading.Thread(target=changes))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def record(minutes: float, root: Path) -> list[Panel]:
    """What the dashboard shows after some minutes of traffic on a server of its own."""
    base = make_tiny_backbone(root / "base")
    make_random_adapter(base, root / "code", num_experts=5, top_k=2, r=8)
    make_random_adapter(base, root / "prose", num_experts=3, top_k=1, r=16, router_context="mean", seed=1)
    for name, rank in (("law", 8), ("guest", 64), ("other", 48)):
        make_lora(base, root / name, rank)
    names = ["base", "law", "prose", "code"]
    options = (
        "--enforce-eager --dtype float32 --max-model-len 512 --gpu-memory-utilization 0.2 "
        "--served-model-name base --enable-lora --max-loras 3 --max-lora-rank 64 --max-cpu-loras 4"
    )
    modules = [f"{name}={root / name}" for name in names[1:]]
    command = vllm_serve(base, *options.split(), "--lora-modules", *modules)
    env = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with running_server(command, root / "serve.log", 600, env) as server:
        with prometheus(server.url.removeprefix("http://"), root) as url:
            time.sleep(3 * SCRAPE)
            start = time.time()
            traffic(server.url, root, names, time.monotonic() + 60 * minutes)
            return asked(url, json.loads(BOARD.read_text("utf-8")), start, time.time())


def main(argv: list[str] | None = None) -> int:
    """Runs it; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="of traffic")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture")
    parser.add_argument(
        "--answers", type=Path, metavar="FILE",
        help="where to leave what Prometheus answered; if it is there, it is drawn and nothing is started",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if options.answers and options.answers.exists():
        panels = [Panel(**one) for one in json.loads(options.answers.read_text("utf-8"))]
    else:
        with tempfile.TemporaryDirectory() as scratch:
            panels = record(options.minutes, Path(scratch))
    if options.answers:
        options.answers.write_text(json.dumps([asdict(panel) for panel in panels]), "utf-8")
    draw(panels, options.out)
    print(json.dumps({"saved": str(options.out), "bytes": options.out.stat().st_size}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
