"""Text that machines carry, by domain: gathered, split by file, never in two splits.

What a machine has differs, so two machines give different corpora; on one machine the result is
the same each time. Splits follow a hash of the content: equal files are one file, and a held-out
file of which most lines stand in training files as well (vendored copies, licences) is dropped.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.quality.made import make
from benchmarks.quality.sizes import MIB, Size

SUFFIXES = {
    "python": {".py", ".pyi"},
    "c": {".h", ".hpp", ".hh", ".cuh", ".c", ".cc", ".cpp", ".cu", ".inl"},
    "prose": {".txt", ".rst", ".md"},
    "html": {".html", ".htm", ".xhtml", ".xml", ".svg", ".css", ".js", ".mjs"},
    "json": {".json", ".jsonl", ".ipynb"},
}
PROSE_NAMES = {"METADATA", "README", "LICENSE", "LICENCE", "COPYING", "NOTICE", "copyright"}
DOMAINS = tuple(SUFFIXES)
# Of the pretraining text. What adapters are for, the backbone saw little of.
PRETRAIN_SHARES = {"python": 0.70, "prose": 0.24, "c": 0.02, "html": 0.02, "json": 0.02}
SPLITS = ("pretrain", "adapt", "valid", "held")
SMALLEST, LARGEST = 400, 200_000  # bytes; longer files are cut
LARGEST_SCARCE = 4_000_000  # in domains of which a machine has little
MIN_FILES = 20  # of a domain, as far as cutting them achieves it
SKIPPED = {"__pycache__", ".git", "node_modules", "proc", "sys"}
NEAR_COPY = 0.5  # share of a file's lines that stand in training files


@dataclass(frozen=True)
class Recipe:
    """Which domains there are.

    Attributes:
        suffixes: domain -> those of its files, wherever they lie.
        shares: domain -> its share of the pretraining text; all others divide the rest.
        made: of the domains of `made.MADE`.
        text: a folder, or a tar archive, with a folder for each further domain.
        only: leave all others out, if any are named.
        needed: fewer domains are refused.
        least: of `Size.adapt_bytes` and `Size.held_bytes`, the share that a domain must have.
    """

    suffixes: Mapping[str, set[str]]
    shares: Mapping[str, float]
    made: tuple[str, ...] = ()
    text: Path | None = None
    only: tuple[str, ...] = ()
    needed: int = 2
    least: float = 0.0


PAPER = Recipe(SUFFIXES, PRETRAIN_SHARES)


@dataclass(frozen=True)
class Corpus:
    """Texts by domain and split, and where they came from.

    Attributes:
        texts: (domain, split) -> texts.
        counts: domain -> split -> {"files", "bytes"}.
        fingerprint: of all contents.
        notes: what the machine has little of, in words.
        shares: domain -> its share of the pretraining text.
    """

    texts: dict[tuple[str, str], list[str]]
    counts: dict[str, dict[str, dict[str, int]]]
    fingerprint: str
    notes: tuple[str, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def domains(self) -> list[str]:
        return list(self.counts)


def default_roots() -> list[Path]:
    """Folders that usually hold text: Python's library and packages, headers, documentation."""
    paths = {sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")}
    paths |= {p for p in sys.path if p.endswith(("site-packages", "dist-packages", "site"))}
    paths |= {"/usr/include", "/usr/share", "/usr/lib", "/usr/local", "/opt"}
    roots = sorted({Path(p).resolve() for p in paths if Path(p).is_dir()})
    return [r for r in roots if not any(o != r and o in r.parents for o in roots)]


def _domain(name: str, kinds: Mapping[str, set[str]]) -> str | None:
    stem, suffix = os.path.splitext(name)
    for domain, suffixes in kinds.items():
        if suffix.lower() in suffixes:
            return domain
    return "prose" if stem in PROSE_NAMES else None


def _files(roots: list[Path], kinds: Mapping[str, set[str]]) -> Iterator[tuple[str, bytes, str]]:
    """(domain, key, path) of every file. Keys are in random order, but the same each time, and
    wherever the roots lie."""
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in SKIPPED)
            for name in sorted(names):
                if domain := _domain(name, kinds):
                    path = os.path.join(folder, name)
                    key = hashlib.sha256(os.path.relpath(path, root).encode()).digest()
                    yield domain, key, path


