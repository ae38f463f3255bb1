"""An adapter as a server gets it: an AdaFuse directory or a plain PEFT LoRA, opened and checked.

Needs no device and nothing of vLLM: the front end checks with it before an engine is asked, and a
worker reads with it.

**How a version travels.** The front end sends an engine no `LoRARequest` of a user, but a copy with

    lora_path     "<the user's path>#sha256=<digest>&pages=<n>&columns=<n>", see `stamp_path`
    lora_int_id   one for each name and content, below 2**31
    load_inplace  False

so that a worker that has the id has the content. One that has not resolves the path as vLLM does
(`get_adapter_absolute_path`, hub names too), opens the directory and refuses it where
`OpenedAdapter.digest` is another. A path without a digest comes from nobody's front end (a
`collective_rpc` of the user's own): there is nothing to compare then.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from vllm_adafuse.convert.refused import refused_directory
from vllm_adafuse.convert.source import PICKLE_FILE, read_json
from vllm_adafuse.format.adapter import Adapter, check_adapter, list_directory, load_adapter
from vllm_adafuse.format.backbone import Backbone
from vllm_adafuse.format.config import CONFIG_FILE, WEIGHTS_FILE, AdapterConfig
from vllm_adafuse.format.digest import content_hash
from vllm_adafuse.format.layout import ENTRANCE_ROUTER
from vllm_adafuse.format.reading import FileProblem, open_regular
from vllm_adafuse.format.tensor_file import machine_memory
from vllm_adafuse.serving.plain_loras import (
    LOAD_AGAIN,
    as_adapter,
    is_rest,
    read_pairs,
    read_parts,
    refuse,
)
from vllm_adafuse.serving.pool import Size, pages_of_rank
from vllm_adafuse.text import show

MIXTURE, LORA = "mixture", "lora"
_NO_SIZE = Size(0)
_STAMP = "#sha256="
_STAMPED = re.compile(
    rf"(?P<path>.*){_STAMP}(?P<digest>[0-9a-f]{{64}})&pages=(?P<pages>\d+)&columns=(?P<columns>\d+)",
    re.DOTALL,
)


@dataclass(frozen=True)
class AdaptedLinear:
    """One linear of the backbone that an adapter changes.

    Attributes:
        size_in: of the whole linear, whatever a worker holds of it.
        size_out: likewise.
        ranks: of each of its experts.
        scales: what B A of each expert is multiplied by.
    """

    size_in: int
    size_out: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class OpenedAdapter:
    """A checked adapter directory; holds no tensors.

    Attributes:
        path: the directory, absolute.
        kind: MIXTURE, or LORA: one expert that every token uses with weight 1.
        num_experts: E, 1 for a LoRA.
        digest: of config and tensors, 64 hexadecimal digits.
        linears: full Hugging Face name ("model.layers.0.mlp.up_proj") -> its experts, in file
            order. Of a layer-wise mixture without the parts that are always on.
        files: `files_state` before it was read.
        adapter: the mixture's files, router and routing; None for a LoRA. Whether a layer-wise
            one, or one with a router at a later layer, can be served is for the worker to say.
        rest: of a LoRA the modules that get no pages: the embedding, from V inputs, the output head,
            and linears of the backbone's own experts.
        heads: of a LoRA classifier's heads that it replaces, (in, labels).
    """

    path: Path
    kind: str
    num_experts: int
    digest: str
    linears: dict[str, AdaptedLinear]
    adapter: Adapter | None = None
    files: tuple = ()
    rest: dict[str, AdaptedLinear] = field(default_factory=dict)
    heads: dict[str, tuple[int, int]] = field(default_factory=dict)

    def unchanged(self) -> bool:
        """Whether its files are still those, as far as that can be seen without reading them."""
        return files_state(self.path) == self.files

    @property
    def config(self) -> AdapterConfig | None:
        """The mixture's config, its router's keys among them; None for a LoRA."""
        return self.adapter.config if self.adapter else None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The largest rank of each expert in any linear: [E]."""
        by_expert = [
            [linear.ranks[e] for linear in self.linears.values() if e < len(linear.ranks)]
            for e in range(self.num_experts)
        ]
        return tuple(max(ranks, default=0) for ranks in by_expert)

    @property
    def size(self) -> Size:
        """What it takes of the pool."""
        config, columns = self.config, 0
        if config is not None:  # tables of all experts, or each token's k of them
            columns = config.num_experts if config.router_context else config.top_k
        pages = sum(map(pages_of_rank, self.ranks))
        # Tokens name an adapter by its first page, so one that has a rest alone takes one too.
        return Size(max(pages, 1), columns, int(bool(self.rest or self.heads)))

    def router(self) -> dict[str, torch.Tensor] | None:
        """The tensors of the entrance router by their names in the file, of the file's dtype; None
        for a LoRA and for layer-wise routing."""
        if self.adapter is None or self.adapter.config.layer_wise:
            return None
        with self.adapter.reader() as read:
            return {name: read(name) for name in ENTRANCE_ROUTER if name in self.adapter.tensors}

    def tensors(self) -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]:
        """Every expert of every linear, the rest behind them, as many at once as follow on each
        other and have one rank: (linear, the first of n experts, lora_A [n or 1, r, in], one for all
        of them, lora_B [n, out, r]), on the CPU, of the file's dtypes, without the scale. Copy what
        you keep: they may be views of the file.

        Raises:
            AdapterError: the files are no longer those that were checked. It comes after the
                last tensor, so use none of them before the iterator has ended.
        """
        with _read_pairs(self) as pair:
            for name, linear in (self.linears | self.rest).items():
                a, b = pair(name)
                for rank, run in itertools.groupby(
                    range(len(linear.ranks)), linear.ranks.__getitem__
                ):
                    first, *others = run
                    experts = slice(first, first + 1 + len(others))
                    side = a if len(a) == 1 else a[experts]  # one A may serve all experts
                    yield name, first, side[:, :rank], b[experts, :, :rank]
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """Reads the files once more.

        Raises:
            AdapterError: their content is another than when the adapter was opened.
        """
        if (found := content_digest(self.path)) != self.digest:
            raise refuse(
                self.path,
                f"{self.path}: its content changed while it was read (hash {found[:16]}, expected "
                f"{self.digest[:16]}); {LOAD_AGAIN}",
            )


