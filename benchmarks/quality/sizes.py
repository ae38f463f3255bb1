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
        pretrain_steps, pretrain_batch, pretrain_lr: of the backbone; blocks per step. Fewer
            steps where time is limited.
        steps, batch: of every adapted method; blocks per step. Where time is limited, all methods
            make fewer steps, and equally many.
        r, experts: rank of one expert, E. The static LoRAs have rank 2 r and E r.
        choices: (learning rate, that of routers as its multiple) of adapters, in the order in
            which they are tried; methods without routers try each rate once.
        full_rate: for all weights, times the rate.
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
    choices: tuple[tuple[float, float], ...]
    full_rate: float
    seeds: tuple[int, ...]
    judge_blocks: int


SIZES = {
    # 30 million parameters.
    "full": Size(
        hidden=512, layers=8, heads=8, inter=1408, vocab=8192, length=512,
        pretrain_bytes=72 * MIB, adapt_bytes=8 * MIB, valid_bytes=MIB // 4,
        held_bytes=MIB // 2, pretrain_steps=3000, pretrain_batch=64, pretrain_lr=1e-3,
        steps=500, batch=32, r=8, experts=8, full_rate=0.125,
        choices=((4e-3, 4.0), (2e-3, 1.0), (8e-3, 1.0), (4e-3, 1.0), (2e-3, 4.0)),
        seeds=(0, 1, 2), judge_blocks=128,
    ),
    # 30 and 120 million, for composed LoRAs: more domains, each with less text.
    "full30": Size(
        hidden=512, layers=8, heads=8, inter=1408, vocab=8192, length=512,
        pretrain_bytes=48 * MIB, adapt_bytes=4 * MIB, valid_bytes=MIB // 8,
        held_bytes=MIB // 4, pretrain_steps=2200, pretrain_batch=64, pretrain_lr=1e-3,
        steps=200, batch=16, r=8, experts=8, full_rate=0.125, choices=((2e-3, 4.0),),
        seeds=(0, 1, 2), judge_blocks=32,
    ),
    "full120": Size(
        hidden=896, layers=12, heads=14, inter=2432, vocab=8192, length=512,
        pretrain_bytes=48 * MIB, adapt_bytes=4 * MIB, valid_bytes=MIB // 8,
        held_bytes=MIB // 4, pretrain_steps=2200, pretrain_batch=64, pretrain_lr=6e-4,
        steps=200, batch=16, r=8, experts=8, full_rate=0.125, choices=((1.5e-3, 4.0),),
        seeds=(0, 1, 2), judge_blocks=24,
    ),
    # 1 million: a look at the method within an hour of two CPU cores.
    "small": Size(
        hidden=128, layers=4, heads=4, inter=352, vocab=2048, length=64,
        pretrain_bytes=16 * MIB, adapt_bytes=MIB, valid_bytes=MIB // 16,
        held_bytes=MIB // 8, pretrain_steps=1000, pretrain_batch=32, pretrain_lr=4e-3,
        steps=300, batch=16, r=4, experts=8, choices=((4e-3, 4.0),), full_rate=0.25,
        seeds=(0,), judge_blocks=64,
    ),
    # Everything runs, nothing is learnt: for tests, a minute on two CPU cores.
    "toy": Size(
        hidden=64, layers=3, heads=2, inter=128, vocab=512, length=32,
        pretrain_bytes=MIB // 8, adapt_bytes=MIB // 64, valid_bytes=MIB // 128,
        held_bytes=MIB // 128, pretrain_steps=20, pretrain_batch=8, pretrain_lr=3e-3,
        steps=6, batch=8, r=2, experts=4, choices=((3e-3, 4.0),), full_rate=0.25,
        seeds=(0,), judge_blocks=8,
    ),
}  # fmt: skip