def _read(path: str, largest: int = LARGEST) -> str | None:
    """A file's text; None if it is no plain UTF-8 text of a useful length."""
    try:
        if not os.path.isfile(path) or os.path.getsize(path) < SMALLEST:
            return None
        with open(path, "rb") as file:
            raw = file.read(largest)
    except OSError:  # unreadable: another user's file
        return None
    return _decoded(raw)


def _decoded(raw: bytes) -> str | None:
    text = raw.decode("utf-8", "ignore")
    return text if len(text.encode()) > 0.98 * len(raw) and "\0" not in text else None


def _lines(text: str) -> set[int]:
    return {hash(line) for raw in text.splitlines() if len(line := raw.strip()) >= 25}


def gather(size: Size, roots: list[Path] | None = None, recipe: Recipe = PAPER) -> Corpus:
    """Reads and splits the corpus.

    Args:
        size: how much of it.
        roots: folders to search; default `default_roots()`.
        recipe: the domains.

    Raises:
        ValueError: fewer domains than the recipe needs have text for every split; where enough
            have it, the others are left out, with a note.
    """
    shares, reserve = _shares(recipe), size.adapt_bytes + 4 * (size.valid_bytes + size.held_bytes)
    wanted = {d: size.pretrain_bytes * share + reserve for d, share in shares.items()}
    paths: dict[str, list[tuple[bytes, str]]] = {domain: [] for domain in recipe.suffixes}
    for domain, key, path in _files(roots or default_roots(), recipe.suffixes):
        paths[domain].append((key, path))
    texts: dict[tuple[str, str], list[str]] = {}
    counts: dict[str, dict[str, dict[str, int]]] = {}
    notes, poor, digest = [], [], hashlib.sha256()
    for domain, room in wanted.items():
        largest = min(LARGEST, int(room / MIN_FILES))
        if domain in recipe.made:
            files = _hashed(make(domain, room, 2 * MIN_FILES), room)
        elif domain in paths:
            names = paths[domain]
            files = _texts(names, room, largest)
            if sum(len(text) for _, text in files) < room:
                files = _texts(names, room, LARGEST_SCARCE)
        else:
            files = _hashed((t[:largest] for t in _given(recipe.text, domain)), room)
        split = _split(files, size, size.pretrain_bytes * shares[domain])
        parts = {s: {"files": len(split[s]), "bytes": sum(len(t.encode()) for t in split[s])}
                 for s in SPLITS}  # fmt: skip
        floors = {"adapt": size.adapt_bytes, "held": size.held_bytes, "valid": 0}
        lacking = [f"{domain}/{s}" for s in SPLITS[1:]
                   if not split[s] or parts[s]["bytes"] < recipe.least * floors[s]]  # fmt: skip
        total = sum(len(text.encode()) for _, text in files)
        if lacking:
            poor += lacking
            notes.append(f"{domain} is left out: {len(files)} files of {total / MIB:.2f} MiB")
            continue
        if total < 0.9 * room:
            notes.append(f"{domain} is scarce: {total / MIB:.1f} MiB in {len(files)} files, "
                         f"{room / MIB:.1f} wanted; its parts are smaller")  # fmt: skip
        digest.update("".join(key for key, _ in files).encode())
        texts |= {(domain, s): split[s] for s in SPLITS}
        counts[domain] = parts
    if len(counts) < recipe.needed:  # experts have nothing to be experts of
        raise ValueError(
            f"too little text on this machine for {', '.join(poor)}; name more --roots"
            + (f" or --text: {len(counts)} domains of {recipe.needed}" if recipe.needed > 2 else "")
        )
    kept = {d: shares[d] for d in counts}
    return Corpus(texts, counts, digest.hexdigest()[:16], tuple(notes), kept)


