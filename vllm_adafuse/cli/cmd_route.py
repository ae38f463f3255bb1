"""`vllm-adafuse route`: which experts each token of a text uses."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_adafuse.cli.colors import terminal_style
from vllm_adafuse.cli.common import (
    ADAPTER_HELP,
    BASE_HELP,
    add_example,
    console,
    open_adapter,
    share,
    usable,
)
from vllm_adafuse.cli.tokens import (
    RoutedToken,
    describe,
    first_choices,
    route_ids,
    route_text,
    settling,
)
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.text import printable, visible

if TYPE_CHECKING:
    from rich.console import Console
    from vllm_adafuse.format.adapter import Adapter

# Experts of a span that a terminal shows, those with most first.
SHOWN = 4

DESCRIPTION = """\
Shows which experts each token of a text uses. AdaFuse decides once per token, from its embedding
and, with `router.context`, from those of the tokens before it, so this needs the backbone's
tokenizer, embedding and first norm, and no GPU. Adapters whose routers read hidden states of later
layers are refused. Where routers see the past, it also shows how the request settles: each expert's
share of the weights among its first tokens, and later. Weights are the router's, before LoRA's scale
alpha / r. In the text, · is a space, ↵ a newline, → a tab.

With --answer it tells of a request that was served: of its very tokens, prompt and answer.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "route", help="colour a text by the experts of its tokens", description=DESCRIPTION
    )
    add_example(parser, '  vllm-adafuse route ./adapter --text "def add(a, b):" --html route.html')
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help=ADAPTER_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text")
    source.add_argument("--file", metavar="FILE", help="a UTF-8 file with the text; - for stdin")
    source.add_argument(
        "--answer", metavar="FILE",
        help="what a server answered to a request with \"return_token_ids\": true; - for stdin",
    )  # fmt: skip
    parser.add_argument("--base", help=BASE_HELP)
    parser.add_argument("--html", metavar="FILE", help="also write a standalone page")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Routes the text, then prints it in colours or as JSON, and writes the page."""
    from vllm_adafuse.format.backbone import require_safetensors

    answered = _answered(args) if args.answer else None
    text = _read(args) if answered is None else ""
    opened = open_adapter(args.adapter, args.base)
    adapter = usable(args.adapter, opened)
    if opened.base is None:
        raise AdapterError(
            f"adapter {args.adapter}",
            [
                f"routes need the embedding and the tokenizer of its backbone "
                f"{adapter.config.base_model}, which is not on this machine; name it with --base"
            ],
        )
    require_safetensors(str(opened.base), "route")
    if answered is None:
        tokens = route_text(adapter, opened.base, text)
    else:
        tokens = route_ids(adapter, opened.base, answered)
        text = "".join(token.text for token in tokens)
    if args.html:
        _write_page(Path(args.html), adapter, opened.base, tokens)
    if args.json:
        print(json.dumps(_report(adapter, opened.base, text, tokens), indent=2))
    else:
        _show(adapter, tokens)
    return 0


def _answered(args: argparse.Namespace) -> list[int]:
    """Token ids of the request that --answer is of."""
    try:
        answer = json.loads(_read(args))
        (choice,) = answer["choices"]
        prompt = choice.get("prompt_token_ids") or answer["prompt_token_ids"]  # of a chat
        ids = [*prompt, *choice["token_ids"]]
        if not all(type(token) is int and 0 <= token < 1 << 31 for token in ids):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise AdapterError(
            f"answer {args.answer}",
            [
                "is not one answer of /v1/completions or /v1/chat/completions with the ids of its "
                'tokens; ask with "return_token_ids": true, without "stream", "n" or a list of prompts'
            ],
        ) from e
    return ids


def _read(args: argparse.Namespace) -> str:
    file = args.file or args.answer
    try:
        if file is None:
            args.text.encode("utf-8")  # a shell may hand over any bytes
            return args.text
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except UnicodeError as e:
        where = file or "--text"
        raise AdapterError(f"text of {where}", [f"it is not UTF-8 ({e}); convert it first"]) from e


def _write_page(file: Path, adapter: Adapter, base: Path, tokens: list[RoutedToken]) -> None:
    from vllm_adafuse.cli.page import render_page

    config = adapter.config
    facts = (
        f"{len(tokens)} tokens, coloured by their first expert. {config.num_experts} experts, "
        f"top-{config.top_k}. Backbone {base}"
    )
    spans = settling(tokens, config.num_experts) if config.router_context else []
    title = f"Routes of {adapter.path.name}"
    page = render_page(title, facts, config.expert_names, tokens, spans)
    file.write_text(page, "utf-8")
    print(printable(f"wrote {file}"), file=sys.stderr)


def _report(adapter: Adapter, base: Path, text: str, tokens: list[RoutedToken]) -> dict:
    config, names = adapter.config, adapter.config.expert_names
    spans = settling(tokens, config.num_experts) if config.router_context else None
    return {
        "adapter": str(adapter.path),
        "base": str(base),
        "text": text,
        "tokens": [
            {
                "id": token.id,
                "text": token.text,
                "experts": [
                    {"expert": e, "name": names[e], "weight": weight}
                    for e, weight in token.experts
                ],
            }
            for token in tokens
        ],
    } | ({} if spans is None else {"settling": [vars(span) for span in spans]})


def _show(adapter: Adapter, tokens: list[RoutedToken]) -> None:
    from rich.table import Table
    from rich.text import Text

    names, out = adapter.config.expert_names, console()
    coloured = Text(overflow="fold")
    for token in tokens:
        coloured.append(visible(token.text, breaks=True), terminal_style(token.first))
    out.print(coloured)
    out.print()

    counts = first_choices(tokens)
    legend, line = Text("first expert: "), len("first expert: ")
    for expert, count in counts.items():
        entry = Text().append(f" {printable(names[expert])} ", terminal_style(expert))
        entry.append(f" {share(count / len(tokens))}  ")
        if line + entry.cell_len > out.width:  # a name and its share stay on one line
            legend.append("\n")
            line = 0
        legend.append_text(entry)
        line += entry.cell_len
    if rest := len(names) - len(counts):
        legend.append(f"({rest} of {len(names)} experts are no token's first)")
    out.print(legend)
    out.print()
    if adapter.config.router_context:
        _show_settling(adapter, tokens, out)

    table = Table(box=None, pad_edge=False)
    table.add_column("#", justify="right")
    table.add_column("token", overflow="fold")
    table.add_column("id", justify="right")
    table.add_column("experts and weights", overflow="fold")
    for place, token in enumerate(tokens):
        shown = Text(visible(token.text), terminal_style(token.first))
        table.add_row(str(place), shown, str(token.id), Text(describe(token, names)))
    out.print(table)


def _show_settling(adapter: Adapter, tokens: list[RoutedToken], out: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    names = adapter.config.expert_names
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", justify="right")
    table.add_column("shares of the weights", overflow="fold")
    for span in settling(tokens, len(names)):
        most = sorted(range(len(names)), key=lambda e: -span.shares[e])[:SHOWN]
        shown = ", ".join(f"{printable(names[e])} {share(span.shares[e])}" for e in most)
        table.add_row(f"{span.first}-{span.last}", Text(shown))
    out.print("how the request settles")
    out.print(table)
    out.print()
