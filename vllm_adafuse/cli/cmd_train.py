"""`vllm-adafuse train`: from a jsonl file to an adapter that can be served."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_adafuse.cli.cmd_random import LAYERS, names
from vllm_adafuse.cli.common import add_context, add_example, share
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.config import ROUTER_INPUTS, ROUTER_WEIGHTS
from vllm_adafuse.format.places import output_problem, require_backbone
from vllm_adafuse.text import printable

DESCRIPTION = """\
Trains a mixture of LoRA experts and its router on your texts; the backbone stays as it is.
Each line of the data is a JSON object of one of three kinds:

  {"text": "…"}                                        learns all of it
  {"prompt": "…", "completion": "…"}                   learns the completion
  {"messages": [{"role": "user", "content": "…"}, …]}  learns what the assistant says, in the
                                                       tokenizer's chat template

Alpaca's keys (instruction, input, output) and ShareGPT's (conversations of from and value) are
understood too, and a file that is one list of such objects; docs/training.md has the details.

A share of the lines is held out; the perplexity on them, before and after, tells whether the
training helped. Checkpoints are kept in OUTPUT-training, from which --resume goes on: from the last
whole one, with the texts and options of the run that wrote it.
"""
EXAMPLE = """\
  vllm-adafuse train --base ./Llama-2-7b-hf --data texts.jsonl --output ./adapter
  vllm-adafuse check ./adapter
  vllm serve ./Llama-2-7b-hf --hf-overrides '{"adafuse_adapter": "./adapter"}'

