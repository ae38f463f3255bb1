"""What the tests of training share: models on tiny backbones, a plain loop, a measure."""

import torch
from transformers import AutoModelForCausalLM
from vllm_adafuse.training import AdaFuseModel, MixtureConfig


def backbone_of(base, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager")


def make(base, dtype=torch.float32, **options):
    config = MixtureConfig(**{"num_experts": 4, "r": 4} | options)
    return AdaFuseModel.from_backbone(backbone_of(base, dtype), config)


def random_ids(rows=4, length=24, low=6, high=1000, seed=0):
    return torch.randint(low, high, (rows, length), generator=torch.Generator().manual_seed(seed))


def randomise(model, seed=0):
    """B off zero, so that gradients reach everything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in model.groups:
            for b in group.B:
                b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
    return model


def fit(model, ids, steps, lr=1e-2):
    model.train()
    optimizer = torch.optim.AdamW(model.trainable(), lr=lr)
    losses = []
    for step in range(steps):
        model.set_progress(step / steps)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def difference(found, expected):
    return ((found - expected).norm() / expected.norm()).item()
