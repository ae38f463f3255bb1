"""Passports to routes: one gather, valid experts in every row."""

import pytest
import torch
from ops import DEVICE
from vllm_adafuse.kernels.gather_routes import (
    gather_routes,
    gather_routes_torch,
    gather_routes_triton,
)


def tables(vocab_size=50, top_k=3, rows=80):
    ids = torch.randint(0, 9, (vocab_size, top_k), dtype=torch.int32, device=DEVICE)
    weights = torch.rand(vocab_size, top_k, device=DEVICE)
    return ids, weights, torch.full((rows, top_k), -7, dtype=torch.int32, device=DEVICE), (
        torch.full((rows, top_k), -7.0, device=DEVICE)
    )


@pytest.mark.parametrize("run", [gather_routes, gather_routes_torch, gather_routes_triton])
@pytest.mark.parametrize("tokens", [1, 7, 70])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_are_the_passports_of_their_tokens(run, tokens, dtype):
    ids, weights, out_ids, out_weights = tables()
    token_ids = torch.randint(0, 50, (tokens,), dtype=dtype, device=DEVICE)
    run(token_ids, ids, weights, out_ids, out_weights)
    assert torch.equal(out_ids[:tokens], ids[token_ids.long()])
    assert torch.equal(out_weights[:tokens], weights[token_ids.long()])
    assert (out_ids[tokens:] == -7).all() and (out_weights[tokens:] == -7).all()


@pytest.mark.parametrize("run", [gather_routes_torch, gather_routes_triton])
def test_garbage_in_padding_rows_gives_valid_experts(run):
    ids, weights, out_ids, out_weights = tables()
    token_ids = torch.tensor([-1, 50, 2**31 - 1, -(2**31), 3], dtype=torch.int32, device=DEVICE)
    run(token_ids, ids, weights, out_ids, out_weights)
    assert torch.equal(out_ids[:5], ids[[0, 49, 49, 0, 3]])
