"""`vllm-adafuse doctor`: what this machine would serve, and why not faster."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from vllm_adafuse.cli.cmd_explain import cells_of, columns
from vllm_adafuse.cli.common import add_example, human_bytes
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.text import printable

if TYPE_CHECKING:
    from vllm_adafuse.doctor import Report
    from vllm_adafuse.explain import Line

DESCRIPTION = """\
Says what would be served here: vLLM and whether it sees the plugin, the GPU, who has LoRA, the pool
of adapters, the kernels of each projection by the plan that a server asks, and what keeps it from
being faster. No engine is started. Exit code 1 where something would not serve.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "doctor", help="what this machine would serve, and why not faster", description=DESCRIPTION
    )
    add_example(parser, "  vllm-adafuse doctor BASE ./adapter ./lora --max-loras 4")
    parser.add_argument("base", nargs="?", metavar="BASE", help="the backbone, as vLLM gets it")
    parser.add_argument("adapters", nargs="*", metavar="ADAPTER_DIR", help="mixtures, PEFT LoRAs")
    for option, what in (
        ("--max-loras", "as given to vllm serve: adapters of a batch (default 1)"),
        ("--max-lora-rank", "likewise: ranks of an adapter, of all experts together (default 16)"),
        ("--tensor-parallel-size", "GPUs that share the model (default 1)"),
    ):
        default = 16 if option == "--max-lora-rank" else 1
        parser.add_argument(option, type=int, default=default, metavar="N", help=what)
    parser.add_argument("--device", metavar="NAME", help="a GPU's name (default: the one here)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 where it has problems."""
    import torch
    from vllm_adafuse.doctor import Options, examine
    from vllm_adafuse.explain import device_named
    from vllm_adafuse.kernels.plans import Device

    named = {"--max-loras": args.max_loras, "--max-lora-rank": args.max_lora_rank}
    named["--tensor-parallel-size"] = args.tensor_parallel_size
    if problems := [
        f"{name} is {value}, expected a number from 1 to 65536"
        for name, value in named.items()
        if not 1 <= value <= 1 << 16
    ]:
        raise AdapterError("doctor", problems)
    here = Device.of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    device = here if args.device is None else device_named(args.device)
    report = examine(args.base, args.adapters, device, Options(*named.values()))
    if args.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        print("\n".join(printable(line) for line in lines_of(report)))
    return int(bool(report.problems))


def lines_of(report: Report) -> list[str]:
    """What a person reads."""
    have = [f"{name} {found or 'is not installed'}" for name, found in report.versions.items()]
    hidden = {"hidden": "hidden by VLLM_PLUGINS", "missing": "not installed"}
    lines = [
        ", ".join(have),
        f"device: {report.device}",
        f"plugin: {hidden.get(report.plugin, 'seen by vLLM')}",
        f"--enable-lora: served by {report.lora}",
        _pool_line(report.pool),
    ]
    for one in report.adapters:
        lines.append(
            f"adapter {one['path']}: {one['kind']}, {one['experts']} experts, "
            f"{one['pages']} pages, content {one['content'][:16]}"
        )
    for way, by_tokens in report.kernels.items():
        head = ("tokens", "layers", "projection", "then", "kernel", "config", "deltas")
        rows = _rows(by_tokens)
        lines += ["", f"{way}:", *columns([head, *rows])]
    slower = report.slower or ["nothing is known"]
    lines += ["", "why not faster:", *(f"  - {text}" for text in slower)]
    if report.problems:
        lines += ["", "would not serve:", *(f"  - {problem}" for problem in report.problems)]
    return lines


def _rows(by_tokens: dict[int, list[Line]]) -> list[tuple[str, ...]]:
    """Cells of the table; numbers of tokens that are served alike share theirs."""
    alike: dict[tuple, list[int]] = {}
    for tokens, lines in by_tokens.items():
        alike.setdefault(tuple(map(cells_of, lines)), []).append(tokens)
    return [
        (",".join(map(str, tokens)), *cells) for lines, tokens in alike.items() for cells in lines
    ]


def _pool_line(pool: dict[str, int | None]) -> str:
    memory = "" if pool["bytes"] is None else f", {human_bytes(pool['bytes'])}"
    return (
        f"pool: {pool['pages']} pages of {pool['ranks_of_a_page']} ranks{memory}; the adapters "
        f"named take {pool['pages_of_these']}"
    )
