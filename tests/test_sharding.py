"""Which rows and columns of an adapter each rank of tensor parallelism holds, head by head."""

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm_adafuse.serving.projections import own_rows, slices_of

HEADS, KV_HEADS, SIZE = 8, 2, 4


def layer(kind, rank, size, **attributes):
    """vLLM's linear layer without weights, on one rank of so many."""
    made = kind.__new__(kind)
    made.__dict__ |= {"tp_rank": rank, "tp_size": size, "prefix": "layer", **attributes}
    return made


def qkv(rank, size):
    own, replicas = max(1, KV_HEADS // size), max(1, size // KV_HEADS)
    return layer(
        QKVParallelLinear, rank, size, input_size=32, head_size=SIZE, v_head_size=SIZE,
        total_num_heads=HEADS, num_heads=HEADS // size, total_num_kv_heads=KV_HEADS,
        num_kv_heads=own, num_kv_head_replicas=replicas,
    )  # fmt: skip


def rows_of_heads(*heads) -> list[int]:
    return [head * SIZE + i for head in heads for i in range(SIZE)]


def numbered(rows: int) -> torch.Tensor:
    """B [E, out, R] whose rows say which they are."""
    return torch.arange(rows)[None, :, None].expand(2, rows, 3)


def held(slices) -> list[list[int]]:
    """Of each adapted linear the rows that this rank holds."""
    full = [sum(shard.full for shard in shards) for shards in slices.linear_shards]
    return [
        own_rows(numbered(rows), shards)[1, :, 2].tolist()
        for rows, shards in zip(full, slices.linear_shards)
    ]


# Heads of q, and of k and v, that each rank has.
RANKS = {
    1: [(range(8), (0, 1))],
    2: [(range(4), (0,)), (range(4, 8), (1,))],
    4: [((0, 1), (0,)), ((2, 3), (0,)), ((4, 5), (1,)), ((6, 7), (1,))],
}


@pytest.mark.parametrize("size", RANKS)
def test_heads(size):
    for rank, (heads, kv_heads) in enumerate(RANKS[size]):
        slices = slices_of(qkv(rank, size), ["q", "k", "v"])
        q, kv = rows_of_heads(*heads), rows_of_heads(*kv_heads)
        assert held(slices) == [q, kv, kv]
        assert slices.widths == [len(q), len(kv), len(kv)] and slices.adapted == [0, 1, 2]
        assert (slices.size_in, slices.input_slice) == (32, slice(0, 32))
        some = slices_of(qkv(rank, size), ["q", None, "v"])
        assert held(some) == [q, kv] and some.adapted == [0, -1, 1] and some.adapted_columns == len(q + kv)
        # One linear that is all three (Phi-3): its rows of k begin behind all of q.
        (whole,) = held(one := slices_of(qkv(rank, size), ["qkv"]))
        k, v = HEADS * SIZE, (HEADS + KV_HEADS) * SIZE
        assert whole == q + [k + row for row in kv] + [v + row for row in kv]
        assert one.adapted == [0, 0, 0] and one.widths == slices.widths


@pytest.mark.parametrize("size", [1, 2, 4])
def test_columns_and_rows(size):
    own = 16 // size
    for rank in range(size):
        mine = list(range(rank * own, rank * own + own))
        gate_up = layer(MergedColumnParallelLinear, rank, size, input_size=8, output_sizes=[16, 16])
        assert held(slices_of(gate_up, ["gate", "up"])) == [mine, mine]
        assert held(slices_of(gate_up, ["both"])) == [mine + [16 + row for row in mine]]
        column = layer(ColumnParallelLinear, rank, size, input_size=8, output_size=16)
        assert held(slices_of(column, ["up"])) == [mine]
        row = layer(
            RowParallelLinear, rank, size, input_size=16, output_size=8,
            input_size_per_partition=own,
        )  # fmt: skip
        down = slices_of(row, ["down"])
        assert held(down) == [list(range(8))] and down.size_in == own
        assert list(range(16))[down.input_slice] == mine
        same = layer(ReplicatedLinear, rank, size, input_size=16, output_size=8)
        assert held(slices_of(same, ["same"])) == [list(range(8))]
        assert slices_of(same, ["same"]).input_slice == slice(0, 16)


def test_what_is_not_known_is_refused():
    with pytest.raises(TypeError, match="does not know how LinearBase is sharded"):
        slices_of(layer(LinearBase, 0, 1, input_size=8), ["one"])
    with pytest.raises(ValueError, match="layer has 3 slices, expected"):
        slices_of(qkv(0, 1), ["q", "k"])
