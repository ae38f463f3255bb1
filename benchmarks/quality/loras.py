"""LoRAs of single domains, and what can be made of them without training: mixtures, merges."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm_adafuse.format.fp8 import widened
from vllm_adafuse.training import AdaFuseModel, MixtureConfig

from benchmarks.quality.data import Data
from benchmarks.quality.requests import Desk, Requests, judge
from benchmarks.quality.speed import write_peft
from benchmarks.quality.train import DEVICE, fit, generator, load_backbone

DENSITY = 0.5  # that TIES and DARE keep
TRIED = 4  # requests of a domain by which the weight of a merge is chosen


@dataclass(frozen=True)
class LoraPlan:
    """How a LoRA is trained.

    Attributes:
        domains: whose text, with equal shares.
        rank: of the LoRA.
        steps: of `Size.batch` blocks.
        seed: of fresh weights and of the batches.
        seconds: fewer steps are made where these do not suffice.
    """

    domains: tuple[str, ...]
    rank: int
    steps: int
    seed: int
    seconds: float | None = None


def train_lora(data: Data, work: Path, plan: LoraPlan, out: Path) -> tuple[AdaFuseModel, int]:
    """The LoRA, kept in `out`, and the steps that it made."""
    size, seed = data.size, plan.seed
    torch.manual_seed(seed)
    config = MixtureConfig(num_experts=1, top_k=1, r=plan.rank, seed=seed)
    model = AdaFuseModel.from_backbone(load_backbone(work), config, str(work.resolve() / "base"))
    rng, shares = generator(1000 + seed), {d: float(d in plan.domains) for d in data.domains}
    batch = lambda: data.batch("adapt", size.batch, rng, shares)  # noqa: E731
    params = model.parameter_groups(1.0)
    figures = fit(model, params, batch, plan.steps, size.choices[0][0], 0.0, plan.seconds)
    model.save_pretrained(out, dtype=torch.float32)
    return model, int(figures["steps"])


def compose(work: Path, loras: list[Path], **options: Any) -> AdaFuseModel:
    """The LoRAs, of equal rank, as frozen experts under a fresh router."""
    from safetensors.torch import load_file

    found = [load_file(path / "adapter_model.safetensors") for path in loras]
    rank = next(t.shape[1] for name, t in found[0].items() if name.endswith(".lora_A"))
    config = MixtureConfig(num_experts=len(loras), r=rank, **options)
    model = AdaFuseModel.from_backbone(load_backbone(work), config, str(work.resolve() / "base"))
    state = model.state_dict()
    for name in state:
        if ".lora_" in name:
            state[name] = torch.cat([tensors[name] for tensors in found]).float()
    model.load_state_dict(state)
    model.groups.requires_grad_(False)
    return model


def round_experts(model: AdaFuseModel) -> None:
    """Leaves of a model's experts what a pool in fp8 holds of them."""
    state = model.state_dict()
    for a in [name for name in state if name.endswith(".lora_A")]:
        b = a.removesuffix("A") + "B"
        state[a], state[b] = widened(state[a], state[b])
    model.load_state_dict(state)


def force(model: AdaFuseModel, gates: torch.Tensor) -> None:
    """Gives the tokens gates [batch, length or 1, E] instead of asking the router."""
    router = model.all_routers[0]

    def forward(u: torch.Tensor) -> torch.Tensor:
        shape = (*u.shape[:-1], 1, gates.shape[-1])
        router.gates = gates[:, :, None].expand(shape) * router.config.scale
        return router.gates

    router.forward = forward


def one_hot(chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """Gates for `force` of places of experts [batch, length or 1]."""
    return torch.nn.functional.one_hot(chosen.to(DEVICE), experts).float()


def right_half(own: Requests, experts: int) -> torch.Tensor:
    """Gates [batch, length, E] of one who is told the domain of either half."""
    length = own.ids.shape[1]
    later = torch.arange(length, device=own.domains.device) >= length // 2
    return one_hot(torch.where(later, own.domains[:, 1:], own.domains[:, :1]), experts)


def merged(work: Path, loras: list[Path], how: str, desk: Desk) -> tuple[Any, float]:
    """PEFT's own merging with equal weights, and the weight: the better one on other text."""
    from peft import PeftModel

    model, names = None, [path.name for path in loras]
    for path in loras:
        peft = write_peft(path, path.parent / f"{path.name}-peft-{how}")
        if model is None:
            model = PeftModel.from_pretrained(load_backbone(work), peft, adapter_name=path.name)
        else:
            model.load_adapter(peft, adapter_name=path.name)
    sample, found = {"plain": desk.judged("valid", TRIED)["plain"]}, {}
    for weight in (1.0 / len(names), 1.0):
        torch.manual_seed(0)
        name = f"merged-{weight:.3f}".replace(".", "_")
        model.add_weighted_adapter(
            names, [weight] * len(names), name, combination_type=how, density=DENSITY
        )
        model.set_adapter(name)
        found[judge(model, sample, desk.data.size.batch)["plain"]["loss"]] = name, weight
    name, weight = found[min(found)]
    model.set_adapter(name)
    return model, weight
