"""`vllm-adafuse check`: every fault of an adapter, without serving it."""

from __future__ import annotations

import argparse
import sys

from vllm_adafuse.cli.common import (
    ADAPTER_HELP,
    BASE_HELP,
    Opened,
    add_example,
    open_adapter,
    printable,
)

DESCRIPTION = """\
Checks an adapter directory as serving does, and lists every problem, one per line: keys of
adapter_config.json, names and shapes of tensors, NaN and Inf, and the fit with the backbone. Warns
of values that are finite and whose products are not. Exit code 0: usable. 1: problems.
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
    for warning in _warnings(opened):
        print(printable(f"warning: {warning}"))
    config = adapter.config
    print(
        printable(
            f"ok: {args.adapter}: {config.num_experts} experts, top-{config.top_k}, "
            f"{len(adapter.projections)} projections, {len(adapter.tensors)} tensors"
        )
    )
    return 0


def _warnings(opened: Opened) -> list[str]:
    """What overflows in the backbone's dtype."""
    import torch
    from vllm_adafuse.overflow import overflow_warnings
    from vllm_adafuse.pretrained import read_config

    dtype = read_config(str(opened.base)).dtype if opened.base else None
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    known = isinstance(named, torch.dtype) and named.is_floating_point
    return overflow_warnings(opened.adapter, named if known else None)
