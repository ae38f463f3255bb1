"""The separability of domains as a picture: a standalone HTML page, or a PNG."""

from __future__ import annotations

from html import escape
from pathlib import Path

from vllm_adafuse.errors import AdapterError
from vllm_adafuse.experts.samples import WINDOW
from vllm_adafuse.experts.separability import Separability, shares_of

SUFFIXES = (".html", ".png")
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #666; --heat: 30, 90, 180; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #eee; --soft: #a0a4ab;
  --heat: 110, 165, 255; } }
body { font: 16px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem;
  background: var(--page); color: var(--ink); }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 0 0 .5rem; }
.maps { display: flex; flex-wrap: wrap; gap: 2.5rem; margin: 1.5rem 0; }
table { border-collapse: separate; border-spacing: 2px; font-size: .9rem; }
th { font-weight: normal; color: var(--soft); padding: .2rem .5rem; text-align: right; }
td { padding: .5rem .8rem; text-align: right; border-radius: 4px; min-width: 3.5rem;
  background: rgba(var(--heat), calc(var(--v) * .65)); }
td.own { outline: 1.5px solid var(--ink); }
.soft { color: var(--soft); font-size: .9rem; max-width: 19rem; }
dt { font-weight: 600; } dd { margin: 0 0 .6rem; }
code { background: rgba(var(--heat), .15); border-radius: 3px; padding: 0 .3em; white-space: pre; }
"""


def check_suffix(path: Path) -> None:
    """Refuses a report that cannot be drawn, before the long work.

    Raises:
        AdapterError: another suffix than .html and .png, or no matplotlib for a PNG.
    """
    if path.suffix not in SUFFIXES:
        raise AdapterError(
            f"report {path}", [f"its name ends in {path.suffix!r}, expected .html or .png"]
        )
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError as e:
            raise AdapterError(
                f"report {path}",
                ["a PNG needs matplotlib, which is not installed; install it or name an .html"],
            ) from e


def write_report(path: Path, found: Separability, telling: list[list[str]]) -> None:
    """Writes the picture; the suffix says which.

    Args:
        path: of the file.
        found: what was measured.
        telling: texts of the tokens that speak for each expert.
    """
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        path.write_text(render_html(found, telling), "utf-8")
    else:
        _write_png(path, found)


def _maps(found: Separability) -> list[tuple[str, str, list[list[float]]]]:
    """Title, explanation and shares of the three maps."""
    return [
        (
            f"Tokens: {found.token_accuracy:.1%} own",
            "Share of a domain's tokens whose first expert is the column's.",
            shares_of(found.tokens),
        ),
        (
            f"Windows of {WINDOW}: {found.window_accuracy:.1%} own",
            "Share of windows that, all tokens taken together, are the column's.",
            shares_of(found.windows),
        ),
        (
            f"Weights: {found.own_weight:.1%} own",
            "Mean weight that a domain's tokens give to the column's expert.",
            found.weights,
        ),
    ]


def render_html(found: Separability, telling: list[list[str]]) -> str:
    """One page without scripts; everything given is escaped."""
    maps = ""
    for title, text, rows in _maps(found):
        head = "".join(f"<th>{escape(name)}</th>" for name in found.names)
        body = ""
        for r, (name, row) in enumerate(zip(found.names, rows)):
            cells = "".join(
                f'<td style="--v:{share:.3f}"{" class=own" if c == r else ""}>{share:.0%}</td>'
                for c, share in enumerate(row)
            )
            body += f"<tr><th>{escape(name)}</th>{cells}</tr>\n"
        maps += (
            f'<div><h2>{escape(title)}</h2><table><tr><th></th>{head}</tr>\n{body}</table>'
            f'<p class="soft">{escape(text)}</p></div>\n'
        )
    words = "".join(
        f"<dt>{escape(name)}</dt><dd>"
        + " ".join(f"<code>{escape(text)}</code>" for text in texts)
        + "</dd>\n"
        for name, texts in zip(found.names, telling)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Separability of {escape(", ".join(found.names))}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Can a router tell these domains apart?</h1>
<p>{escape(found.verdict)} Measured on {sum(map(sum, found.tokens))} tokens of held-out text. Rows
are the text's domain, columns the expert; by chance a cell on the diagonal would have
{1 / len(found.names):.0%}.</p>
<div class="maps">
{maps}</div>
<h2>Tokens that speak for each expert most</h2>
<dl>
{words}</dl>
</body>
</html>
"""


def _write_png(path: Path, found: Separability) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size, maps = len(found.names), _maps(found)
    side = 2.2 + 0.45 * size
    figure = Figure(figsize=(side * len(maps), side + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, _, rows) in zip(figure.subplots(1, len(maps)), maps):
        axes.imshow(rows, vmin=0, vmax=1, cmap="Blues")
        axes.set_title(title, fontsize=11)
        axes.set_xticks(range(size), found.names, rotation=45, ha="right")
        axes.set_yticks(range(size), found.names)
        axes.set_xlabel("expert")
        axes.set_ylabel("text")
        for r, row in enumerate(rows):
            for c, share in enumerate(row):
                color = "white" if share > 0.55 else "black"
                axes.text(c, r, f"{share:.0%}", ha="center", va="center", color=color)
    figure.savefig(path, dpi=150)
