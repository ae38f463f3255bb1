"""Manual pages in other languages than English, as an archive that --text takes.

    python -m benchmarks.quality.manuals text.tar.xz /usr/share/man/de /usr/share/man/ja

A folder makes a domain of its name. Debian's packages manpages-de, manpages-fr, … hold some
thousand pages each, all with translations of the same text: what tells them apart is the language.
"""

from __future__ import annotations

import gzip
import io
import re
import sys
import tarfile
from pathlib import Path

from benchmarks.quality.corpus import SMALLEST

# Of roff: requests whose words are text, and what stands for a character or a change of the font.
SPOKEN = {"B", "I", "R", "BR", "RB", "BI", "IB", "IR", "RI", "SH", "SS", "IP", "TP", "Nm", "Sh"}
ESCAPES = re.compile(r"\\(?:f(?:\[\w*\]|\(\w\w|\w)|s[+-]?\d|\[\w+\]|\(\w\w|[&|^%:,])")
NAMED = {r"\-": "-", r"\ ": " ", r"\e": "\\", r"\(aq": "'", r"\[aq]": "'", r"\(bu": "*", r"\[bu]": "*",
         r"\(lq": '"', r"\(rq": '"', r"\(em": "--", r"\(en": "-", r"\(ti": "~"}  # fmt: skip


def spoken(source: str) -> str:
    """The words of a manual page's roff source, line by line."""
    lines = []
    for line in source.splitlines():
        if line.startswith((".", "'")):
            request, _, words = line[1:].strip().partition(" ")
            line = words if request in SPOKEN else ""
        for escape, character in NAMED.items():
            line = line.replace(escape, character)
        if line := ESCAPES.sub("", line).strip():
            lines.append(line)
    return "\n".join(lines) + "\n"


def write(out: Path, folders: list[Path]) -> dict[str, int]:
    """Writes the archive; returns the bytes of text of each folder.

    Raises:
        ValueError: a folder has no page.
    """
    sizes = {}
    with tarfile.open(out, "w:xz") as archive:
        for folder in folders:
            pages = sorted(folder.rglob("*.gz"))
            texts = (spoken(gzip.decompress(p.read_bytes()).decode("utf-8")) for p in pages)
            total = 0
            for page, text in zip(pages, texts):
                raw = text.encode()
                if len(raw) < SMALLEST:  # a page that only names another one
                    continue
                entry = tarfile.TarInfo(f"{folder.name}/{page.stem}.txt")
                entry.size = len(raw)
                archive.addfile(entry, io.BytesIO(raw))
                total += len(raw)
            if not total:
                raise ValueError(f"{folder} has no *.gz manual page of {SMALLEST} bytes or more")
            sizes[folder.name] = total
    return sizes


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python -m benchmarks.quality.manuals OUT.tar.xz FOLDER…")
    for name, total in write(Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]).items():
        print(f"{name}: {total:,} bytes of text")
