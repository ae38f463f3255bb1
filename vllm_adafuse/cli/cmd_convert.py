"""`vllm-adafuse convert`: an adapter of another library in this format."""

from __future__ import annotations

import argparse

from vllm_adafuse.cli.common import add_example
from vllm_adafuse.cli.parser import value_of
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.text import printable

DESCRIPTION = """\
Converts a mixture of LoRA experts that another library saved: MixLoRA (pip's mixlora, MoE-PEFT),
MoLA (its own and MoE-PEFT's), LoRAMoE (both), HydraLoRA, PEFT's Arrow; and a plain PEFT LoRA. The
kind is told by the names of the tensors. The result computes the same function, or the source is
refused with the reason; what had to be assumed is printed and kept in the new config.

A pickle (adapter_model.bin) is read in a process of its own that runs no code in it; what is
written is safetensors.
"""
EXAMPLE = """\
  vllm-adafuse convert ./mixlora-alpaca ./adapter
  vllm-adafuse convert ./mola-scienceqa ./adapter --base ./Llama-2-7b-hf --top-k 2
  vllm-adafuse check ./adapter
  vllm serve ./Llama-2-7b-hf --hf-overrides '{"adafuse_adapter": "./adapter"}'

Mixtures with a router in every layer are served, but slower than those with one at the entrance.
docs/convert.md says what is exact, what is lost and what is refused for each kind."""


def ints(text: str) -> int | tuple[int, ...]:
    """"2" -> 2, "2,2,4" -> (2, 2, 4)."""
    values = tuple(int(part) for part in text.split(","))
    return values[0] if len(values) == 1 else values


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    from vllm_adafuse.convert.options import EXPERT_LORA, GKS

    parser = commands.add_parser(
        "convert", help="convert an adapter of another library", description=DESCRIPTION
    )
    add_example(parser, EXAMPLE)
    add = parser.add_argument
    add("source", metavar="SRC", help="the directory that the other library saved")
    add("out", metavar="OUT", help="the adapter directory to make")
    add("--base", help="the backbone: a directory or a cached name (default: the one SRC names)")
    add(
        "--top-k", type=value_of(ints, "2, or one number for each layer: 2,2,4"), metavar="K",
        help="MoLA, which does not save it: experts per token, or one number for each layer: 2,2,4",
    )  # fmt: skip
    add(
        "--expert-lora", choices=EXPERT_LORA,
        help="MixLoRA with expert_lora: used (trained with MoE-PEFT) or ignored (pip's mixlora)",
    )  # fmt: skip
    add(
        "--gks", choices=GKS,
        help="Arrow with use_gks: subtract the general LoRAs, or done if the model had run before "
        "it was saved",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Converts with a progress bar on stderr; prints the report."""
    from vllm_adafuse.convert.options import Options
    from vllm_adafuse.convert.registry import convert

    try:
        options = Options(top_k=args.top_k, gks=args.gks, expert_lora=args.expert_lora)
    except ValueError as e:
        raise AdapterError("options", [str(e)]) from e
    report = convert(args.source, args.out, args.base, options, progress=True)
    print(printable(f"{report.kind} adapter {args.source} -> {args.out}"))
    print(printable(f"exact: {report.exact}"))
    for note in report.notes:
        print(printable(f"note: {note}"))
    print(printable(f"look into it with: vllm-adafuse inspect {args.out}"))
    return 0