on 4 GPUs:
  torchrun --nproc-per-node 4 -m vllm_adafuse.cli.main train --base … --data … --output …"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "train", help="train an adapter on a jsonl file", description=DESCRIPTION
    )
    add_example(parser, EXAMPLE)
    add = parser.add_argument
    add("--base", required=True, help="the backbone: a directory or a cached name")
    add("--data", required=True, action="append", metavar="FILE.jsonl",
        help="training texts; may be given several times")  # fmt: skip
    add("--output", required=True, metavar="DIR", help="the adapter directory to make")

    mixture = parser.add_argument_group("the mixture")
    add = mixture.add_argument
    add("--num-experts", type=int, default=8, metavar="E", help="experts (default 8)")
    add("--top-k", type=int, default=2, metavar="K",
        help="experts per token (default 2); more is better and slower")  # fmt: skip
    # torchrun reads --r as an abbreviation of its own options.
    add("--rank", "--r", dest="r", type=int, default=16, metavar="R",
        help="rank of each expert (default 16)")  # fmt: skip
    add("--lora-alpha", type=float, metavar="ALPHA", help="scale is ALPHA / R (default 2 R)")
    add("--use-rslora", action="store_true", help="scale by alpha / sqrt(r) instead of alpha / r")
    add("--target-modules", type=names, metavar="NAMES", help="q_proj,v_proj (default: all)")
    add("--layers", type=LAYERS, metavar="LAYERS", help="adapted layers: 0-3,5 (default all)")
    add("--expert-names", type=names, metavar="NAMES", help="E names, shown by the tools")

    router = parser.add_argument_group("the router")
    add = router.add_argument
    add("--router-layer", type=int, default=0, metavar="M",
        help="decide on entering layer M, which sees context if M > 0; layers below stay plain "
        "(default 0: at the entrance, by the token alone)")  # fmt: skip
    add_context(router)
    add("--routing", choices=("pre_gated", "layer_wise"), default="pre_gated",
        help="layer_wise: a router in every layer, slower to serve")  # fmt: skip
    add("--router-scope", choices=("linear", "block"), default="linear",
        help="of layer_wise: what has a router of its own")  # fmt: skip
    add("--router-input", choices=ROUTER_INPUTS, default=ROUTER_INPUTS[0],
        help="what the router reads: the state, or the norm of it")  # fmt: skip
    add("--router-weights", choices=ROUTER_WEIGHTS, default=ROUTER_WEIGHTS[0],
        help="from logits to weights")  # fmt: skip
    add("--temperature", type=float, default=1.0, metavar="T", help="divides the logits")
    add("--temperature-start", type=float, metavar="T",
        help="anneal: begin at this temperature, reach --temperature half-way")  # fmt: skip
    add("--jitter", type=float, default=0.0, metavar="J",
        help="noise on the router's input while training, such as 0.01")  # fmt: skip
    add("--balance", type=float, default=0.01, metavar="C",
        help="coefficient of the loss that spreads tokens over experts (default 0.01)")  # fmt: skip
    add("--z-loss", type=float, default=0.001, metavar="C",
        help="coefficient of the loss that keeps logits small (default 0.001)")  # fmt: skip

    run_ = parser.add_argument_group("the run")
    add = run_.add_argument
    add("--length", type=int, default=1024, metavar="N", help="tokens of a block (default 1024)")
    add("--no-packing", action="store_true", help="one example a block, cut at --length")
    add("--epochs", type=float, default=3.0, metavar="N", help="passes over the data (default 3)")
    add("--steps", type=int, default=0, metavar="N", help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, default=8, metavar="N", help="blocks per device (default 8)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per optimizer step")
    add("--lr", type=float, default=5e-4, help="peak learning rate (default 5e-4)")
    add("--weight-decay", type=float, default=0.0, metavar="W")
    add("--held-out", type=float, default=0.05, metavar="SHARE",
        help="share of the lines to judge by (default 0.05)")  # fmt: skip
    add("--load", choices=("full", "8bit", "4bit"), default="full",
        help="backbone's weights; 8bit and 4bit need bitsandbytes and a GPU")  # fmt: skip
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="of the backbone (auto: bfloat16 on a GPU, else float32)")  # fmt: skip
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")
    add("--resume", action="store_true", help="go on from the last whole checkpoint")
    add("--save-every", type=int, default=500, metavar="N", help="steps per checkpoint; 0: none")
    add("--log-every", type=int, default=10, metavar="N", help="steps per line of the log")
    add("--tensorboard", action="store_true", help="write logs for TensorBoard to OUTPUT-training")
    add("--seed", type=int, default=0)
    add("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains; prints what the held-out text says of it."""
    base, out = require_backbone(args.base, option="--base"), Path(args.output)
    if problem := output_problem(out):
        raise AdapterError(f"output directory {out}", [problem])

    from vllm_adafuse.training.config import MixtureConfig
    from vllm_adafuse.training.run import TrainOptions, train

    shared = {
        name: getattr(args, name)
        for name in (
            "num_experts top_k r lora_alpha use_rslora target_modules layers expert_names routing "
            "router_scope router_layer router_context context_scale context_half_life router_input "
            "router_weights temperature temperature_start jitter seed"
        ).split()
    }
    mixture = MixtureConfig(balance_coef=args.balance, z_loss_coef=args.z_loss, **shared)
    kept = (
        "length epochs steps batch_size accumulate lr weight_decay held_out load dtype "
        "gradient_checkpointing resume save_every log_every tensorboard seed quiet"
    ).split()
    options = TrainOptions(
        base=str(base),
        data=tuple(args.data),
        output=str(out),
        mixture=mixture,
        pack=not args.no_packing,
        **{name: getattr(args, name) for name in kept},
    )
    report = train(options)
    if not report.first:
        return 0
    lines = [f"trained on {report.examples} examples, {report.tokens} tokens with loss per epoch"]
    if report.held_out:
        before, after = report.before, report.after
        lines += [
            f"held out: {report.held_out} examples, {after['tokens']} tokens with loss",
            f"  perplexity       {before['perplexity']:.2f} -> {after['perplexity']:.2f}",
            f"  right next token {share(before['accuracy'])} -> {share(after['accuracy'])}",
            "  experts          "
            + ", ".join(
                f"{name} {share(part)}"
                for name, part in zip(
                    mixture.expert_names or [f"expert_{e}" for e in range(len(report.usage))],
                    report.usage,
                )
            ),
        ]
    out = report.adapter
    lines.append(f"wrote {out}; look into it with: vllm-adafuse inspect {out}")
    for line in lines:
        print(printable(line))
    return 0
