"""What composed LoRAs are worth to requests that come without a label.

    python -m benchmarks.quality --composed --size full --work /tmp/composed --out /tmp/results
    python -m benchmarks.quality --composed --size toy --work /tmp/toy --out /tmp/results

One LoRA for each domain, trained alone; then, on the same held-out text: an oracle that is told the
domain, routers that see the past and that see the token alone (over frozen LoRAs, without labels),
the average of all, TIES and DARE merging by PEFT, the nearest centroid of embeddings that picks a
LoRA for a request by its first quarter, and one LoRA of all text. Requests that change their domain
half-way are judged beside. Everything made is kept in --work; a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from vllm_adafuse.experts.context import RATE_TIMES_HIDDEN
from vllm_adafuse.training import AdaFuseModel, MixtureConfig

from benchmarks.quality.data import CORPUS_FILE, Data, prepare
from benchmarks.quality.sizes import SIZES, Size
from benchmarks.quality.speed import write_peft
from benchmarks.quality.train import (
    DEVICE,
    _backbone,
    autocast,
    fit,
    generator,
    pretrain,
    release,
)

# Of the steps that a LoRA gets: what a router over frozen LoRAs gets.
ROUTER_SHARE = 0.4
TOKEN_RATE = 4.0  # times the rate of the LoRAs: of a router that sees the token alone
DENSITY = 0.5  # that TIES and DARE keep
RESULT = "composed.json"
NOT_DONE = 3


@torch.no_grad()
def losses(model: Any, ids: torch.Tensor, batch: int, before: Callable | None = None) -> float:
    """Mean loss of blocks [N, length]; before: is told each batch."""
    model.eval()
    total, count = 0.0, 0
    for part in ids.split(batch):
        part = part.to(DEVICE)
        if before is not None:
            before(part)
        with autocast(model):
            logits = model(input_ids=part).logits[:, :-1]
        total += cross_entropy(
            logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"
        ).item()
        count += part[:, 1:].numel()
    return total / count


class Judge:
    """Held-out blocks of each domain, and such as change theirs half-way."""

    def __init__(self, data: Data):
        self.data, self.batch = data, data.size.batch
        self.blocks = {domain: data.judged(domain) for domain in data.domains}
        half, names = data.size.length // 2, data.domains
        pairs = zip(names, names[1:] + names[:1])
        self.switched = {}
        for a, b in pairs:
            n = min(len(self.blocks[a]), len(self.blocks[b]))
            self.switched[a, b] = torch.cat(
                [self.blocks[a][:n, :half], self.blocks[b][:n, half:]], 1
            )

    def __call__(self, model: Any, before: Callable[[str], Callable | None]) -> dict[str, Any]:
        """before: (domain at first) -> what `losses` calls with each batch."""
        one = {d: losses(model, ids, self.batch, before(d)) for d, ids in self.blocks.items()}
        two = [losses(model, ids, self.batch, before(a)) for (a, _), ids in self.switched.items()]
        return {
            "perplexity": math.exp(statistics.mean(one.values())),
            "switched": math.exp(statistics.mean(two)),
            "domains": {d: math.exp(loss) for d, loss in one.items()},
        }


def train_lora(
    size: Size, data: Data, work: Path, domains: list[str], seed: int, out: Path
) -> AdaFuseModel:
    """A LoRA of rank 2 r on some domains' text, or the one that was trained before."""
    if (out / "adapter_config.json").is_file():
        return AdaFuseModel.from_pretrained(_backbone(work), out)
    torch.manual_seed(seed)
    config = MixtureConfig(num_experts=1, top_k=1, r=2 * size.r, seed=seed)
    model = AdaFuseModel.from_backbone(_backbone(work), config, str(work.resolve() / "base"))
    rng, shares = generator(1000 + seed), {d: float(d in domains) for d in data.domains}
    rate = size.choices[0][0]
    params = model.parameter_groups(1.0)
    fit(model, params, lambda: data.batch("adapt", size.batch, rng, shares), size.steps, rate, 0.0)
    model.save_pretrained(out, dtype=torch.float32)
    return model


def compose(size: Size, work: Path, loras: list[Path], **options: Any) -> AdaFuseModel:
    """The LoRAs as frozen experts under a fresh router."""
    config = MixtureConfig(num_experts=len(loras), r=2 * size.r, **options)
    model = AdaFuseModel.from_backbone(_backbone(work), config, str(work.resolve() / "base"))
    state = model.state_dict()
    from safetensors.torch import load_file

    found = [load_file(path / "adapter_model.safetensors") for path in loras]
    for name in state:
        if ".lora_" in name:
            state[name] = torch.cat([tensors[name] for tensors in found]).float()
    model.load_state_dict(state)
    model.groups.requires_grad_(False)
    return model


def force(model: AdaFuseModel, gates: torch.Tensor) -> None:
    """Gives blocks gates [batch, E] instead of asking the router."""
    router = model.all_routers[0]

    def forward(u: torch.Tensor) -> torch.Tensor:
        shape = (*u.shape[:-1], 1, gates.shape[-1])
        router.gates = gates[:, None, None].expand(shape) * router.config.scale
        return router.gates

    router.forward = forward


def merged(work: Path, loras: list[Path], how: str) -> Any:
    """PEFT's own merging of the LoRAs, with equal weights."""
    from peft import PeftModel

    model, names = None, [path.name for path in loras]
    for path in loras:
        peft = write_peft(path, path.parent / f"{path.name}-peft")
        if model is None:
            model = PeftModel.from_pretrained(_backbone(work), peft, adapter_name=path.name)
        else:
            model.load_adapter(peft, adapter_name=path.name)
    torch.manual_seed(0)
    model.add_weighted_adapter(
        names, [1.0 / len(names)] * len(names), "merged", combination_type=how, density=DENSITY
    )
    model.set_adapter("merged")
    return model


