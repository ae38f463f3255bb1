"""Token ids that benchmarks send: uniform ones or real text, and requests of everyday lengths.

    python -m benchmarks.prompts ids-128256.npy --vocab 128256

writes ids of real text: a tokenizer of that vocabulary is trained on text that this machine's
packages carry, and encodes some of it. `--text-ids` of the benchmarks takes such a file.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FIRST = 3  # ids below it may be special
# Everyday lengths, in tokens: medians and spreads of log-normal ones, and what they are cut to.
PROMPTS, OUTPUTS = (120, 0.9, 8, 1500), (80, 0.7, 4, 256)
TEXT_MIB, KEPT = 48, 400_000  # text that a tokenizer is trained on; ids that are saved


class Ids:
    """What prompts are made of.

    Args:
        vocab: uniform ids are below it.
        rng: draws them, and where a stretch of text begins.
        text: int [n], ids of text in order; None for uniform ones.

    Raises:
        ValueError: the text has ids that the vocabulary has not.
    """

    def __init__(self, vocab: int, rng: random.Random, text: np.ndarray | None = None):
        if text is not None and int(text.max()) >= vocab:
            raise ValueError(f"--text-ids has id {text.max()}, the model's vocabulary {vocab} ids")
        self.vocab, self.rng, self.text = vocab, rng, text

    @property
    def name(self) -> str:
        return "uniform" if self.text is None else "text"

    def prompt(self, length: int, kept: int = 0) -> list[int]:
        """So many ids; not of the last `kept` of the vocabulary, which mean something else."""
        end = self.vocab - kept
        if self.text is None:
            return [self.rng.randrange(FIRST, end) for _ in range(length)]
        at = self.rng.randrange(len(self.text) - length)
        return np.minimum(self.text[at : at + length], end - 1).tolist()

    def said(self) -> list[int] | None:
        """The one token that a request says over and over, drawn from the text, so that a step's
        tokens are distributed as text; None: whatever the model says."""
        return None if self.text is None else [int(self.rng.choice(self.text))]


def read_ids(path: Path) -> np.ndarray:
    """int [n] of a file that this module wrote.

    Raises:
        ValueError: the file has something else.
    """
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"--text-ids {path}: {e}; python -m benchmarks.prompts writes one") from e
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) < 1 << 14:
        raise ValueError(
            f"--text-ids {path}: {ids.dtype} {list(ids.shape)}, expected at least {1 << 14} "
            "integers in one dimension; python -m benchmarks.prompts writes such a file"
        )
    return ids


def everyday(count: int) -> list[tuple[int, int]]:
    """Tokens of prompt and output of so many requests, the same ones each time."""
    rng = random.Random(0)

    def draw(median: int, spread: float, least: int, most: int) -> int:
        return min(most, max(least, round(median * rng.lognormvariate(0, spread))))

    return [(draw(*PROMPTS), draw(*OUTPUTS)) for _ in range(count)]


def ids_of_text(vocab: int, roots: Sequence[Path] | None, mib: float = TEXT_MIB) -> np.ndarray:
    """uint32 [at most KEPT] of text of all kinds that a machine has, by a tokenizer of `vocab` ids.

    Raises:
        ValueError: too little text for so many.
    """
    from transformers import AutoTokenizer

    from benchmarks.quality.corpus import gather
    from benchmarks.quality.data import train_tokenizer
    from benchmarks.quality.sizes import MIB, SIZES

    size = dataclasses.replace(
        SIZES["full"], pretrain_bytes=int(mib * MIB), adapt_bytes=int(mib * MIB / 24)
    )
    texts = gather(size, list(roots) if roots else None).texts
    with tempfile.TemporaryDirectory() as scratch:
        read = [text for (_, split), some in texts.items() if split == "pretrain" for text in some]
        train_tokenizer(read, vocab, Path(scratch))
        tokenizer = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)
    if len(tokenizer) < vocab:
        raise ValueError(
            f"the text has {len(tokenizer)} tokens for a vocabulary of {vocab}; name more --roots"
        )
    # What it was not trained on, of all kinds in turn.
    kinds = [some for (_, split), some in texts.items() if split == "adapt"]
    turns = [some[i] for i in range(max(map(len, kinds))) for some in kinds if i < len(some)]
    ids: list[int] = []
    for text in turns:
        if len(ids) >= KEPT:
            break
        ids += tokenizer.encode(text[:20_000], add_special_tokens=False)
    return np.array(ids[:KEPT], dtype=np.uint32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the file to write, *.npy")
    parser.add_argument("--vocab", type=int, required=True, help="ids of the tokenizer")
    parser.add_argument("--roots", type=lambda t: [Path(p) for p in t.split(",")],
                        help="folders to take text from")  # fmt: skip
    parser.add_argument("--mib", type=float, default=TEXT_MIB, help="of text to train it on")
    options = parser.parse_args()
    ids = ids_of_text(options.vocab, options.roots, options.mib)
    np.save(options.out, ids)
    shares = np.sort(np.bincount(ids))[::-1] / len(ids)
    print(f"{options.out}: {len(ids):,} ids, {(shares > 0).sum():,} of them different; "
          f"the commonest 10 are {shares[:10].sum():.1%}, 100 {shares[:100].sum():.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