def _shares(recipe: Recipe) -> dict[str, float]:
    """Every domain of a recipe, and its share of the pretraining text."""
    domains = [*recipe.suffixes, *recipe.made]
    if recipe.text:
        further = sorted({name.split("/")[0] for name, _ in _entries(recipe.text)})
        if twice := set(further) & set(domains):
            raise ValueError(f"--text {recipe.text} has {sorted(twice)}, which are domains already")
        domains += further
    if unknown := set(recipe.only) - set(domains):
        raise ValueError(f"--domains has {sorted(unknown)}, expected some of {domains}")
    domains = [d for d in domains if not recipe.only or d in recipe.only]
    others = max(1, sum(d not in recipe.shares for d in domains))
    rest = max(0.0, 1 - sum(recipe.shares.values())) / others
    return {d: recipe.shares.get(d, rest) for d in domains}


def _entries(text: Path) -> Iterator[tuple[str, bytes]]:
    """(domain/file, content) of a folder or an archive; of the latter what lies in folders."""
    if text.is_dir():
        for path in sorted(text.glob("*/**/*")):
            if path.is_file():
                yield path.relative_to(text).as_posix(), path.read_bytes()
        return
    try:
        with tarfile.open(text) as archive:
            for entry in archive:
                if entry.isfile() and "/" in (name := entry.name.removeprefix("./")):
                    yield name, archive.extractfile(entry).read()
    except (OSError, tarfile.TarError) as e:
        raise ValueError(f"--text {text} is neither a folder nor a tar archive ({e})") from e


def _given(text: Path, domain: str) -> Iterator[str]:
    for name, raw in _entries(text):
        if name.startswith(f"{domain}/") and (found := _decoded(raw)) is not None:
            yield found


def _hashed(texts: Iterable[str], wanted: float) -> list[tuple[str, str]]:
    """(hash, text), each text once, until they are as many bytes as wanted; sorted by hash."""
    seen: dict[str, str] = {}
    total = 0
    for text in texts:
        if total >= wanted:
            break
        raw = text.encode()
        key = hashlib.sha256(raw).hexdigest()
        total += 0 if key in seen else len(raw)
        seen[key] = text
    return sorted(seen.items())


def _texts(names: list[tuple[bytes, str]], wanted: float, largest: int) -> list[tuple[str, str]]:
    """(hash, text) of files of any part of the machine, each text once, sorted by hash."""
    read = (_read(name, largest) for _, name in sorted(names))
    return _hashed((text for text in read if text is not None), wanted)


def _split(files: list[tuple[str, str]], size: Size, pretrain: float) -> dict[str, list[str]]:
    """Texts by split; files are sorted by hash, so that this is a random split."""
    total = sum(len(text.encode()) for _, text in files)
    rooms = {  # held-out files twice over: near copies are dropped
        "held": min(2 * size.held_bytes, 0.1 * total),
        "valid": min(2 * size.valid_bytes, 0.05 * total),
        "adapt": min(size.adapt_bytes, 0.5 * total),
        "pretrain": pretrain,
    }
    made: dict[str, list[str]] = {split: [] for split in SPLITS}
    order, used = list(rooms), 0.0
    for _, text in files:
        if used >= rooms[order[0]] and len(order) > 1:
            order.pop(0)
            used = 0.0
        if used < (room := rooms[order[0]]):
            if order[0] in ("held", "valid"):  # no judging by a single long file
                text = text[: max(SMALLEST, int(room / 8))]
            made[order[0]].append(text)
            used += len(text.encode())
    known: set[int] = set()
    for split in ("pretrain", "adapt"):
        for text in made[split]:
            known |= _lines(text)
    for split, room in (("valid", size.valid_bytes), ("held", size.held_bytes)):
        kept, used = [], 0
        for text in made[split]:
            lines = _lines(text)
            if used < room and len(lines & known) <= NEAR_COPY * len(lines):
                kept.append(text)
                used += len(text.encode())
        made[split] = kept
        for text in kept:
            known |= _lines(text)
    return made
