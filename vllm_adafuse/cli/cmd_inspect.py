"""`vllm-adafuse inspect`: what an adapter holds, and which part of the vocabulary meets whom."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from vllm_adafuse.cli.colors import terminal_style
from vllm_adafuse.cli.common import (
    ADAPTER_HELP,
    BASE_HELP,
    Opened,
    add_example,
    console,
    human_bytes,
    open_adapter,
    ranges,
    share,
    usable,
)
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.config import BASE_HASH
from vllm_adafuse.text import printable

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from vllm_adafuse.format.adapter import Adapter

DESCRIPTION = """\
Shows the experts of an adapter (ranks, scales, and the share of the vocabulary that each serves,
as a token's first choice and as any of its k), its modules with shapes and bytes, its router, and
the memory that serving takes for it. The shares need the backbone's embedding; no GPU is used.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "inspect", help="show experts, modules, bytes and routes", description=DESCRIPTION
    )
    add_example(parser, "  vllm-adafuse inspect ./adapter --base ./Llama-2-7b-hf")
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help=ADAPTER_HELP)
    parser.add_argument("--base", help=BASE_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints tables, or the same as JSON."""
    opened = open_adapter(args.adapter, args.base)
    adapter = usable(args.adapter, opened)
    report = _report(adapter, opened)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return 0


def _report(adapter: Adapter, opened: Opened) -> dict[str, Any]:
    """The JSON document; shares and what needs V are None without a backbone."""
    from vllm_adafuse.format.digest import content_hash, written_at

    config = adapter.config
    in_context = config.layer_wise or config.router_layer > 0
    # Two numbers for each expert, or an expert and its weight for each of k.
    columns = config.num_experts if config.router_context else config.top_k
    shares, why_not = None, None
    if opened.base is None:
        why_not = opened.note
    else:
        try:
            shares = _vocabulary_shares(adapter, opened.base)
        except AdapterError as e:  # a directory without weights, say
            why_not = "; ".join(e.problems)
    vocab_size = opened.backbone.vocab_size if opened.backbone else None
    experts = [
        {
            "name": config.expert_names[e],
            "rank": config.ranks[e],
            "alpha": config.alphas[e],
            "scale": config.scales[e],
            "share_first": shares[0][e] if shares else None,
            "share_any": shares[1][e] if shares else None,
        }
        for e in range(config.num_experts)
    ]
    return {
        "adapter": str(adapter.path),
        "content": content_hash(adapter.path),
        "written": written_at(adapter.path),
        BASE_HASH: config.base_hash or None,
        "base_model": config.base_model,
        "base": str(opened.base) if opened.base else None,
        "note": opened.note,
        "num_experts": config.num_experts,
        "top_k": config.to_json()["top_k"],
        "router": _router(adapter),
        "experts": experts,
        "no_shares_because": why_not,
        "modules": _modules(adapter),
        "bytes": sum(info.nbytes for info in adapter.tensors.values()),
        "vocab_size": vocab_size,
        "passport_bytes": 0 if in_context else vocab_size and vocab_size * columns * 8,
    }


def _router(adapter: Adapter) -> dict[str, Any]:
    """What decides, and where."""
    config = adapter.config
    common = {
        "routing": config.routing,
        "weights": config.router_weights,
        "temperature": config.temperature,
        "bias": any(name.endswith("router.bias") for name in adapter.tensors),
    }
    if not config.layer_wise:
        past = {
            "context": config.router_context,
            "context_scale": config.context_scale,
            "context_half_life": config.context_half_life,
        }
        return {
            **common,
            "input": config.router_input,
            "layer": config.router_layer,
            **(past if config.router_context else {}),
        }
    rows = [adapter.tensors[f"{owner}.router.weight"].shape[0] for owner in adapter.routers]
    return {
        **common,
        "scope": config.router_scope,
        "logits": config.router_logits,
        "mix": config.mix,
        "routers": len(rows),
        "experts_of_routers": sorted(set(rows)),
        "shared_A": config.shared_A,
        "always_r": config.always_r,
        "always_alpha": config.always_alpha,
    }


def _vocabulary_shares(adapter: Adapter, base: Path) -> tuple[list[float], list[float]]:
    """Parts of the vocabulary that have each expert as first choice, and as any of the k."""
    import torch
    from vllm_adafuse.offline.routing import vocabulary_routes

    ids, _ = vocabulary_routes(adapter, base)
    experts = adapter.config.num_experts
    first = torch.bincount(ids[:, 0], minlength=experts)
    of_any = torch.bincount(ids.flatten(), minlength=experts)
    return (first / len(ids)).tolist(), (of_any / len(ids)).tolist()


def _modules(adapter: Adapter) -> list[dict[str, Any]]:
    """Adapted projections, grouped where module and shape agree."""
    groups: dict[tuple, list[tuple[int, int]]] = defaultdict(list)
    for name in dict.fromkeys([*adapter.projections, *adapter.always_on]):
        own = [
            info
            for end in ("lora_A", "lora_B", "always_A", "always_B")
            if (info := adapter.tensors.get(f"{name}.{end}"))
        ]
        parts = name.split(".")
        # The first of them is an A [..., r, in], the second a B [..., out, r].
        size_in, size_out, dtype = own[0].shape[-1], own[1].shape[-2], own[0].dtype
        key = (parts[-1], size_in, size_out, str(dtype).removeprefix("torch."))
        groups[key].append((int(parts[2]), sum(info.nbytes for info in own)))
    return [
        {
            "module": module,
            "layers": sorted(layer for layer, _ in found),
            "in": size_in,
            "out": size_out,
            "dtype": dtype,
            "bytes": sum(nbytes for _, nbytes in found),
        }
        for (module, size_in, size_out, dtype), found in sorted(groups.items())
    ]


def _show(report: dict[str, Any]) -> None:
    out, router = console(), report["router"]
    bias = "with" if router["bias"] else "without"
    out.print(printable(f"adapter {report['adapter']}"), style="bold")
    out.print(f"content {report['content']}")
    out.print(f"written {report['written']}")
    out.print(printable(report["note"]))
    top_k = report["top_k"] if isinstance(report["top_k"], int) else json.dumps(report["top_k"])
    reads = f"input {router.get('input')}"
    if router["routing"] == "layer_wise":
        reads = f"one per {router['scope']}, {router['routers']} in all"
    elif router["layer"]:
        reads += f" at layer {router['layer']}"
    elif router.get("context"):
        reads += f" and the {router['context']} of the past, scale {router['context_scale']:g}"
        if router["context_half_life"] is not None:
            reads += f", half-life {router['context_half_life']:g} tokens"
    out.print(
        f"{report['num_experts']} experts, top-{top_k}; router: {reads}, "
        f"weights {router['weights']}, temperature {router['temperature']:g}, {bias} bias"
    )
    if router["routing"] == "layer_wise":
        out.print(_layer_wise_line(router))
    _show_experts(out, report)
    _show_modules(out, report)
    passports = report["passport_bytes"]
    columns = report["num_experts"] if router.get("context") else report["top_k"]
    if passports == 0:
        size = "none: routes hang on context"
    elif passports is None:
        size = f"vocabulary x {columns} x 8 bytes"
    else:
        size = f"{human_bytes(passports)} ({report['vocab_size']} x {columns} x 8 bytes)"
    out.print(f"tensors {human_bytes(report['bytes'])}, passports when served {size}")


def _layer_wise_line(router: dict[str, Any]) -> str:
    """What layer-wise routing has beside what all routing has."""
    counts = ", ".join(map(str, router["experts_of_routers"]))
    parts = [f"layer-wise: {counts} experts a router", f"logits {router['logits']}"]
    parts.append(f"mixed in {'the output of the MLP' if router['mix'] != 'linear' else 'linears'}")
    if router["shared_A"]:
        parts.append("one A for all experts of a linear")
    if router["always_r"]:
        parts.append(
            f"always on: rank {router['always_r']}, alpha {router['always_alpha']:g}"
        )
    return "; ".join(parts)


def _show_experts(out: Console, report: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    has_shares = report["no_shares_because"] is None
    table = Table(title="experts", title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("name", overflow="fold")
    for column in ("rank", "alpha", "scale"):
        table.add_column(column, justify="right")
    if has_shares:
        table.add_column("first choice", justify="right")
        table.add_column(f"any of {report['top_k']}", justify="right")
    for index, expert in enumerate(report["experts"]):
        row = [
            str(index),
            Text(printable(expert["name"]), terminal_style(index)),
            str(expert["rank"]),
            f"{expert['alpha']:g}",
            f"{expert['scale']:g}",
        ]
        if has_shares:
            row += [share(expert["share_first"]), share(expert["share_any"])]
        table.add_row(*row)
    out.print(table)
    if has_shares:
        out.print("first choice, any: shares of the vocabulary, every token counted once")
    else:
        out.print(printable(f"no shares of the vocabulary: {report['no_shares_because']}"))


def _show_modules(out: Console, report: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="modules", title_justify="left")
    table.add_column("module", overflow="fold")
    table.add_column("layers", overflow="fold")
    for column in ("in", "out", "dtype", "size"):
        table.add_column(column, justify="right")
    for module in report["modules"]:
        table.add_row(
            Text(printable(module["module"])),
            ranges(module["layers"]),
            str(module["in"]),
            str(module["out"]),
            module["dtype"],
            human_bytes(module["bytes"]),
        )
    out.print(table)