def open_adapter(
    path: str | Path, backbone: Backbone | None = None, rest: bool = False
) -> OpenedAdapter:
    """Opens an adapter directory after every check that needs no device, values included.

    Args:
        path: the directory: an AdaFuse adapter or a PEFT LoRA.
        backbone: what its names and shapes must fit. Its linears are all that may be adapted, of
            whatever class; they may be a mapping of the caller's own. None: where nothing is
            known of the backbone, names and shapes are left to the worker.
        rest: whether a LoRA may have a rest, see `plain_loras.py`.

    Raises:
        AdapterError: with every problem found.
    """
    root = Path(os.path.abspath(os.path.expanduser(path)))
    files = files_state(root)
    _, problems = list_directory(root)
    if problems:
        raise refuse(root, *problems)
    if reason := refused_directory(root):
        raise refuse(root, reason)
    with as_adapter(root):
        kind = read_json(root / CONFIG_FILE).get("peft_type")
    if kind == "ADAFUSE":
        return replace(_open_mixture(root, backbone), files=files)
    if kind != "LORA":
        raise refuse(
            root,
            f'{root / CONFIG_FILE}: `peft_type` is {show(kind)}, expected "ADAFUSE" or "LORA"; '
            "docs/convert.md lists what `vllm-adafuse convert` makes an AdaFuse adapter of",
        )
    return replace(_open_lora(root, backbone, rest), files=files)


def stamp_path(path: str, digest: str, size: Size = _NO_SIZE) -> str:
    """A path that says which content is meant, and what it takes of the pool."""
    return f"{path}{_STAMP}{digest}&pages={size.pages}&columns={size.columns}"


def split_path(path: str) -> tuple[str, str | None]:
    """(path, digest) of `stamp_path`; the digest of any other path is None."""
    found = _STAMPED.fullmatch(path)
    return (found["path"], found["digest"]) if found else (path, None)


@functools.lru_cache(maxsize=1 << 12)
def size_in_path(path: str) -> Size:
    """The size of `stamp_path`; nothing for any other path."""
    found = _STAMPED.fullmatch(path)
    return Size(int(found["pages"]), int(found["columns"])) if found else Size(0)


