"""Tokenizer and blocks of tokens, made once and kept in the work folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality.corpus import DOMAINS, PRETRAIN_SHARES, gather
from benchmarks.quality.sizes import Size

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
TOKENIZER_BYTES = 24 << 20
CORPUS_FILE, TOKENS_FILE = "corpus.json", "tokens.npz"


def train_tokenizer(texts: list[str], vocab: int, path: Path) -> None:
    """A byte-level BPE tokenizer, saved as transformers reads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=SPECIAL[0], eos_token=SPECIAL[1], pad_token=SPECIAL[2]
    )
    fast.save_pretrained(path)


def prepare(size: Size, work: Path, roots: list[Path] | None) -> None:
    """Gathers the corpus, trains the tokenizer (of all domains alike), writes the tokens."""
    from transformers import AutoTokenizer

    corpus = gather(size, roots)
    sample: list[str] = []
    for domain in DOMAINS:  # equal shares: rare domains are not cut into bytes
        used = 0
        for text in corpus.texts[domain, "adapt"] + corpus.texts[domain, "pretrain"]:
            if used >= min(TOKENIZER_BYTES, size.pretrain_bytes) / len(DOMAINS):
                break
            sample.append(text)
            used += len(text)
    train_tokenizer(sample, size.vocab, work / "base")
    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    arrays = {}
    for (domain, split), texts in corpus.texts.items():
        ids = [tokenizer.bos_token_id]
        for start in range(0, len(texts), 1000):
            for row in tokenizer(texts[start : start + 1000])["input_ids"]:
                ids += [*row, tokenizer.eos_token_id]
        arrays[f"{domain}/{split}"] = np.array(ids, dtype=np.uint16)
        corpus.counts[domain][split]["tokens"] = len(ids)
    np.savez(work / TOKENS_FILE, **arrays)
    content = {"counts": corpus.counts, "fingerprint": corpus.fingerprint}
    (work / CORPUS_FILE).write_text(json.dumps(content, indent=1))


class Data:
    """The tokens of the work folder, as blocks."""

    def __init__(self, size: Size, work: Path):
        self.size = size
        self.info = json.loads((work / CORPUS_FILE).read_text())
        with np.load(work / TOKENS_FILE) as arrays:
            self.tokens = {
                tuple(name.split("/")): torch.from_numpy(arrays[name].astype(np.int64))
                for name in arrays.files
            }

    def _windows(self, domain: str, split: str, count: int, rng: torch.Generator) -> torch.Tensor:
        tokens, length = self.tokens[domain, split], self.size.length
        starts = torch.randint(0, max(1, len(tokens) - length), (count,), generator=rng)
        tokens = tokens if len(tokens) >= length else tokens.repeat(length // len(tokens) + 1)
        return tokens[starts[:, None] + torch.arange(length)]

    def batch(
        self, split: str, count: int, rng: torch.Generator, shares: dict[str, float] | None = None
    ) -> torch.Tensor:
        """Random windows, int64 [count, length], each from one domain.

        Args:
            split: of the corpus.
            count: blocks.
            rng: decides all.
            shares: of the domains; default equal.
        """
        weights = torch.tensor([(shares or dict.fromkeys(DOMAINS, 1.0))[d] for d in DOMAINS])
        picked = torch.multinomial(weights, count, replacement=True, generator=rng)
        rows = [
            self._windows(domain, split, n, rng)
            for i, domain in enumerate(DOMAINS)
            if (n := int((picked == i).sum()))
        ]
        return torch.cat(rows)

    def pretraining(self, rng: torch.Generator) -> torch.Tensor:
        """A batch for the backbone; domains without pretraining text are left out."""
        shares = {
            d: share if len(self.tokens[d, "pretrain"]) > self.size.length else 0.0
            for d, share in PRETRAIN_SHARES.items()
        }
        return self.batch("pretrain", self.size.pretrain_batch, rng, shares)

    def judged(self, domain: str, split: str = "held") -> torch.Tensor:
        """A domain's text in blocks that do not overlap, from all over it, [N, length]."""
        tokens, length = self.tokens[domain, split], self.size.length
        if len(tokens) < length:
            tokens = tokens.repeat(length // len(tokens) + 1)
        blocks = tokens[: len(tokens) // length * length].view(-1, length)
        count = min(self.size.judge_blocks, len(blocks))
        return blocks[torch.linspace(0, len(blocks) - 1, count).long()]
