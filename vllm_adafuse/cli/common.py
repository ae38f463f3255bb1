"""What the subcommands share: the backbone to look at, and how numbers are written."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.context_keys import CONTEXTS
from vllm_adafuse.format.places import find_local_backbone, require_backbone
from vllm_adafuse.format.reading import where

if TYPE_CHECKING:
    from rich.console import Console
    from vllm_adafuse.format.adapter import Adapter
    from vllm_adafuse.format.backbone import Backbone

ADAPTER_HELP = "the directory with adapter_config.json and adapter_model.safetensors"
BASE_HELP = (
    "the backbone: a checkpoint directory, or a name in the Hugging Face cache "
    "(default: base_model_name_or_path of the adapter)"
)


@dataclass(frozen=True)
class Opened:
    """An adapter and its backbone.

    Attributes:
        adapter: None where its files cannot be read.
        base: the backbone's directory, None if it is not on this machine.
        backbone: names and shapes, with `base`.
        note: one sentence: which backbone was taken, or why none.
        problems: every problem of the two; none means usable.
    """

    adapter: Adapter | None
    base: Path | None
    backbone: Backbone | None
    note: str
    problems: list[str]


def open_adapter(path: str, base: str | None, values: bool = False) -> Opened:
    """Checks an adapter against a backbone: the one named, else its own if that is here.

    Args:
        path: the adapter's directory.
        base: `--base`, or None.
        values: also read every tensor of the adapter.

    Raises:
        AdapterError: `--base` is not here.
    """
    from vllm_adafuse.format.adapter import check_adapter
    from vllm_adafuse.format.backbone import Backbone

    found = None if base is None else require_backbone(base, option="--base")
    note = f"backbone: {found}, from --base" if found else ""
    if found is None:
        adapter, problems = check_adapter(path, values=False)
        if adapter is None:
            problems = check_adapter(path, values=values)[1]
            return Opened(None, None, None, "no backbone was looked for", problems)
        name = adapter.config.base_path(adapter.path)
        found = find_local_backbone(name)
        note = f"backbone: {found}, named by the adapter"
        if found is None:
            note = (
                f"the backbone {where(name)} is not on this machine: shapes were not checked "
                "against a backbone; give its directory with --base"
            )
    backbone, backbone_problems = None, []
    if found is not None:
        try:
            backbone = Backbone.from_path(str(found))
        except AdapterError as e:
            backbone_problems = [f"backbone {found}: {problem}" for problem in e.problems]
    adapter, problems = check_adapter(path, backbone, values)
    return Opened(adapter, found, backbone, note, problems + backbone_problems)


def usable(path: str, opened: Opened) -> Adapter:
    """The adapter of `open_adapter`.

    Raises:
        AdapterError: with its problems.
    """
    if opened.problems or opened.adapter is None:
        raise AdapterError(f"adapter {path}", opened.problems)
    return opened.adapter


def add_example(parser: argparse.ArgumentParser, example: str) -> None:
    """Puts an example under a subcommand's help."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"example:\n{example}"


def add_context(group: argparse._ActionsContainer) -> None:
    """Adds the options of a router that is trained to see the past; see `MixtureConfig`."""
    add = group.add_argument
    add("--router-context", choices=CONTEXTS, default="",
        help="mean: the router at the entrance also sees the mean of the request so "
        "far")  # fmt: skip
    add("--router-context-scale", dest="context_scale", type=float, default=4.0, metavar="S",
        help="how much that counts (default 4)")  # fmt: skip
    add("--router-context-half-life", dest="context_half_life", type=float, metavar="N",
        help="what was said counts half after N tokens (default: all counts alike)")  # fmt: skip


def console() -> Console:
    """Rich's console on today's stdout, taking nothing in names for markup or emoji."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False, soft_wrap=False)


def human_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def share(fraction: float) -> str:
    """0.125 -> "12.5 %"."""
    return f"{100 * fraction:.1f} %"
