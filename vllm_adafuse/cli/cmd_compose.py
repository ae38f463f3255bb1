"""`vllm-adafuse compose`: one checkpoint directory from a backbone and an adapter."""

from __future__ import annotations

import argparse

from vllm_adafuse.cli.common import ADAPTER_HELP, add_example
from vllm_adafuse.format.places import require_backbone
from vllm_adafuse.text import printable

DESCRIPTION = """\
Makes a checkpoint directory of a backbone with an adapter, which `vllm serve` takes as it is.
The backbone's files are linked (no disk space; do not edit them in place), the adapter goes
to COMPOSED_DIR/adafuse. Plain transformers still loads the directory, as the bare backbone.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "compose", help="pack backbone and adapter for `vllm serve`", description=DESCRIPTION
    )
    add_example(
        parser,
        "  vllm-adafuse compose ./Llama-2-7b-hf ./adapter ./composed\n  vllm serve ./composed",
    )
    parser.add_argument("base", metavar="BASE", help="the backbone: a directory or a cached name")
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help=ADAPTER_HELP)
    parser.add_argument("out", metavar="COMPOSED_DIR", help="the directory to make")
    parser.add_argument(
        "--copy", action="store_true", help="copy files, so that the directory can travel"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Composes and prints the command that serves the result."""
    from vllm_adafuse.format.compose import compose

    out = compose(require_backbone(args.base), args.adapter, args.out, args.copy, progress=True)
    print(printable(f"composed {out}; serve it with: vllm serve {out}"))
    return 0
