"""Perplexity of a causal LM on blocks of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import cross_entropy


@torch.no_grad()
def next_token_scores(model: Any, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Held-out loss of a model, in eval mode; its mode is put back.

    Args:
        model: called as a Hugging Face causal LM.
        batches: input_ids, labels (-100: no loss) and, if any, attention_mask, [batch, length].

    Returns:
        "loss": mean negative log-likelihood per token in nats; "perplexity"; "accuracy": share of
        tokens whose most likely guess is right; "tokens": how many had loss.
    """
    was_training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        at = labels != -100
        logits, labels = logits[at].float(), labels[at]
        loss += cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(-1) == labels).sum().item()
        count += labels.numel()
    model.train(was_training)
    mean = loss / count if count else math.nan
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)) if count else math.nan,
        "accuracy": right / count if count else math.nan,
        "tokens": count,
    }
