"""A classifier in front of LoRAs by name: a small transformer, or the nearest centroid.

Both are told the domain of the text that they are fitted to, and pick one LoRA for a whole request
from the beginning of its text.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.quality.data import Data
from benchmarks.quality.requests import SAID_SHARE, Requests
from benchmarks.quality.train import DEVICE, fit, generator

WIDTH, HEADS, LAYERS, RATE, BATCH = 128, 4, 2, 1e-3, 64
CENTROID_BLOCKS = 64  # of each domain
TIMED = 30  # requests, one after the other

Choose = Callable[[torch.Tensor], torch.Tensor]  # ids [N, length] -> places of domains [N]


class Classifier(nn.Module):
    """A transformer encoder with the mean of its states read by a linear layer."""

    def __init__(self, vocab: int, length: int, classes: int):
        super().__init__()
        self.token, self.place = nn.Embedding(vocab, WIDTH), nn.Embedding(length, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, classes)

    dtype = torch.float32  # as `fit` asks a model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """ids [N, length] -> logits [N, classes], and the loss if labels [N] are given."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        logits = self.head(self.body(self.token(input_ids) + self.place(places)).mean(1)).float()
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return _Output(logits, loss)


class _Output:
    def __init__(self, logits: torch.Tensor, loss: torch.Tensor | None):
        self.logits, self.loss = logits, loss


def train_classifier(data: Data, steps: int, seed: int) -> Choose:
    """Fitted to labelled text of all domains."""
    torch.manual_seed(seed)
    said = max(1, int(SAID_SHARE * data.size.length))
    model = Classifier(data.size.vocab, said, len(data.domains)).to(DEVICE)
    rng = generator(4000 + seed)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(len(data.domains), (BATCH,), generator=rng)
        rows = [data.windows(data.domains[d], "adapt", 1, rng)[:, :said] for d in labels.tolist()]
        return torch.cat(rows), labels

    fit(model, list(model.parameters()), batch, steps, RATE, 0.01)
    model.eval()

    @torch.no_grad()
    def choose(ids: torch.Tensor) -> torch.Tensor:
        return model(ids[:, :said]).logits.argmax(-1)

    return choose


def nearest_centroid(data: Data, embedding: torch.Tensor, seed: int) -> Choose:
    """By the mean of the backbone's embeddings [V, H], as of a retriever of adapters."""
    rng, embedding = generator(3000 + seed), embedding.detach().float()
    centroids = torch.stack([
        embedding[data.windows(d, "adapt", CENTROID_BLOCKS, rng).to(DEVICE)].mean((0, 1))
        for d in data.domains
    ])  # fmt: skip

    @torch.no_grad()
    def choose(ids: torch.Tensor) -> torch.Tensor:
        return torch.cdist(embedding[ids].mean(1), centroids).argmin(-1)

    return choose


def measure(choose: Choose, requests: list[Requests]) -> dict[str, float]:
    """How often it is right, and its milliseconds for one request, with the wait for its answer."""
    right = [
        (choose(own.said().to(DEVICE)).cpu() == own.domains[:, 0]).double().mean().item()
        for own in requests
    ]
    one, times = requests[0].said()[:1], []
    for _ in range(TIMED):
        begin = time.perf_counter()
        choose(one.to(DEVICE)).tolist()
        times.append(1e3 * (time.perf_counter() - begin))
    return {"accuracy": statistics.mean(right), "ms": statistics.median(times[TIMED // 3 :])}