class OutOfTime(Exception):
    """--minutes are over; what was made is kept."""


def run_seed(
    size: Size, data: Data, work: Path, seed: int, say: Callable[[str], None], deadline: float
) -> dict[str, Any]:
    """All methods with one seed: method -> figures; those that are there are not made again.

    Raises:
        OutOfTime: something is left to make after the deadline (of `time.time`).
    """
    folder = work / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    file, judge = folder / RESULT, Judge(data)
    done: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    loras = [folder / domain for domain in data.domains]
    for domain, path in zip(data.domains, loras):
        _check(deadline)
        train_lora(size, data, work, [domain], seed, path)
        release()
    place = {domain: i for i, domain in enumerate(data.domains)}
    experts = len(loras)

    def keep(name: str, make: Callable[[], dict[str, Any]]) -> None:
        if name not in done:
            _check(deadline)
            done[name] = make()
            release()
            file.write_text(json.dumps(done, indent=1))
        say(f"seed {seed} {name:14} perplexity {done[name]['perplexity']:.3f}, "
            f"switched {done[name]['switched']:.3f}")  # fmt: skip

    def forced(gates_of: Callable[[str, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        model = compose(size, work, loras, top_k=experts)
        return judge(model, lambda d: lambda ids: force(model, gates_of(d, ids)))

    def one_hot(chosen: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(chosen, experts).float().to(DEVICE)

    def routed(k: int, context: str) -> dict[str, Any]:
        model = compose(size, work, loras, top_k=k, router_context=context, seed=seed)
        router, rng = model.all_routers[0], generator(2000 + seed)
        steps = max(1, round(ROUTER_SHARE * size.steps))
        rate = RATE_TIMES_HIDDEN / size.hidden if context else TOKEN_RATE * size.choices[0][0]
        batch = lambda: data.batch("adapt", size.batch, rng)  # noqa: E731
        fit(model, list(router.parameters()), batch, steps, rate, 0.0)
        return judge(model, lambda d: None)

    def nearest() -> Callable[[str, torch.Tensor], torch.Tensor]:
        embedding = _backbone(work).get_input_embeddings().weight.detach().float()
        rng = generator(3000 + seed)
        centroids = torch.stack([
            embedding[data._windows(d, "adapt", 64, rng).to(DEVICE)].mean((0, 1))
            for d in data.domains
        ])  # fmt: skip

        def choose(domain: str, ids: torch.Tensor) -> torch.Tensor:
            said = embedding[ids[:, : max(1, ids.shape[1] // 4)]].mean(1)
            return one_hot(torch.cdist(said, centroids).argmin(-1))

        return choose

    everyone = torch.full((1, experts), 1.0 / experts, device=DEVICE)
    keep("oracle", lambda: forced(lambda d, ids: one_hot(torch.full((len(ids),), place[d]))))
    for k in dict.fromkeys((1, 2, experts)):
        keep(f"context-k{k}", lambda k=k: routed(k, "mean"))
    for k in dict.fromkeys((2, experts)):
        keep(f"token-k{k}", lambda k=k: routed(k, ""))
    keep("uniform", lambda: forced(lambda d, ids: everyone.expand(len(ids), -1)))
    keep("centroid", lambda: forced(nearest()))
    for how in ("ties", "dare_ties", "dare_linear"):
        keep(how, lambda how=how: judge(merged(work, loras, how), lambda d: None))

    def one_of_all() -> dict[str, Any]:
        lora = train_lora(size, data, work, data.domains, seed, folder / "all")
        return judge(lora, lambda d: None)

    keep("one-lora", one_of_all)
    return done


def _check(deadline: float) -> None:
    if time.time() > deadline:
        raise OutOfTime


def report(results: dict[int, dict[str, Any]]) -> str:
    """A table in Markdown: perplexities, and how far from the oracle."""
    names = list(next(iter(results.values())))
    lines = ["| method | perplexity of each seed | over the oracle | switched half-way |",
             "|---|---|---|---|"]  # fmt: skip
    for name in names:
        own = [found[name]["perplexity"] for found in results.values()]
        gaps = [f[name]["perplexity"] / f["oracle"]["perplexity"] - 1 for f in results.values()]
        switched = statistics.mean(found[name]["switched"] for found in results.values())
        each = ", ".join(f"{value:.3f}" for value in own)
        lines.append(f"| {name} | {each} | {statistics.mean(gaps):+.1%} | {switched:.3f} |")
    return "\n".join(lines)


def main(args: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Runs it; prints the table and writes it with all figures into --out."""
    size, work, begin = SIZES[args.size], args.work, time.time()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / CORPUS_FILE).is_file():
        prepare(size, work, args.roots)
    data = Data(size, work)
    if not (work / "base.json").is_file():
        pretrain(size, data, work, 60 * args.minutes / 3 if args.minutes < 1e6 else None)
    deadline = begin + 60 * args.minutes
    try:
        results = {s: run_seed(size, data, work, s, say, deadline) for s in size.seeds}
    except OutOfTime:
        say("not all is done; call again to go on")
        return NOT_DONE
    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "size": args.size, **dataclasses.asdict(size), "device": DEVICE, "torch": torch.__version__,
        "corpus": data.info, "commit": args.commit, "results": results,
    }  # fmt: skip
    (args.out / RESULT).write_text(json.dumps(content, indent=1))
    print(report(results), flush=True)
    return 0
