"""Text that machines carry, in five domains: gathered, split by file, never in two splits.

What a machine has differs, so two machines give different corpora; on one machine the result is
the same each time. Splits follow a hash of the content: equal files are one file, and a held-out
file of which most lines stand in training files as well (vendored copies, licences) is dropped.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
class Corpus:
    """Texts by domain and split, and where they came from.

    Attributes:
        texts: (domain, split) -> texts.
        counts: domain -> split -> {"files", "bytes"}.
        fingerprint: of all contents.
        notes: what the machine has little of, in words.
    """

    texts: dict[tuple[str, str], list[str]]
    counts: dict[str, dict[str, dict[str, int]]]
    fingerprint: str
    notes: tuple[str, ...] = ()

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


def _domain(name: str) -> str | None:
    stem, suffix = os.path.splitext(name)
    for domain, suffixes in SUFFIXES.items():
        if suffix.lower() in suffixes:
            return domain
    return "prose" if stem in PROSE_NAMES else None


def _files(roots: list[Path]) -> Iterator[tuple[str, bytes, str]]:
    """(domain, key, path) of every file. Keys are in random order, but the same each time, and
    wherever the roots lie."""
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in SKIPPED)
            for name in sorted(names):
                if domain := _domain(name):
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
    text = raw.decode("utf-8", "ignore")
    return text if len(text.encode()) > 0.98 * len(raw) and "\0" not in text else None


def _lines(text: str) -> set[int]:
    return {hash(line) for raw in text.splitlines() if len(line := raw.strip()) >= 25}


def gather(size: Size, roots: list[Path] | None = None) -> Corpus:
    """Reads and splits the corpus.

    Args:
        size: how much of it.
        roots: folders to search; default `default_roots()`.

    Raises:
        ValueError: fewer than two domains have text for every split; where two have it, the
            others are left out, with a note.
    """
    wanted = {
        domain: size.pretrain_bytes * PRETRAIN_SHARES[domain]
        + size.adapt_bytes + 4 * (size.valid_bytes + size.held_bytes)
        for domain in DOMAINS
    }  # fmt: skip
    paths: dict[str, list[tuple[bytes, str]]] = {domain: [] for domain in DOMAINS}
    for domain, key, path in _files(roots or default_roots()):
        paths[domain].append((key, path))
    found: dict[str, list[tuple[str, str]]] = {}
    texts: dict[tuple[str, str], list[str]] = {}
    counts: dict[str, dict[str, dict[str, int]]] = {}
    notes, poor = [], []
    for domain, names in paths.items():
        files = _texts(names, wanted[domain], min(LARGEST, int(wanted[domain] / MIN_FILES)))
        if sum(len(text) for _, text in files) < wanted[domain]:
            files = _texts(names, wanted[domain], LARGEST_SCARCE)
        split = _split(domain, files, size)
        lacking = [f"{domain}/{s}" for s in SPLITS[1:] if not split[domain, s]]
        total = sum(len(text.encode()) for _, text in files)
        if lacking:
            poor += lacking
            notes.append(f"{domain} is left out: {len(files)} files of {total / MIB:.2f} MiB")
            continue
        if total < 0.9 * wanted[domain]:
            notes.append(f"{domain} is scarce: {total / MIB:.1f} MiB in {len(files)} files, "
                         f"{wanted[domain] / MIB:.1f} wanted; its parts are smaller")  # fmt: skip
        found[domain] = files
        texts |= split
        counts[domain] = {
            s: {"files": len(split[domain, s]),
                "bytes": sum(len(t.encode()) for t in split[domain, s])}
            for s in SPLITS
        }  # fmt: skip
    if len(found) < 2:  # experts have nothing to be experts of
        raise ValueError(
            f"too little text on this machine for {', '.join(poor)}; name more --roots"
        )
    digest = hashlib.sha256("".join(k for files in found.values() for k, _ in files).encode())
    return Corpus(texts, counts, digest.hexdigest()[:16], tuple(notes))


def _texts(names: list[tuple[bytes, str]], wanted: float, largest: int) -> list[tuple[str, str]]:
    """(hash, text) of files of any part of the machine, each text once, sorted by hash."""
    seen: dict[str, str] = {}
    total = 0
    for _, name in sorted(names):
        if total >= wanted:
            break
        if (text := _read(name, largest)) is not None:
            raw = text.encode()
            key = hashlib.sha256(raw).hexdigest()
            total += 0 if key in seen else len(raw)
            seen[key] = text
    return sorted(seen.items())


def _split(domain: str, files: list[tuple[str, str]], size: Size) -> dict[tuple[str, str], list]:
    """Texts by split; files are sorted by hash, so that this is a random split."""
    total = sum(len(text.encode()) for _, text in files)
    rooms = {  # held-out files twice over: near copies are dropped
        "held": min(2 * size.held_bytes, 0.1 * total),
        "valid": min(2 * size.valid_bytes, 0.05 * total),
        "adapt": min(size.adapt_bytes, 0.5 * total),
        "pretrain": size.pretrain_bytes * PRETRAIN_SHARES[domain],
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
    return {(domain, split): texts for split, texts in made.items()}
