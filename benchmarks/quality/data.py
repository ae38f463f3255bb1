"""Tokenizer and blocks of tokens, made once and kept in the work folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality.corpus import PAPER, Recipe, gather
from benchmarks.quality.sizes import Size

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>"]
TOKENIZER_SHARE = 1 / 6  # of the pretraining text: enough for some thousand tokens, and quick
CORPUS_FILE, TOKENS_FILE = "corpus.json", "tokens.npz"
EPOCHS = 4  # a domain with little text is not read more often than this in pretraining


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


def prepare(
    size: Size, work: Path, roots: list[Path] | None, recipe: Recipe = PAPER
) -> None:
    """Gathers the corpus, trains the tokenizer (of all domains alike), writes the tokens."""
    from transformers import AutoTokenizer

    corpus = gather(size, roots, recipe)
    for line in corpus.notes:
        print(f"  {line}", flush=True)
    sample: list[str] = []
    for domain in corpus.domains:  # equal shares: rare domains are not cut into bytes
        used = 0
        for text in corpus.texts[domain, "adapt"] + corpus.texts[domain, "pretrain"]:
            if used >= TOKENIZER_SHARE * size.pretrain_bytes / len(corpus.domains):
                break
            sample.append(text)
            used += len(text)
    train_tokenizer(sample, size.vocab, work / "base")
    tokenizer = AutoTokenizer.from_pretrained(work / "base", trust_remote_code=False)
    arrays = {}
    for (domain, split), texts in corpus.texts.items():
        ids = [tokenizer.bos_token_id]
        for start in range(0, len(texts), 1000):
            rows = tokenizer.backend_tokenizer.encode_batch(
                texts[start : start + 1000], add_special_tokens=False
            )
            for row in rows:
                ids += [*row.ids, tokenizer.eos_token_id]
        arrays[f"{domain}/{split}"] = np.array(ids, dtype=np.uint16)
        corpus.counts[domain][split]["tokens"] = len(ids)
    np.savez(work / TOKENS_FILE, **arrays)
    content = {
        "counts": corpus.counts, "fingerprint": corpus.fingerprint, "notes": list(corpus.notes),
        "shares": corpus.shares,
    }  # fmt: skip
    (work / CORPUS_FILE).write_text(json.dumps(content, indent=1))


class _Tokens(dict):
    """(domain, split) -> int32 [tokens], read when first asked for."""

    def __init__(self, file: Path):
        super().__init__()
        self.file = file

    def __missing__(self, key: tuple[str, str]) -> torch.Tensor:
        with np.load(self.file) as arrays:
            self[key] = torch.from_numpy(arrays["/".join(key)].astype(np.int32))
        return self[key]


class Data:
    """The tokens of the work folder, as blocks.

    Attributes:
        size: of the experiment.
        info: corpus.json.
        domains: that the machine has text of.
        tokens: (domain, split) -> int32 [tokens].
    """

    def __init__(self, size: Size, work: Path):
        self.size = size
        self.info = json.loads((work / CORPUS_FILE).read_text())
        self.domains = list(self.info["counts"])
        self.tokens = _Tokens(work / TOKENS_FILE)
        self._shares: dict[str, float] | None = None

    def windows(self, domain: str, split: str, count: int, rng: torch.Generator) -> torch.Tensor:
        tokens, length = self.tokens[domain, split], self.size.length
        starts = torch.randint(0, max(1, len(tokens) - length), (count,), generator=rng)
        tokens = tokens if len(tokens) >= length else tokens.repeat(length // len(tokens) + 1)
        return tokens[starts[:, None] + torch.arange(length)].long()

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
        weights = torch.tensor([shares[d] if shares else 1.0 for d in self.domains])
        picked = torch.multinomial(weights, count, replacement=True, generator=rng)
        rows = [
            self.windows(domain, split, n, rng)
            for i, domain in enumerate(self.domains)
            if (n := int((picked == i).sum()))
        ]
        return torch.cat(rows)

    def pretraining(self, rng: torch.Generator) -> torch.Tensor:
        """A batch for the backbone; a domain gets what its text carries for EPOCHS."""
        if self._shares is None:
            steps = self.size.pretrain_steps * self.size.pretrain_batch * self.size.length
            counts = {d: self.info["counts"][d]["pretrain"]["tokens"] for d in self.domains}
            self._shares = {
                d: min(self.info["shares"][d], EPOCHS * n / steps) if n > self.size.length else 0.0
                for d, n in counts.items()
            }
            if not any(self._shares.values()):
                raise ValueError(
                    f"no domain has more than {self.size.length} tokens to pretrain on; name more "
                    "--roots"
                )
        return self.batch("pretrain", self.size.pretrain_batch, rng, self._shares)

    def judged(self, domain: str, split: str = "held") -> torch.Tensor:
        """A domain's text in blocks that do not overlap, from all over it, [N, length]."""
        tokens, length = self.tokens[domain, split], self.size.length
        if len(tokens) < length:
            tokens = tokens.repeat(length // len(tokens) + 1)
        blocks = tokens[: len(tokens) // length * length].view(-1, length)
        count = min(self.size.judge_blocks, len(blocks))
        return blocks[torch.linspace(0, len(blocks) - 1, count).long()].long()
