"""`vllm-adafuse`: the entry point and what all subcommands share in failing."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import vllm_adafuse
from vllm_adafuse.cli import (
    cmd_check,
    cmd_compose,
    cmd_compose_experts,
    cmd_convert,
    cmd_distill,
    cmd_doctor,
    cmd_explain,
    cmd_inspect,
    cmd_merge,
    cmd_playground,
    cmd_random,
    cmd_route,
    cmd_train,
    cmd_tune,
)
from vllm_adafuse.cli.parser import Parser, os_message
from vllm_adafuse.errors import AdapterError, brief, is_panic
from vllm_adafuse.text import clip, printable

EPILOG = """\
examples, in the order of a first visit:
  vllm-adafuse random BASE adapter               make an adapter with random weights to play with
  vllm-adafuse check adapter                     all faults of an adapter, before it is served
  vllm-adafuse inspect adapter                   its experts, and their share of the vocabulary
  vllm-adafuse route adapter --text "Hello you"  which experts each token of a text uses
  vllm-adafuse compose BASE adapter composed     one directory for `vllm serve composed`
  vllm-adafuse merge adapter --experts a,b merged   experts made part of a static checkpoint
  vllm-adafuse convert other/ adapter            MixLoRA, MoLA, Arrow, … in this format
  vllm-adafuse compose-experts a=lora1 b=lora2 … one mixture of several LoRAs
  vllm-adafuse train --base BASE --data texts.jsonl --output adapter   train one
  vllm-adafuse tune BASE                         fit the kernels to this machine's GPU
  vllm-adafuse explain BASE adapter --tokens 40  which kernels serve a step of 40 tokens
  vllm-adafuse doctor BASE adapter               what this machine would serve, and why not faster
  vllm-adafuse playground http://localhost:8000  a page with the tokens of a server, by expert

BASE is a checkpoint directory, or the name of one in the Hugging Face cache; nothing is
downloaded. `vllm-adafuse COMMAND --help` says more.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; its result carries `run(args) -> exit code`."""
    parser = Parser(
        prog="vllm-adafuse",
        description="Adapters that are mixtures of LoRA experts, routed per token, for vLLM: "
        "check them, look into them, pack them for serving.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=vllm_adafuse.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (
        cmd_check,
        cmd_inspect,
        cmd_route,
        cmd_compose,
        cmd_merge,
        cmd_convert,
        cmd_compose_experts,
        cmd_random,
        cmd_train,
        cmd_distill,
        cmd_tune,
        cmd_explain,
        cmd_doctor,
        cmd_playground,
    ):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        argv: arguments after the program's name; default those of the process.

    Returns:
        0, or 1 after one message on stderr. Wrong usage leaves with exit code 2 (SystemExit).
    """
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8 shows escapes
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (AdapterError, OSError) as e:
        said = os_message(e) if isinstance(e, OSError) else str(e)
        message = "\n".join(clip(printable(line), 2000) for line in said.split("\n"))
        print(f"vllm-adafuse: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vllm-adafuse: interrupted", file=sys.stderr)
        return 130
    except BaseException as e:
        if not is_panic(e):
            raise
        print(f"vllm-adafuse: the tokenizer cannot be used: {printable(brief(e))}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
