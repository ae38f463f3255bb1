"""`vllm-adafuse compose-experts`: one mixture of several LoRAs."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_adafuse.cli.common import add_example
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.config import ROUTER_INPUTS
from vllm_adafuse.text import printable

DESCRIPTION = """\
Makes one adapter of several plain PEFT LoRAs: each becomes an expert, and a router at the model's
entrance chooses among them for every token. Ranks, alphas, rsLoRA and adapted modules may differ
from LoRA to LoRA; nothing is retrained.

The router is fitted to text of each LoRA's domain (a few dozen pages are enough). It sees a token
and not its neighbours, so it can only be as good as the domains' words differ: the report says how
good that is, on the last part of every text, which is not fitted.
"""
EXAMPLE = """\
  vllm-adafuse compose-experts code=./lora-code law=./lora-law --base ./Llama-2-7b-hf \\
      --samples code=code.txt --samples law=law.txt --output ./adapter --report report.html
  vllm-adafuse route ./adapter --text "def court(appeal):"
  vllm serve ./Llama-2-7b-hf --hf-overrides '{"adafuse_adapter": "./adapter"}'

Without text, --router uniform gives every LoRA the weight 1 / N for every token, which is their
plain average. docs/compose-experts.md has more."""


def pair(text: str) -> tuple[str, Path]:
    """"code=./lora" -> ("code", Path("lora")); shells leave a ~ after the = alone."""
    name, sign, value = text.partition("=")
    if not (name and sign and value):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected a name and a path: NAME=PATH")
    return name, Path(value).expanduser()


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "compose-experts", help="make one mixture of several LoRAs", description=DESCRIPTION
    )
    add_example(parser, EXAMPLE)
    add = parser.add_argument
    add("loras", metavar="NAME=LORA", nargs="+", type=pair, help="an expert: a PEFT LoRA directory")
    add("--output", required=True, metavar="ADAPTER", help="the adapter directory to make")
    add("--base", help="the backbone: a directory or a cached name (default: the first LoRA's)")
    add(
        "--samples", action="append", default=[], type=pair, metavar="NAME=FILE",
        help="UTF-8 text of an expert's domain; once or more for each",
    )  # fmt: skip
    add("--router", choices=("fit", "uniform"), default="fit", help="fit to the samples (default)")
    add("--top-k", type=int, metavar="K", help="experts per token (default 4; uniform: all)")
    add("--router-input", choices=ROUTER_INPUTS, default=ROUTER_INPUTS[0], help="what it reads")
    add(
        "--held-out", type=float, default=0.2, metavar="SHARE",
        help="of every text's end, to measure with (default 0.2)",
    )  # fmt: skip
    add(
        "--mixed-backbones", action="store_true",
        help="take LoRAs that name different backbones, which are refused otherwise",
    )  # fmt: skip
    add("--report", metavar="FILE", help="draw the report: .html or .png")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Composes with a progress bar on stderr; prints the report."""
    from vllm_adafuse.experts.compose import RouterOptions, compose_experts
    from vllm_adafuse.experts.separability import text_report

    loras, samples = dict(args.loras), {}
    if len(loras) < len(args.loras):
        raise AdapterError("mixture of LoRAs", ["a name is given to two LoRAs; use another"])
    for name, file in args.samples:
        samples.setdefault(name, []).append(file)
    try:
        options = RouterOptions(args.router, args.top_k, args.router_input, args.held_out)
    except ValueError as e:
        raise AdapterError("options", [str(e)]) from e
    made = compose_experts(
        loras, args.output, args.base, samples, options, args.report, progress=True,
        mixed_backbones=args.mixed_backbones,
    )  # fmt: skip
    if made.separability:
        for line in text_report(made.separability, made.telling).split("\n"):
            print(printable(line))
        print()
    for note in made.notes:
        print(printable(f"note: {note}"))
    if args.report:
        print(printable(f"drew {args.report}"))
    print(printable(f"wrote {made.path}; look into it with: vllm-adafuse inspect {made.path}"))
    return 0
