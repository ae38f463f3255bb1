"""`vllm-adafuse distill`: a pre-gated adapter from a layer-wise one (MixLoRA, MoLA, …)."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_adafuse.cli.common import (
    ADAPTER_HELP,
    BASE_HELP,
    add_context,
    add_example,
    open_adapter,
    usable,
)
from vllm_adafuse.cli.parser import COUNT
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.config import ROUTER_INPUTS
from vllm_adafuse.format.places import output_problem
from vllm_adafuse.text import printable

DESCRIPTION = """\
Makes a pre-gated adapter of one that has a router in every layer. The experts are kept; those of
different layers that work for the same tokens get the same number; one router at the entrance
learns to choose as the old ones did, from the teacher's next-token distributions. No labels are
needed, only texts like those that will be served, as jsonl (see `vllm-adafuse train --help`).

It says what was lost: the divergence from the teacher on held-out text, and the perplexity of
teacher, student and backbone.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "distill", help="a pre-gated adapter from a layer-wise one", description=DESCRIPTION
    )
    add_example(
        parser,
        "  vllm-adafuse convert ./mixlora ./layer-wise\n"
        "  vllm-adafuse distill ./layer-wise --data texts.jsonl --output ./adapter --tune-experts",
    )
    add = parser.add_argument
    add("teacher", metavar="ADAPTER_DIR", help=f"the layer-wise adapter: {ADAPTER_HELP}")
    add("--base", help=BASE_HELP)
    add("--data", required=True, action="append", metavar="FILE.jsonl", help="texts")
    add("--output", required=True, metavar="DIR", help="the adapter directory to make")
    add("--top-k", type=COUNT, metavar="K", help="experts per token (the teacher's largest)")
    add("--router-layer", type=int, default=0, metavar="M",
        help="decide on entering layer M, which sees context if M > 0; the teacher's experts below "
        "M are left out (default 0)")  # fmt: skip
    add_context(parser)
    add("--router-input", choices=ROUTER_INPUTS, default=ROUTER_INPUTS[0],
        help="what the router reads: the state, or the norm of it")  # fmt: skip
    add("--tune-experts", action="store_true", help="also train the experts: loses less")
    add("--steps", type=COUNT, default=500, metavar="N", help="optimizer steps (default 500)")
    add("--batch-size", type=COUNT, default=8, metavar="N", help="blocks per step (default 8)")
    add("--length", type=COUNT, default=512, metavar="N", help="tokens of a block (default 512)")
    add("--lr", type=float, default=2e-3, help="of the router (default 2e-3)")
    add("--expert-lr", type=float, default=2e-4, help="with --tune-experts (default 2e-4)")
    add("--held-out", type=float, default=0.05, metavar="SHARE", help="lines to judge by")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of the backbone (auto: bfloat16 on a GPU, else float32)")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Distils; prints the table of what was lost."""
    out = Path(args.output)
    if problem := output_problem(out):
        raise AdapterError(f"output directory {out}", [problem])
    opened = open_adapter(args.teacher, args.base, values=True)
    usable(args.teacher, opened)
    if opened.base is None:
        raise AdapterError(f"adapter {args.teacher}", [opened.note])
    layers = opened.backbone.num_layers
    if not 0 <= args.router_layer < layers:
        raise AdapterError(
            "distilling options",
            [f"--router-layer is {args.router_layer}, expected 0 to {layers - 1}, a layer of "
             f"{opened.base}"],
        )  # fmt: skip
    from vllm_adafuse.training.distill import DistillOptions
    from vllm_adafuse.training.distill_run import distil_files

    options = DistillOptions(
        args.steps, args.lr, args.expert_lr if args.tune_experts else 0.0,
        length=args.length, batch_size=args.batch_size, held_out=args.held_out,
    )  # fmt: skip
    taken = "router_layer", "router_input", "router_context", "context_scale", "context_half_life"
    changes = {name: getattr(args, name) for name in taken}
    if args.top_k is not None:
        changes["top_k"] = args.top_k
    report = distil_files(
        opened.adapter, opened.base, args.data, out, options,
        dtype=args.dtype, seed=args.seed, quiet=args.quiet, **changes,
    )  # fmt: skip
    print(f"held out: {report.tokens} tokens")
    print(f"{'':14} perplexity   right next token   KL from the teacher")
    for name, scores, kl in report.rows():
        print(f"{name:14} {scores['perplexity']:10.3f} {100 * scores['accuracy']:16.1f} % "
              f"{kl:19.4f}")  # fmt: skip
    print(printable(f"wrote {out}; look into it with: vllm-adafuse inspect {out}"))
    return 0
