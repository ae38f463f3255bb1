"""A pre-gated student of a layer-wise teacher: which experts belong together, and its start.

The experts of different layers of a layer-wise mixture have numbers, but no ties: expert 3 of one
layer may work for code where expert 3 of the next works for prose. A student with one decision
per token needs experts that go together, so they are renumbered by what they were chosen for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from vllm_adafuse.errors import AdapterError
from vllm_adafuse.format.adapter import load_adapter
from vllm_adafuse.format.layout import router_of
from vllm_adafuse.training.config import MixtureConfig
from vllm_adafuse.training.model import AdaFuseModel

ROUNDS = 8


def best_match(scores: torch.Tensor) -> list[int]:
    """For each row the column of it, so that the sum of scores is large.

    Columns are used once each where there are as many as rows; where there are fewer, each at
    least once. Greedy, then exchanged in pairs until nothing gains.

    Args:
        scores: [E, F], F <= E.
    """
    rows, columns = scores.shape
    chosen = [-1] * rows
    free = set(range(columns))
    for at in torch.argsort(scores.flatten(), descending=True, stable=True).tolist():
        row, column = divmod(at, columns)
        if chosen[row] < 0 and column in free:
            chosen[row] = column
            free.discard(column)
    for row in range(rows):
        if chosen[row] < 0:
            chosen[row] = int(scores[row].argmax())
    table, better = scores.tolist(), True
    while better:
        better = False
        for a in range(rows):
            for b in range(a):
                now = table[a][chosen[a]] + table[b][chosen[b]]
                if table[a][chosen[b]] + table[b][chosen[a]] > now + 1e-12:
                    chosen[a], chosen[b], better = chosen[b], chosen[a], True
    return chosen


def align(
    gates: dict[str, torch.Tensor], experts: int
) -> tuple[dict[str, list[int]], torch.Tensor]:
    """Renumbers the experts of every router, so that equal numbers are chosen for equal tokens.

    Args:
        gates: router -> its gates [T, E_l] on the same T tokens, E_l <= E.
        experts: E.

    Returns:
        router -> for each of the E new numbers the teacher's expert; and the consensus [T, E]:
        the mean gates after renumbering, rows summing to 1.
    """
    largest = max(gates.values(), key=lambda g: g.shape[1])
    consensus = torch.zeros(len(largest), experts, dtype=torch.float64)
    consensus[:, : largest.shape[1]] = largest.double().cpu()
    renumbered: dict[str, list[int]] = {}
    for _ in range(ROUNDS):
        total = torch.zeros_like(consensus)
        before, renumbered = renumbered, {}
        centred = consensus - consensus.mean(0)
        for router, g in gates.items():
            g = g.double().cpu()
            spread = (g - g.mean(0)) / (g.std(0) + 1e-6)
            renumbered[router] = best_match(centred.T @ spread)
            mine = g[:, renumbered[router]]
            total += mine / mine.sum(1, keepdim=True).clamp(min=1e-9)
        consensus = total / total.sum(1, keepdim=True)
        if renumbered == before:
            break
    return renumbered, consensus.float()


def by_token(gates: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each token's gates replaced by their mean over the places where it stands.

    That is all that a router at the entrance can know of them: it sees the token alone.

    Args:
        gates: router -> [T, E_l].
        ids: int64 [T].
    """
    _, token, count = torch.unique(ids, return_inverse=True, return_counts=True)
    return {
        name: (g.new_zeros(len(count), g.shape[1]).index_add_(0, token, g) / count[:, None])[token]
        for name, g in gates.items()
    }


def router_gates(teacher: Any) -> dict[str, torch.Tensor]:
    """Gates [T, E_l] of a teacher's last call, by the linear or block that has the router.

    Args:
        teacher: of `vllm_adafuse.offline.reference.load`, or a layer-wise `AdaFuseModel`.
    """
    if isinstance(teacher, AdaFuseModel):
        return {
            name.removesuffix(".router"): router.gates[..., part, :].flatten(0, -2)
            for name, router, part in teacher.router_names
        }
    return {name: gates.flatten(0, -2) for name, gates in teacher.adafuse.gates.items()}