def files_state(path: Path) -> tuple[tuple[int, ...], ...]:
    """What tells that an adapter's files have changed, without reading them: of config and weights
    size, time in ns, inode and device; zeros of a file that is not there."""
    state: list[tuple[int, ...]] = []
    for file in (path / CONFIG_FILE, weights_file(path)):
        try:
            found = file.stat()
        except OSError:  # reading it will say why
            state.append((0, 0, 0, 0))
        else:
            state.append((found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev))
    return tuple(state)


def content_digest(path: Path) -> str:
    """What an adapter directory holds, as 64 hexadecimal digits. A pickle counts by its bytes.

    Raises:
        AdapterError: a file cannot be read.
    """
    file = weights_file(path)
    if file.name == WEIGHTS_FILE:
        return content_hash(path)
    digest = hashlib.sha256()
    try:
        for part in (path / CONFIG_FILE, file):
            with open_regular(part) as opened:
                size = os.fstat(opened.fileno()).st_size
                if size > (memory := machine_memory()):
                    raise FileProblem(
                        f"{part}: is {size} bytes long, more than the {memory} of this machine's "
                        "memory"
                    )
                digest.update(size.to_bytes(8, "little"))
                while chunk := opened.read(1 << 20):
                    digest.update(chunk)
    except OSError as e:
        raise refuse(path, f"{file}: cannot be read ({e.strerror})") from e
    except FileProblem as e:
        raise refuse(path, str(e)) from e
    return digest.hexdigest()


def weights_file(path: Path) -> Path:
    """The file that an adapter directory's tensors are read from."""
    pickled = path / PICKLE_FILE
    only_pickled = os.path.isfile(pickled) and not os.path.lexists(path / WEIGHTS_FILE)
    return pickled if only_pickled else path / WEIGHTS_FILE


def _open_mixture(path: Path, backbone: Backbone | None) -> OpenedAdapter:
    # The hash comes first, of files that are worth it: what is read behind it is of that content, or
    # `check_unchanged` tells in the end.
    _, problems = check_adapter(path, backbone, values=False)
    digest = "" if problems else content_digest(path)
    adapter = load_adapter(path, backbone)
    if problems:
        raise refuse(path, f"{path}: its files changed while they were read; {LOAD_AGAIN}")
    config, linears = adapter.config, {}
    for name in adapter.projections:
        shape_a = adapter.tensors[f"{name}.lora_A"].shape
        experts, size_out, _ = adapter.tensors[f"{name}.lora_B"].shape
        linears[name] = AdaptedLinear(
            shape_a[2], size_out, config.ranks[:experts], config.scales[:experts]
        )
    return OpenedAdapter(path, MIXTURE, config.num_experts, digest, linears, adapter)


def _open_lora(path: Path, backbone: Backbone | None, rest: bool) -> OpenedAdapter:
    if not os.path.lexists(weights_file(path)):
        raise refuse(
            path,
            f"{path}: holds neither {WEIGHTS_FILE} nor {PICKLE_FILE}; name the directory that the "
            "training run saved",
        )
    digest = content_digest(path)
    linears: dict[str, AdaptedLinear] = {}
    others: dict[str, AdaptedLinear] = {}
    parts, heads = read_parts(path, backbone, rest)
    for name, part in parts.items():
        adapted = AdaptedLinear(part.a.shape[1], part.b.shape[0], (part.rank,), (part.scale,))
        (others if is_rest(name) else linears)[name] = adapted
    sizes = {name: (weight.shape[1], len(weight)) for name, (weight, _) in heads.items()}
    opened = OpenedAdapter(path, LORA, 1, digest, linears, rest=others, heads=sizes)
    opened.check_unchanged()
    return opened


@contextmanager
def _read_pairs(opened: OpenedAdapter) -> Iterator:
    """Yields `pair(linear) -> (A [E or 1, r, in], B [E, out, r])`."""
    if opened.adapter is not None:
        with opened.adapter.reader() as read:
            yield lambda name: (read(f"{name}.lora_A"), read(f"{name}.lora_B"))
        return
    with read_pairs(opened.path) as pair:
        yield pair
