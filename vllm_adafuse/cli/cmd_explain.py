"""`vllm-adafuse explain`: which kernel runs for which layer, at a number of tokens."""

from __future__ import annotations

import argparse
from itertools import pairwise
from typing import TYPE_CHECKING

from vllm_adafuse.cli.common import add_example, open_adapter, usable
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.places import require_backbone
from vllm_adafuse.text import printable

if TYPE_CHECKING:
    from vllm_adafuse.explain import Line

DESCRIPTION = """\
Shows what a step of so many tokens launches for each adapted projection: the kernel of its weight
and of A, how that is cut, what adds the deltas. It asks what a server would, and needs no GPU:
name another one with --device. Only the backbone's config.json is read.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "explain", help="which kernels a step launches, layer by layer", description=DESCRIPTION
    )
    add_example(parser, '  vllm-adafuse explain BASE ./adapter --tokens 40 --device "NVIDIA H200"')
    parser.add_argument("base", metavar="BASE", help="the backbone: a directory or a cached name")
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help="the adapter's directory")
    parser.add_argument(
        "--tokens", type=int, default=1, metavar="T", help="tokens of the step (default 1)"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="a GPU's name as torch gives it (default: the one here)"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N",
        help="GPUs that share the model, as given to vllm serve (default 1)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a line for each kind of projection."""
    import torch
    from vllm_adafuse.explain import Model, device_named, explain, shapes_of
    from vllm_adafuse.format.pretrained import read_config
    from vllm_adafuse.kernels.plans import Device

    problems = [
        f"{name} is {value}, expected a number from 1 to {most}"
        for name, value, most in (
            ("--tokens", args.tokens, 1 << 20),
            ("--tensor-parallel-size", args.tensor_parallel_size, 64),
        )
        if not 1 <= value <= most
    ]
    if args.device is None and not torch.cuda.is_available():
        problems.append('no GPU is visible here; name one with --device, as "NVIDIA H200"')
    if problems:
        raise AdapterError("explain", problems)
    base = str(require_backbone(args.base))
    opened = open_adapter(args.adapter, base)
    adapter = usable(args.adapter, opened)
    if adapter.config.layer_wise:
        raise AdapterError(
            f"adapter {args.adapter}",
            ["it routes inside its layers; explain knows those that decide once per token"],
        )
    named = args.device is not None
    device = device_named(args.device) if named else Device.of(torch.device("cuda"))
    model = Model.of(read_config(base))
    shapes = shapes_of(opened.backbone, model, adapter, args.tensor_parallel_size)
    lines = explain(shapes, args.tokens, device)
    print(printable(f"{args.tokens} tokens, {device.name}, {adapter.config.num_experts} experts"))
    for cells in columns([("layers", "projection", "then", "kernel", "config", "deltas")] + [
        cells_of(line) for line in lines
    ]):  # fmt: skip
        print(printable(cells))
    return 0


def cells_of(line: Line) -> tuple[str, ...]:
    """A row of the table."""
    found, config = line.plan, "-"
    if c := found.config:
        config = f"{c.rows}x{c.cols}, split_k {c.split_k}, {c.warps} warps, {c.stages} stages"
    elif found.split_k > 1:
        config = f"split_k {found.split_k}"
    kernel = found.kernel + (" of A, W by vLLM" if not line.shape.fused else "")
    if line.shape.fused and found.config is None and not found.one_gemm:
        kernel += " twice"
    dense = "" if found.dense_from is None else f"cublas from expert {found.dense_from} on"
    expand = "" if found.expand == "none" else found.expand
    deltas = ", ".join(filter(None, (dense, expand))) or "within"
    return ranges(line.layers), line.name, line.shape.epilogue or "-", kernel, config, deltas


def ranges(numbers: tuple[int, ...]) -> str:
    """"0-3,5" of 0, 1, 2, 3, 5."""
    ends = [i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1]
    runs = [numbers[a:b] for a, b in pairwise([0, *ends, len(numbers)])]
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines in which cells stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
