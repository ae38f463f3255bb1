"""Routes of a step whose tokens belong to different adapters."""

import pytest
import torch
from ops import DEVICE
from vllm_adafuse.kernels.page_routes import (
    PageGates,
    new_tile_blocks,
    page_routes,
    page_routes_torch,
    page_routes_triton,
)
from vllm_adafuse.kernels.spread_routes import new_active

VOCAB, COLUMNS = 50, 8


def problem(tokens: int, pages: int, seed: int = 0):
    """Adapters of random kinds on random pages, tokens of random adapters."""
    draw = torch.Generator().manual_seed(seed)

    def random(high, *shape, low=0):
        return torch.randint(low, high, shape, generator=draw, dtype=torch.int32)

    table = torch.zeros(COLUMNS, VOCAB, dtype=torch.int32)
    directory = torch.full((4 + COLUMNS, pages), -1, dtype=torch.int32)
    order, at, owners = torch.randperm(pages, generator=draw).tolist(), 0, []
    columns = torch.randperm(COLUMNS, generator=draw).tolist()
    while at < pages - 1 and len(owners) < 6:
        taken = sorted(order[at : at + int(random(5, 1, low=1))])
        at += len(taken)
        slot, k = taken[0], int(random(3, 1)) if len(columns) > 1 else 0
        directory[0, taken] = slot
        directory[1, taken] = random(max(1, k + 1), len(taken)) if k else 0
        own, columns = columns[:k], columns[k:]
        scale = torch.rand(1, generator=draw).view(torch.int32)
        directory[2 : 4 + k, slot] = torch.tensor([k, scale, *own])
        table[own] = torch.arange(k, dtype=torch.int32)[:, None]  # a top-k's experts differ
        owners.append(slot)
    choices = torch.tensor([-2, -1, *owners], dtype=torch.int32)
    slots = choices[random(len(choices), tokens + 3).long()]
    ids = random(VOCAB + 5, tokens, low=-2)
    weights = torch.rand(COLUMNS, VOCAB, generator=draw)
    return ids, slots, directory, table, weights


def expected(ids, slots, directory, table, weights):
    pages = directory.shape[1]
    gates = torch.zeros(len(ids), pages)
    for t, token in enumerate(ids.clamp(0, VOCAB - 1).tolist()):
        slot = int(slots[t])
        for page in range(pages) if slot >= 0 else ():
            if directory[0, page] == slot:
                k = int(directory[2, slot])
                scale = directory[3, slot].view(torch.float32)
                gates[t, page] = scale if k == 0 else 0.0
                for column in directory[4 : 4 + k, slot].tolist():
                    if table[column, token] == directory[1, page]:
                        gates[t, page] += weights[column, token]
    return gates


def outputs(rows: int, pages: int):
    lists = new_active(pages, DEVICE), new_tile_blocks(rows, pages, DEVICE)
    semaphores = torch.ones(300, 4, dtype=torch.int32, device=DEVICE)
    return PageGates(torch.full((rows, pages), 7.0, device=DEVICE), *lists, semaphores)


@pytest.mark.parametrize("run", [page_routes_torch, page_routes_triton], ids=["torch", "triton"])
@pytest.mark.parametrize("tokens, pages", [(1, 2), (7, 33), (40, 16), (60, 100), (300, 40), (257, 3)])
def test_gates_of_each_token_are_its_adapters(run, tokens, pages):
    arguments = problem(tokens, pages)
    into = outputs(tokens + 3, pages)
    run(*(tensor.to(DEVICE) for tensor in arguments), into)
    gates, active, tile_blocks, semaphores = (tensor.cpu() for tensor in into)
    reference = expected(*arguments)
    torch.testing.assert_close(gates[:tokens], reference)
    assert (gates[tokens:] == 7).all() and (semaphores == 0).all()
    used = (reference != 0).any(0).nonzero()[:, 0].tolist()
    if tokens > 256:
        assert active[0] == -1
        for listed, of_tile in zip(tile_blocks.tolist(), reference.split(128), strict=True):
            blocks = sorted({page // 8 for page in (of_tile != 0).any(0).nonzero()[:, 0].tolist()})
            assert listed[: 1 + len(blocks)] == [len(blocks), *blocks]
        return
    assert not tile_blocks.any()
    assert active[0] == (sum(1 << p for p in used) if pages <= 64 else -1)
    assert active[1] == len(used) and active[2 : 2 + len(used)].tolist() == used


@pytest.mark.parametrize("run, tokens, k", [
    (page_routes_torch, 3, 256), (page_routes_torch, 300, 256),  # a token uses all
    (page_routes_triton, 3, 9), (page_routes_triton, 300, 2),
])  # fmt: skip
def test_256_experts(run, tokens, k):
    """On 256 of 260 pages, with a column for each of a token's."""
    draw, many = torch.Generator().manual_seed(tokens), 256
    pages, columns = (torch.randperm(260, generator=draw)[:n] for n in (many, k))
    slot = int(pages[0])
    directory = torch.full((4 + 260, 260), -1, dtype=torch.int32)
    directory[0, pages], directory[1, pages] = slot, torch.arange(many, dtype=torch.int32)
    directory[2, slot], directory[4 : 4 + k, slot] = k, columns.int()
    table = torch.zeros(260, VOCAB, dtype=torch.int32)
    table[columns] = torch.rand(VOCAB, many, generator=draw).argsort(1)[:, :k].int().t()
    weights = torch.rand(260, VOCAB, generator=draw)
    ids = torch.randint(0, VOCAB, (tokens,), generator=draw, dtype=torch.int32)
    slots = torch.full((tokens,), slot, dtype=torch.int32)
    into = outputs(tokens, 260)
    run(*(t.to(DEVICE) for t in (ids, slots, directory, table, weights)), into)
    of_expert = torch.zeros(tokens, many)
    of_expert.scatter_(1, table[columns][:, ids].t().long(), weights[columns][:, ids].t())
    reference = torch.zeros(tokens, 260)
    reference[:, pages] = of_expert
    torch.testing.assert_close(into.gates.cpu(), reference)
    used = (reference != 0).any(0).sum()
    assert into.active[0] == -1 and (tokens > 256 or into.active[1] == used)


def test_the_op_is_what_torch_compile_expects():
    given = problem(9, 12)
    arguments = [tensor.to(DEVICE) for tensor in given]
    into = outputs(12, 12)
    torch.library.opcheck(torch.ops.vllm_adafuse.page_routes.default, (*arguments, *into))
    page_routes(*arguments, into)
    torch.testing.assert_close(into.gates[:9].cpu(), expected(*given))
