"""`vllm-adafuse compose-experts`: one mixture of several LoRAs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vllm_adafuse.cli.common import add_example, share
from vllm_adafuse.cli.parser import COUNT
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.config import ROUTER_INPUTS
from vllm_adafuse.format.context_keys import CONTEXTS
from vllm_adafuse.text import printable

DESCRIPTION = """\
Makes one adapter of several plain PEFT LoRAs: each becomes an expert, and a router at the model's
entrance chooses among them for every token. Ranks, alphas, rsLoRA and adapted modules may differ
from LoRA to LoRA; nothing is retrained.

With --router-context mean the router also sees what a request has said so far. It is trained on any
text like that of your requests (--data), without labels, while the LoRAs stay as they are. Text whose
LoRA is known (--labels) is a help, and not needed.

Else the router is fitted to text of each LoRA's domain (a few dozen pages are enough). It sees a token
and not its neighbours, so it can only be as good as the domains' words differ: the report says how
good that is, on the last part of every text, which is not fitted.

With --mixture ADAPTER the LoRAs are put beside the experts of a mixture that exists, and --remove takes
experts out. Of the router only the rows of what is added are trained, in a minute or so: tokens that do
not choose a new expert keep the experts and weights that they had.
"""
EXAMPLE = """\
  vllm-adafuse compose-experts code=./lora-code law=./lora-law --base ./Llama-2-7b-hf \\
      --samples code=code.txt --samples law=law.txt --output ./adapter --report report.html
  vllm-adafuse route ./adapter --text "def court(appeal):"
  vllm serve ./Llama-2-7b-hf --hf-overrides '{"adafuse_adapter": "./adapter"}'

  vllm-adafuse compose-experts code=./lora-code law=./lora-law --base ./Llama-2-7b-hf \\
      --router-context mean --data requests.jsonl --data pages.txt --output ./adapter

  vllm-adafuse compose-experts tax=./lora-tax --mixture ./adapter --data pages.txt \\
      --labels tax=tax.txt --output ./with-tax
  vllm-adafuse compose-experts --mixture ./with-tax --remove law --output ./without-law

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
    add("loras", metavar="NAME=LORA", nargs="*", type=pair, help="an expert: a PEFT LoRA directory")
    add("--output", required=True, metavar="ADAPTER", help="the adapter directory to make")
    add("--base", help="the backbone: a directory or a cached name (default: the first LoRA's)")
    add(
        "--samples", action="append", default=[], type=pair, metavar="NAME=FILE",
        help="UTF-8 text of an expert's domain; once or more for each",
    )  # fmt: skip
    add("--router", choices=("fit", "uniform"), default="fit", help="fit to the samples (default)")
    add(
        "--top-k", type=int, metavar="K",
        help="experts per token (default 4; with the past 2; uniform: all)",
    )  # fmt: skip
    add("--router-input", choices=ROUTER_INPUTS, default=ROUTER_INPUTS[0], help="what it reads")
    add(
        "--held-out", type=float, default=0.2, metavar="SHARE",
        help="of every text's end, to measure with (default 0.2)",
    )  # fmt: skip
    add(
        "--mixed-backbones", action="store_true",
        help="take LoRAs that name different backbones, which are refused otherwise",
    )  # fmt: skip
    change = parser.add_argument_group("a mixture that exists").add_argument
    change("--mixture", type=Path, metavar="ADAPTER",
           help="add the LoRAs to this one, and write the result to --output: the other experts and "
           "their rows of the router stay, those of the LoRAs are trained on --data")  # fmt: skip
    change("--remove", action="append", default=[], metavar="NAME",
           help="take this expert out of it; needs no text and no backbone")  # fmt: skip
    past = parser.add_argument_group("a router that sees the past").add_argument
    past("--router-context", choices=CONTEXTS, help="train one that sees the request so far")
    past(
        "--data", action="append", default=[], type=Path, metavar="FILE",
        help="text to train it on, of any domain: jsonl as `train` takes it, or plain UTF-8",
    )  # fmt: skip
    past(
        "--labels", action="append", default=[], type=pair, metavar="NAME=FILE",
        help="text whose expert is known, of either kind, to train it on besides; of any experts or "
        "none (--samples are taken so too)",
    )  # fmt: skip
    past("--router-from", type=Path, metavar="ADAPTER",
         help="keep the rows of experts of the same name; only those of others are trained")  # fmt: skip
    past("--router-context-scale", type=float, metavar="S",
         help="how much the past counts (default 4)")  # fmt: skip
    past("--router-context-half-life", type=float, metavar="N",
         help="what was said counts half after N tokens (default: all counts alike). Give 16 where "
         "requests change their subject or begin with a long common prompt: with a third of each and "
         "of plain ones it had 4.0%% less perplexity than the right LoRA by label, 64 had 2.5%% less, "
         "all alike 0.7%% more")  # fmt: skip
    past("--steps", type=COUNT, metavar="N", help="of the optimizer (default 200)")
    past("--length", type=COUNT, metavar="N", help="tokens of a block (default 512)")
    past("--batch-size", type=COUNT, metavar="N", help="blocks of a step (default 16)")
    past("--lr", type=float, help="peak learning rate (default 8 over the backbone's width)")
    past("--seed", type=int, help="of fresh rows and of the order (default 0)")
    past("--dtype", choices=("auto", "bfloat16", "float32"), help="of the backbone while training")
    add("--report", metavar="FILE", help="draw the report: .html or .png")
    parser.set_defaults(run=run)


