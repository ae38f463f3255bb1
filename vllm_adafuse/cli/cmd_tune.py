"""`vllm-adafuse tune`: finds the fastest configs of a model's products on this machine's GPU."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import TYPE_CHECKING

from vllm_adafuse.cli.cmd_random import INTEGERS
from vllm_adafuse.cli.common import add_example, console
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.places import require_backbone
from vllm_adafuse.text import printable

if TYPE_CHECKING:
    from vllm_adafuse.tuning import TuningJob

DESCRIPTION = """\
Measures how the kernels for small batches should cut the products of a backbone on this machine's
GPU, and keeps what it found in your cache directory, where servers look for it when they start.
Random weights are used: only the backbone's config.json is read. It takes a few minutes, and
wants the GPU for itself. Without it servers use a default that suits most.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "tune", help="fit the kernels to this GPU and a backbone", description=DESCRIPTION
    )
    add_example(parser, "  vllm-adafuse tune ./Llama-2-7b-hf --num-experts 8 --r 16")
    parser.add_argument("base", metavar="BASE", help="the backbone: a directory or a cached name")
    add = parser.add_argument
    add("--num-experts", type=int, default=8, metavar="E", help="experts (default 8)")
    add("--top-k", type=int, default=2, metavar="K", help="experts per token (default 2)")
    add("--r", type=int, default=16, metavar="R", help="the largest rank (default 16)")
    add(
        "--tokens",
        type=INTEGERS,
        default=[1, 8, 16, 32, 64, 128],
        metavar="N",
        help="batch sizes to tune for (default 1,8,16,32,64,128; the kernels serve up to 128)",
    )
    add(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="GPUs that share the model, as given to vllm serve (default 1)",
    )
    add(
        "--workers",
        type=int,
        default=max(1, min(16, (os.cpu_count() or 2) - 1)),
        metavar="N",
        help="processes that compile (default %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tunes, shows a table, writes the file."""
    import torch
    from vllm_adafuse import tuning
    from vllm_adafuse.explain import Model
    from vllm_adafuse.format.backbone import Backbone
    from vllm_adafuse.format.pretrained import read_config

    base = require_backbone(args.base)
    problems = [
        f"{name} is {value}, expected a number from 1 to {most}"
        for name, value, most in (
            ("--num-experts", args.num_experts, 64),
            ("--top-k", args.top_k, args.num_experts),
            ("--r", args.r, 256),
            ("--tensor-parallel-size", args.tensor_parallel_size, 64),
            ("--workers", args.workers, 256),
            *(("--tokens", tokens, tuning.MAX_TOKENS) for tokens in args.tokens),
        )
        if not 1 <= value <= most
    ]
    if problems:
        raise AdapterError("tune", problems)
    backbone, model = Backbone.from_path(str(base)), Model.of(read_config(str(base)))
    products = tuning.products_of(
        backbone, model, args.num_experts, args.r, args.tensor_parallel_size
    )
    if not torch.cuda.is_available():
        raise AdapterError("tune", ["no GPU is visible here; run it on the machine that serves"])
    job = tuning.TuningJob(
        tuple(products), tuple(args.tokens), args.top_k, args.workers, tuning.has_accelerator()
    )
    device = torch.cuda.get_device_name()
    outcomes = measured(job, device)
    show(outcomes, device)
    file = tuning.save(outcomes, device, "vllm-adafuse " + shlex.join(sys.argv[1:]))
    print(printable(f"wrote {file}; servers started from now on use it"))
    return 0


def measured(job: TuningJob, device: str) -> list:
    """The outcomes of a job, with progress on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from vllm_adafuse.tuning import compile_all, tune

    total = len(job.trials())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"compiling for {device}", total=total)
        compile_all(job, lambda done: progress.advance(task, done))
        task = progress.add_task("measuring", total=total)
        return list(tune(job, lambda done: progress.advance(task, done)))


def show(outcomes: list, device: str) -> None:
    """A table of defaults and winners."""
    from rich.table import Table

    table = Table(title=f"microseconds on {device}")
    for name in ("product", "tokens", "default", "best", "config: rows x cols"):
        table.add_column(name, justify="left" if name[0] in "pc" else "right")
    for outcome in outcomes:
        best, config = outcome.best
        how = "cuBLAS"
        if config:
            how = f"{config.rows} x {config.cols}, split_k {config.split_k}, {config.warps} warps, "
            how += f"{config.stages} stages"
            how += ", tma" * config.tma
        row = (outcome.product.name, str(outcome.tokens), f"{outcome.default:.1f}", f"{best:.1f}")
        table.add_row(*row, how)
    console().print(table)
