"""`vllm-adafuse check`: every fault of an adapter, without serving it."""

from __future__ import annotations

import argparse
import sys

from vllm_adafuse.cli.common import ADAPTER_HELP, BASE_HELP, add_example, open_adapter, printable

DESCRIPTION = """\
Checks an adapter directory as serving does, and lists every problem, one per line: keys of
adapter_config.json, names and shapes of tensors, NaN and Inf, and the fit with the backbone.
Exit code 0: usable. 1: problems.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "check", help="list every fault of an adapter", description=DESCRIPTION
    )
    add_example(parser, "  vllm-adafuse check ./adapter --base ./Llama-2-7b-hf")
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help=ADAPTER_HELP)
    parser.add_argument("--base", help=BASE_HELP)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints problems or `ok …` on stdout, the choice of the backbone on stderr."""
    opened = open_adapter(args.adapter, args.base, values=True)
    print(printable(opened.note), file=sys.stderr)
    for problem in opened.problems:
        print(printable(problem))
    if opened.problems:
        return 1
    adapter = opened.adapter
    config = adapter.config
    print(
        printable(
            f"ok: {args.adapter}: {config.num_experts} experts, top-{config.top_k}, "
            f"{len(adapter.projections)} projections, {len(adapter.tensors)} tensors"
        )
    )
    return 0
