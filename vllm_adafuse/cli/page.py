"""A text coloured by expert as one standalone HTML page: no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vllm_adafuse.cli.colors import hue, level
from vllm_adafuse.cli.common import share
from vllm_adafuse.cli.tokens import RoutedToken, Span, describe, first_choices
from vllm_adafuse.text import printable, visible

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1a1a1a; --soft: #666; --line: #ddd;
  --light: 82%; --step: 6%; --sat: 70%; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #eee; --soft: #a0a4ab;
  --line: #3a3d44; --light: 26%; --step: 6%; --sat: 55%; } }
body { font: 16px/1.6 system-ui, sans-serif; margin: 2rem auto 6rem; max-width: 60rem;
  padding: 0 1rem; background: var(--page); color: var(--ink); }
h1 { font-size: 1.4rem; margin: 0; }
.facts, .rest { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.e { background: hsl(var(--h) var(--sat) calc(var(--light) + var(--s) * var(--step)));
  border-radius: 3px; }
.text { font: 15px/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid var(--line); border-radius: 6px; padding: 1rem; }
.text .e { padding: .15em 0; box-shadow: inset 1px 0 var(--page); }
.text .e:hover { outline: 2px solid var(--ink); }
.text .e:hover::after { content: attr(data-tip); position: fixed; left: 1rem; right: 1rem;
  bottom: 1rem; padding: .6rem 1rem; background: var(--ink); color: var(--page);
  border-radius: 6px; font: 15px/1.5 system-ui, sans-serif; z-index: 1; }
.w { opacity: .45; }
.legend { display: flex; flex-wrap: wrap; gap: .5rem; padding: 0; list-style: none; }
.legend .e { padding: .1rem .6rem; font-size: .9rem; overflow-wrap: anywhere; }
.bars { width: 100%; margin-bottom: 1.2rem; }
.bars td:first-child { width: 6rem; }
.bar { display: flex; padding: .15rem 0; }
.bar .e { height: 1.2rem; border-radius: 0; }
details { margin-top: 1.2rem; }
summary { cursor: pointer; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--soft); }
td code { white-space: pre-wrap; padding: 0 .2em; }
"""


def render_page(
    title: str, facts: str, names: tuple[str, ...], tokens: list[RoutedToken],
    spans: Sequence[Span] = (),
) -> str:  # fmt: skip
    """The page.

    Args:
        title: its heading.
        facts: one line under it.
        names: of all experts.
        tokens: the text.
        spans: how the request settles, drawn as bars; none where routes see no past.

    Returns:
        HTML; everything given is escaped.
    """
    counts = first_choices(tokens)
    rules = "".join(
        f".e{e} {{ --h: {hue(e)}; --s: {level(e)}; }}\n"
        # Pointing at an expert in the legend fades the tokens of the others.
        f"body:has(.legend .e{e}:hover) .text .e:not(.e{e}) {{ opacity: .25; }}\n"
        for e in {*counts, *(e for span in spans for e, part in enumerate(span.shares) if part)}
    )
    legend = "".join(
        f'<li class="e e{e}">{escape(printable(names[e]))} · '
        f"{share(count / len(tokens))}</li>\n"
        for e, count in counts.items()
    )
    rest = len(names) - len(counts)
    text = "<wbr>".join(_span(token, names) for token in tokens)
    rows = "".join(
        f'<tr><td>{place}</td><td><code class="e e{token.first}">'
        f"{escape(visible(token.text))}</code></td><td>{token.id}</td>"
        f"<td>{escape(describe(token, names))}</td></tr>\n"
        for place, token in enumerate(tokens)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(printable(title))}</title>
<style>{STYLE}{rules}</style>
</head>
<body>
<h1>{escape(printable(title))}</h1>
<p class="facts">{escape(printable(facts))}</p>
<ul class="legend">
{legend}</ul>
<p class="rest">{rest_sentence(rest)} Point at a token to see its experts and weights.</p>
{_bars(spans, names)}<div class="text">{text}</div>
<details>
<summary>All {len(tokens)} tokens</summary>
<table>
<tr><th>#</th><th>token</th><th>id</th><th>experts and weights</th></tr>
{rows}</table>
</details>
</body>
</html>
"""


def _bars(spans: Sequence[Span], names: tuple[str, ...]) -> str:
    """The picture of how a request settles: a bar for each span, cut by the experts' shares."""
    if not spans:
        return ""
    rows = ""
    for span in spans:
        parts = "".join(
            f'<span class="e e{e}" style="width:{100 * part:.2f}%" '
            f'title="{escape(printable(names[e]))} {share(part)}"></span>'
            for e, part in enumerate(span.shares)
            if part
        )
        rows += f'<tr><td>{span.first}-{span.last}</td><td class="bar">{parts}</td></tr>\n'
    return (
        '<p class="facts">How the request settles: the experts\' shares of the weights, from its '
        f'first tokens on</p>\n<table class="bars">\n{rows}</table>\n'
    )


def rest_sentence(rest: int) -> str:
    """What the legend leaves out."""
    if rest == 0:
        return "Every expert is the first choice of some token."
    return f"{rest} more {'expert is' if rest == 1 else 'experts are'} no token's first choice."


def _span(token: RoutedToken, names: tuple[str, ...]) -> str:
    tip = f"{visible(token.text)} (id {token.id}): {describe(token, names)}"
    shown = escape(visible(token.text, breaks=True))
    for sign in "·↵→":
        shown = shown.replace(sign, f'<span class="w">{sign}</span>')
    return f'<span class="e e{token.first}" data-tip="{escape(tip)}">{shown}</span>'
