"""`vllm-adafuse playground`: a local page that colours a server's tokens as they stream."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vllm_adafuse.cli.common import BASE_HELP, add_example
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.text import printable

DESCRIPTION = """\
Serves a page on this machine that asks a running vLLM server and shows its tokens as they stream,
each in the colour of its first expert, with a legend; tokens of the base and of plain LoRAs stay
plain. Routes follow from token ids (with `router.context` from all of a request's), so they are
computed here, from the adapter's files: those that /v1/models names, or --adapter.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "playground", help="a page with a server's tokens by expert", description=DESCRIPTION
    )
    add_example(parser, "  vllm-adafuse playground http://localhost:8000")
    parser.add_argument("url", metavar="URL", help="root of the server")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=DIR",
        help="directory of the model NAME, where /v1/models does not say it: a composed checkpoint, "
        "--hf-overrides, a server on another machine",
    )  # fmt: skip
    parser.add_argument("--base", help=BASE_HELP)
    parser.add_argument("--port", type=int, default=8500, help="default 8500; 0 for a free one")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves until it is interrupted."""
    from vllm_adafuse.playground.routes import Upstream
    from vllm_adafuse.playground.server import Playground

    if not args.url.startswith(("http://", "https://")):
        raise AdapterError(
            f"playground {args.url}", ["the URL begins with neither http:// nor https://"]
        )
    adapters = {}
    for named in args.adapter:
        name, equals, path = named.partition("=")
        if not (name and equals and path):
            raise AdapterError(f"--adapter {named}", ["expected NAME=DIR"])
        adapters[name] = Path(path)
    upstream = Upstream(args.url, adapters, args.base, os.environ.get("OPENAI_API_KEY", ""))
    with Playground((args.host, args.port), upstream) as server:
        print(printable(f"{server.url} shows {upstream.url}; Ctrl + C ends it"), flush=True)
        server.serve_forever()
    return 0