# Option -> field of ContextOptions.
_OF_THE_PAST = {
    "router_context_scale": "scale", "router_context_half_life": "half_life",
    "router_from": "router_from", "steps": "steps", "length": "length",
    "batch_size": "batch_size", "lr": "lr", "seed": "seed", "dtype": "dtype",
}  # fmt: skip


def _texts(args: argparse.Namespace) -> list[str]:
    """Options that name text to train a router on, of those that are given."""
    return [f"--{name}" for name in ("data", "labels") if getattr(args, name)]


def _context(args: argparse.Namespace):
    """The options of a router that sees the past; None without one.

    Raises:
        ValueError: such options without it, or options that do not go with it.
    """
    from vllm_adafuse.experts.context import ContextOptions

    given = {f: v for o, f in _OF_THE_PAST.items() if (v := getattr(args, o)) is not None}
    if not args.router_context:
        named = [f"--{o.replace('_', '-')}" for o in _OF_THE_PAST if getattr(args, o) is not None]
        if named := [*named, *_texts(args)]:
            raise ValueError(f"{', '.join(named)}: expected --router-context mean beside it")
        return None
    if args.router != "fit":
        raise ValueError(f"--router is {args.router}, expected none beside --router-context")
    if args.report:
        raise ValueError("--report draws what a router sees in single tokens; leave it out")
    given["held_out"] = args.held_out
    return ContextOptions(tuple(args.data), (*args.samples, *args.labels), **given)


# Options of a mixture that is made anew, and what they are where none is given.
_MADE_ANEW = {
    "router": "fit", "top_k": None, "router_input": ROUTER_INPUTS[0], "report": None,
    "router_context": None, "router_context_scale": None, "router_context_half_life": None,
    "router_from": None,
}  # fmt: skip


def _training(args: argparse.Namespace):
    """How rows of a mixture that exists are trained; None where none are.

    Raises:
        ValueError: options that do not go with it.
    """
    from vllm_adafuse.experts.context import ContextOptions

    named = [f"--{o.replace('_', '-')}" for o, v in _MADE_ANEW.items() if getattr(args, o) != v]
    if named:
        raise ValueError(f"{', '.join(named)}: expected none beside --mixture, which has its own")
    given = {f: v for o, f in _OF_THE_PAST.items() if (v := getattr(args, o)) is not None}
    if not args.loras:
        named = [f"--{o.replace('_', '-')}" for o in _OF_THE_PAST if getattr(args, o) is not None]
        if named := [*named, *_texts(args), *(["--samples"] if args.samples else [])]:
            raise ValueError(f"{', '.join(named)}: expected a LoRA to add beside it, else nothing is "
                             "trained")  # fmt: skip
        return None
    labelled = (*args.samples, *args.labels)
    return ContextOptions(tuple(args.data), labelled, held_out=args.held_out, **given)


def _change(args: argparse.Namespace, loras: dict[str, str | Path]):
    """A mixture that exists, changed."""
    from vllm_adafuse.experts.change import change_mixture

    try:
        options = _training(args)
    except ValueError as e:
        raise AdapterError("options", [str(e)]) from e
    return change_mixture(
        args.mixture, args.output, loras, args.remove, args.base, options, progress=True,
        mixed_backbones=args.mixed_backbones,
    )  # fmt: skip


def _compose(args: argparse.Namespace, loras: dict[str, str | Path]):
    """A mixture made anew."""
    from vllm_adafuse.experts.compose import RouterOptions, compose_experts

    if args.remove:
        raise AdapterError("options", ["--remove: expected --mixture beside it, to take them out of"])
    samples: dict[str, Sequence[str | Path]] = {
        name: [file for owner, file in args.samples if owner == name] for name, _ in args.samples
    }
    try:
        context = _context(args)
        options = RouterOptions(args.router, args.top_k, args.router_input, args.held_out, context)
    except ValueError as e:
        raise AdapterError("options", [str(e)]) from e
    return compose_experts(
        loras, args.output, args.base, {} if context else samples, options, args.report, progress=True,
        mixed_backbones=args.mixed_backbones,
    )  # fmt: skip


def _show_trained(trained) -> None:
    shares = ", ".join(f"{n} {share(part)}" for n, part in zip(trained.names, trained.usage))
    lines = [
        f"held-out text: {trained.tokens} tokens with loss",
        f"  perplexity {trained.before:.2f} -> {trained.after:.2f}",
        f"  experts    {shares}",
    ]
    if trained.kept:
        lines.append(f"rows kept as they were: {', '.join(trained.kept)}")
    for line in lines:
        print(printable(line))
    print()


def run(args: argparse.Namespace) -> int:
    """Composes with a progress bar on stderr; prints the report."""
    from vllm_adafuse.experts.separability import text_report

    loras = dict(args.loras)
    if len(loras) < len(args.loras):
        raise AdapterError("mixture of LoRAs", ["a name is given to two LoRAs; use another"])
    made = (_change if args.mixture else _compose)(args, loras)
    if made.separability:
        for line in text_report(made.separability, made.telling).split("\n"):
            print(printable(line))
        print()
    if made.trained:
        _show_trained(made.trained)
    for note in made.notes:
        print(printable(f"note: {note}"))
    if args.report:
        print(printable(f"drew {args.report}"))
    print(printable(f"wrote {made.path}; look into it with: vllm-adafuse inspect {made.path}"))
    return 0
