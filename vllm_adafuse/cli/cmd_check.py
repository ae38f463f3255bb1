"""`vllm-adafuse check`: every fault of an adapter, without serving it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from vllm_adafuse.cli.common import ADAPTER_HELP, BASE_HELP, Opened, add_example, open_adapter
from vllm_adafuse.format.config import BASE_HASH
from vllm_adafuse.text import printable

DESCRIPTION = """\
Checks an adapter directory as serving does, and lists every problem, one per line: keys of
adapter_config.json, names and shapes of tensors, NaN and Inf, and the fit with the backbone. Warns
of values that are finite and whose products are not, and of a backbone that is not the one that
its routes were made for. Exit code 0: usable. 1: problems.
"""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Registers the subcommand."""
    parser = commands.add_parser(
        "check", help="list every fault of an adapter", description=DESCRIPTION
    )
    add_example(parser, "  vllm-adafuse check ./adapter --base ./Llama-2-7b-hf")
    parser.add_argument("adapter", metavar="ADAPTER_DIR", help=ADAPTER_HELP)
    parser.add_argument("--base", help=BASE_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints problems or `ok …` on stdout, the choice of the backbone on stderr."""
    opened = open_adapter(args.adapter, args.base, values=True)
    adapter, found = opened.adapter, []
    if not opened.problems:
        found = _warnings(opened)
    if args.json:
        print(json.dumps(_report(args.adapter, opened, found), indent=2))
        return 1 if opened.problems else 0
    print(printable(opened.note), file=sys.stderr)
    for problem in opened.problems:
        print(printable(problem))
    if opened.problems:
        return 1
    for warning in found:
        print(printable(f"warning: {warning}"))
    config = adapter.config
    print(
        printable(
            f"ok: {args.adapter}: {config.num_experts} experts, top-{config.top_k}, "
            f"{len(adapter.projections)} projections, {len(adapter.tensors)} tensors"
        )
    )
    return 0


def _report(adapter: str, opened: Opened, warnings: list[str]) -> dict[str, Any]:
    """The JSON document. `content` and `base_model_hash` are null where there is none."""
    from vllm_adafuse.format.digest import content_hash

    ok = not opened.problems
    return {
        "adapter": os.path.abspath(os.path.expanduser(adapter)),
        "base": str(opened.base) if opened.base else None,
        "note": opened.note,
        "ok": ok,
        "problems": opened.problems,
        "warnings": warnings,
        "content": content_hash(adapter) if ok else None,
        BASE_HASH: opened.adapter.config.base_hash or None if ok else None,
    }


def _warnings(opened: Opened) -> list[str]:
    """What overflows in the backbone's dtype, and a backbone that is not the adapter's own."""
    import torch
    from vllm_adafuse.format.origin import origin_problem
    from vllm_adafuse.format.overflow import overflow_warnings
    from vllm_adafuse.format.pretrained import read_config

    dtype = read_config(str(opened.base)).dtype if opened.base else None
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    known = isinstance(named, torch.dtype) and named.is_floating_point
    warnings = overflow_warnings(opened.adapter, named if known else None)
    other = origin_problem(opened.adapter.config, str(opened.base)) if opened.base else None
    return [*warnings, other] if other else warnings
