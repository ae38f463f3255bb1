"""`vllm-adafuse explain`: which kernel runs for which layer, at a number of tokens."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from vllm_adafuse.cli.common import add_example, open_adapter, usable
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.places import require_backbone
from vllm_adafuse.text import printable

if TYPE_CHECKING:
    from vllm_adafuse.explain import Line, Model
    from vllm_adafuse.kernels.plans import Shape

    Shapes = Iterator[tuple[int, str, Shape]]

DESCRIPTION = """\
Shows what a step of so many tokens launches for each adapted projection: the kernel of its weight
and of A, how that is cut, what adds the deltas. It asks what a server would, and needs no GPU:
name another one with --device. Of the backbone config.json is read alone.

One adapter is everybody's, unless an option of a server with --enable-lora is given: then, as with
several adapters, it lies on the pages of a pool, from which requests choose.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "explain", help="which kernels a step launches, layer by layer", description=DESCRIPTION
    )
    add_example(parser, '  vllm-adafuse explain BASE ./adapter --tokens 40 --device "NVIDIA H200"')
    parser.add_argument("base", metavar="BASE", help="the backbone: a directory or a cached name")
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER_DIR", help="directories of adapters"
    )
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
    parser.add_argument(
        "--max-loras", type=int, metavar="N",
        help="as given to vllm serve (default: as many as there are adapters)",
    )  # fmt: skip
    parser.add_argument(
        "--max-lora-rank", type=int, metavar="R", help="as given to vllm serve (default 16)"
    )
    parser.add_argument(
        "--lora-dtype", choices=("auto", "fp8"), default="auto",
        help="as `adafuse.lora_dtype` of --additional-config: experts on pages in fp8",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints a line for each kind of projection."""
    import torch
    from vllm_adafuse.explain import Model, device_named, explain
    from vllm_adafuse.format.pretrained import read_config
    from vllm_adafuse.kernels.plans import Device

    problems = [
        f"{name} is {value}, expected a number from 1 to {most}"
        for name, value, most in (
            ("--tokens", args.tokens, 1 << 20),
            ("--tensor-parallel-size", args.tensor_parallel_size, 64),
            ("--max-loras", args.max_loras, 1 << 12),
            ("--max-lora-rank", args.max_lora_rank, 1 << 12),
        )
        if value is not None and not 1 <= value <= most
    ]
    if args.device is None and not torch.cuda.is_available():
        problems.append('no GPU is visible here; name one with --device, as "NVIDIA H200"')
    if problems:
        raise AdapterError("explain", problems)
    base = str(require_backbone(args.base))
    named = args.device is not None
    device = device_named(args.device) if named else Device.of(torch.device("cuda"))
    model = Model.of(read_config(base))
    asked = args.max_loras or args.max_lora_rank or args.lora_dtype != "auto"
    on_pages = len(args.adapters) > 1 or asked
    said, shapes = (_of_pool if on_pages else _of_one)(args, base, model)
    print(printable(f"{args.tokens} tokens, {device.name}, {said}"))
    lines = explain(shapes, args.tokens, device)
    for cells in columns([("layers", "projection", "then", "kernel", "config", "deltas")] + [
        cells_of(line) for line in lines
    ]):  # fmt: skip
        print(printable(cells))
    return 0


def _of_one(args: argparse.Namespace, base: str, model: Model) -> tuple[str, Shapes]:
    """An adapter that is everybody's: what it is, and the shapes that it makes."""
    from vllm_adafuse.explain import shapes_of
    from vllm_adafuse.format.adapter import refuse_layer_wise

    (path,) = args.adapters
    opened = open_adapter(path, base)
    adapter = usable(path, opened)
    refuse_layer_wise(adapter, "explain knows adapters that decide once per token")
    shapes = shapes_of(opened.backbone, model, adapter, args.tensor_parallel_size)
    return f"{adapter.config.num_experts} experts", shapes


def _of_pool(args: argparse.Namespace, base: str, model: Model) -> tuple[str, Shapes]:
    """The same of adapters that requests choose: mixtures and plain LoRAs."""
    from vllm_adafuse.explain import shapes_on_pages
    from vllm_adafuse.format.backbone import Backbone
    from vllm_adafuse.kernels.configs import PAGE_RANKS
    from vllm_adafuse.serving import adapters
    from vllm_adafuse.serving.pool import misfits, pool_size

    backbone = Backbone.from_path(base)
    loras, rank = args.max_loras or len(args.adapters), args.max_lora_rank or 16
    for path in args.adapters:
        opened = adapters.open_adapter(path, backbone)
        problems = misfits(opened.size, loras, rank)
        if opened.config is not None and (opened.config.layer_wise or opened.config.router_layer):
            problems.append("its routers stand inside the layers: it cannot be chosen per request")
        if problems:
            raise AdapterError(f"adapter {path}", problems)
    pages = pool_size(loras, rank).pages
    fp8 = args.lora_dtype == "fp8"
    said = f"{pages} pages of {PAGE_RANKS} ranks{' in fp8' * fp8}; steps without adapters take cuBLAS"
    return said, shapes_on_pages(backbone, model, pages, args.tensor_parallel_size, fp8)


def cells_of(line: Line) -> tuple[str, ...]:
    """A row of the table."""
    found, config = line.plan, "-"
    if c := found.config:
        config = f"{c.rows}x{c.cols}, split_k {c.split_k}, {c.warps} warps, {c.stages} stages"
    elif found.split_k > 1:
        config = f"split_k {found.split_k}"
    kernel = found.kernel + (" of A, W by vLLM" if not line.shape.fused else "")
    if line.shape.fused and found.config is None and not found.one_gemm:
        kernel += " of A, cublas of W" if line.shape.fp8 else " twice"
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