def student_of(
    path: str, backbone: Any, gates: dict[str, torch.Tensor], **changes: Any
) -> tuple[AdaFuseModel, torch.Tensor]:
    """A pre-gated model with a layer-wise adapter's experts, renumbered.

    Scales become one scale, ranks one rank, parts that are always on join every expert: all
    exact, if the weights sum to 1. A mixture at the MLP's output (MixLoRA) becomes one at the
    linears, which is not the same.

    Args:
        path: the teacher's adapter directory.
        backbone: the model for the student.
        gates: of the teacher on sample tokens, see `router_gates`.
        **changes: options of `MixtureConfig` for the student.

    Returns:
        The student, with a fresh router; and what its router should say of the sample tokens,
        [T, E].

    Raises:
        AdapterError: the teacher is not layer-wise, or the options do not fit.
    """
    adapter = load_adapter(path)
    teacher = adapter.config
    if not teacher.layer_wise:
        raise AdapterError(f"adapter {path}", ["it is pre-gated already; serve it as it is"])
    changes = {"top_k": teacher.top_k, "router_weights": teacher.router_weights, **changes}
    if teacher.always_r and changes["router_weights"] == "softmax_topk":
        raise AdapterError(
            f"adapter {path}",
            ["it has parts that are always on, and weights that do not sum to 1; distil with "
             "router_weights topk_softmax"],
        )  # fmt: skip
    experts, rank = teacher.num_experts, teacher.rank + teacher.always_r
    numbers, consensus = align(gates, experts)
    with adapter.reader() as get:
        tensors = {name: get(name).float() for name in adapter.tensors}
    linears = sorted({n.rsplit(".", 1)[0] for n in tensors if ".lora_" in n or ".always_" in n})
    first = changes.get("router_layer", 0)
    linears = [n for n in linears if int(n.split(".")[2]) >= first]
    config = MixtureConfig(
        num_experts=experts, r=rank, lora_alpha=float(rank), expert_names=teacher.expert_names,
        target_modules=tuple(sorted({n.rsplit(".", 1)[1] for n in linears})), **changes,
    )  # fmt: skip
    student = AdaFuseModel(backbone, config, linears=linears)
    state = student.state_dict()
    for name in linears:
        a, b = state[f"{name}.lora_A"].zero_(), state[f"{name}.lora_B"].zero_()
        if f"{name}.lora_A" in tensors:
            order = numbers[router_of(name, teacher)]
            own_a, own_b = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
            scales = torch.tensor(teacher.scales)[order, None, None]
            a[:, : teacher.rank] = own_a[[0] * experts if teacher.shared_A else order]
            b[:, :, : teacher.rank] = own_b[order] * scales
        if f"{name}.always_A" in tensors:
            a[:, teacher.rank :] = tensors[f"{name}.always_A"]
            b[:, :, teacher.rank :] = tensors[f"{name}.always_B"] * teacher.always_scale
    student.load_state_dict(state)
    return student, consensus


@torch.no_grad()
def router_inputs(model: AdaFuseModel, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """What a pre-gated model's router reads of batches of ids [batch, length]: [T, hidden]."""
    inputs: list[torch.Tensor] = []
    (router,) = model.routers
    handle = router.register_forward_pre_hook(
        lambda module, args: inputs.append(args[0].detach().flatten(0, -2).float())
    )
    was_training = model.training
    model.eval()
    for ids in batches:
        model(input_ids=ids.to(model.device))
    model.train(was_training)
    handle.remove()
    return torch.cat(inputs)


def fit_router(
    student: AdaFuseModel, inputs: torch.Tensor, target: torch.Tensor, steps: int = 300
) -> float:
    """Starts the student's router: cross entropy with what it should say, everything else frozen. What
    it says of the past is nothing at first: `target` is of tokens alone.

    Args:
        student: pre-gated.
        inputs: what its router reads, [T, hidden].
        target: [T, E], rows summing to 1.
        steps: of Adam, on random batches.

    Returns:
        The last cross entropy over that of a router that knows only the mean of `target`.
    """
    (router,) = student.routers
    target = target.to(inputs.device)
    if router.context is not None:
        router.context.data.zero_()
    rate = 0.3 / math.sqrt(inputs.shape[1])
    optimizer = torch.optim.Adam(router.parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    temperature = student.mixture.temperature
    loss = torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps)
        rows = torch.randint(len(inputs), (min(4096, len(inputs)),), generator=generator)
        rows = rows.to(inputs.device)
        z = torch.nn.functional.linear(inputs[rows].float(), router.weight[0])
        z = z if router.bias is None else z + router.bias[0]
        loss = -(target[rows] * torch.log_softmax(z / temperature, -1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean = target.mean(0)
    return loss.item() / max(1e-9, -(mean * mean.clamp(min=1e-9).log()).sum().item())
