"""`vllm-adafuse merge`: a static checkpoint with chosen experts merged in."""

from __future__ import annotations

import argparse

from vllm_adafuse.cli.cmd_random import NUMBERS
from vllm_adafuse.cli.common import ADAPTER_HELP, BASE_HELP, add_example
from vllm_adafuse.format.places import require_backbone
from vllm_adafuse.text import printable

DESCRIPTION = """\
Writes a checkpoint directory in which the named experts are part of the weights, always on and
with the same share for every token: W + sum of w_e s_e B_e A_e. Any server and plain transformers
load it without this package. Files, index, dtype, tokenizer and config stay the backbone's.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "merge", help="merge experts into a static checkpoint", description=DESCRIPTION
    )
    add_example(
        parser,
        "  vllm-adafuse merge ./adapter --experts code,maths --weights 0.7,0.3 ./merged\n"
        "  vllm serve ./merged",
    )
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help=ADAPTER_HELP)
    parser.add_argument(
        "--experts",
        required=True,
        type=lambda text: text.split(","),
        help="names of `expert_names`, or numbers from 0, with commas",
    )
    parser.add_argument(
        "--weights",
        type=NUMBERS,
        help="one number for each expert; --weights=-0.5,1 where the first is negative (default: "
        "equal ones that sum to 1)",
    )
    parser.add_argument("--base", help=BASE_HELP)
    parser.add_argument("out", metavar="OUT_DIR", help="the directory to make")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Merges and prints what was merged, and the command that serves the result."""
    from vllm_adafuse.cli.common import open_adapter, usable
    from vllm_adafuse.format.merge import Choice, merge

    opened = open_adapter(args.adapter, args.base)
    adapter = usable(args.adapter, opened)
    base = opened.base or require_backbone(adapter.config.base_path(adapter.path), option="--base")
    choice = Choice.of(adapter, args.experts, args.weights)
    out = merge(adapter.path, base, args.out, args.experts, args.weights, progress=True)
    names = adapter.config.expert_names
    parts = [f"{w:g} {names[e]}" for e, w in zip(choice.experts, choice.weights)]
    print(printable(f"merged {' + '.join(parts)} into {out}; serve it with: vllm serve {out}"))
    return 0
