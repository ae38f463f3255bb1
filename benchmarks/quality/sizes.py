"""How large the experiment is: everything that the sizes `toy` and `full` differ in."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Size:
    """One size of the experiment.

    Attributes:
        hidden, layers, heads, inter: of the backbone, a Llama with tied embeddings.
        vocab: of the tokenizer, which is trained here.
        length: tokens of a block.
        pretrain_bytes: text for the backbone.
        adapt_bytes, valid_bytes, held_bytes: text of each domain for adapters, for choosing
            learning rates, and to judge by.
        pretrain_steps, pretrain_batch, pretrain_lr: of the backbone; blocks per step.
        steps, batch: of every adapted method; blocks per step.
        r, experts: rank of one expert, E. The static LoRAs have rank 2 r and E r.
        rates: learning rates that are tried, times 1 for adapters and `full_rate` for all weights.
        full_rate: see `rates`.
        seeds: of the adapted methods.
        judge_blocks: held-out blocks per domain.
    """

    hidden: int
    layers: int
    heads: int
    inter: int
    vocab: int
    length: int
    pretrain_bytes: int
    adapt_bytes: int
    valid_bytes: int
    held_bytes: int
    pretrain_steps: int
    pretrain_batch: int
    pretrain_lr: float
    steps: int
    batch: int
    r: int
    experts: int
    rates: tuple[float, ...]
    full_rate: float
    seeds: tuple[int, ...]
    judge_blocks: int


SIZES = {
    # 30 million parameters.
    "full": Size(
        hidden=512, layers=8, heads=8, inter=1408, vocab=8192, length=512,
        pretrain_bytes=120 * MIB, adapt_bytes=6 * MIB, valid_bytes=MIB // 4,
        held_bytes=MIB // 2, pretrain_steps=3000, pretrain_batch=64, pretrain_lr=1e-3,
        steps=400, batch=64, r=8, experts=8, rates=(1e-3, 2e-3, 4e-3), full_rate=0.25,
        seeds=(0, 1, 2), judge_blocks=128,
    ),
    # 1 million: a look at the method within an hour of two CPU cores.
    "small": Size(
        hidden=128, layers=4, heads=4, inter=352, vocab=2048, length=64,
        pretrain_bytes=16 * MIB, adapt_bytes=MIB, valid_bytes=MIB // 16,
        held_bytes=MIB // 8, pretrain_steps=1000, pretrain_batch=32, pretrain_lr=4e-3,
        steps=300, batch=16, r=4, experts=8, rates=(4e-3,), full_rate=0.25,
        seeds=(0,), judge_blocks=64,
    ),
    # Everything runs, nothing is learnt: for tests, a minute on two CPU cores.
    "toy": Size(
        hidden=64, layers=3, heads=2, inter=128, vocab=512, length=32,
        pretrain_bytes=MIB // 8, adapt_bytes=MIB // 64, valid_bytes=MIB // 128,
        held_bytes=MIB // 128, pretrain_steps=20, pretrain_batch=8, pretrain_lr=3e-3,
        steps=6, batch=8, r=2, experts=4, rates=(3e-3,), full_rate=0.25,
        seeds=(0,), judge_blocks=8,
    ),
}  # fmt: skip
