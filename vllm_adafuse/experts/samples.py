"""Texts of the experts' domains as token ids, parted into what is fitted and what is held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.pretrained import load_tokenizer
from vllm_adafuse.format.vocabulary import require_rows
from vllm_adafuse.text import show

WINDOW = 64  # tokens judged together
VALIDATION = 0.1


@dataclass(frozen=True)
class Sample:
    """The text of one domain, token ids [T] int64 each.

    Attributes:
        fit: what the router is fitted to.
        validation: chooses how strongly it is regularised.
        held_out: never seen while fitting; the last part of every file.
    """

    fit: torch.Tensor
    validation: torch.Tensor
    held_out: torch.Tensor


def read_samples(
    files: dict[str, list[Path]], base: Path, rows: int, held_out: float = 0.2
) -> dict[str, Sample]:
    """Reads and tokenizes; nothing is shuffled, so that parts do not share sentences.

    Args:
        files: domain -> UTF-8 text files.
        base: the backbone's directory, with its tokenizer.
        rows: of its embedding.
        held_out: share of every file's end to hold out.

    Raises:
        AdapterError: no tokenizer, a file that cannot be read, too little text, or a
            token without a row.
    """
    tokenizer = load_tokenizer(base)
    samples, problems = {}, []
    needed = round(2 * WINDOW / held_out)  # two windows held out
    for name, paths in files.items():
        parts = []
        for path in paths:
            try:
                text = Path(path).read_text("utf-8")
            except (OSError, UnicodeDecodeError) as e:
                why = getattr(e, "strerror", None) or e
                problems.append(f"sample {path}: cannot be read as UTF-8 text ({why})")
                continue
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            require_rows(ids, rows, tokenizer, base)
            ids = torch.tensor(ids, dtype=torch.long)
            cut = len(ids) - round(held_out * len(ids))
            fit = cut - round(VALIDATION * len(ids))
            parts.append((ids[:fit], ids[fit:cut], ids[cut:]))
        if not parts:
            continue
        sample = Sample(*(torch.cat(ids) for ids in zip(*parts)))
        total = sum(len(ids) for ids in vars(sample).values())
        if total < needed:
            problems.append(
                f"samples of {show(name)[1:-1]}: {total} tokens, expected at least {needed} "
                "(better some 10 000: a few dozen pages)"
            )
        samples[name] = sample
    if problems:
        raise AdapterError("samples", problems)
    return samples
