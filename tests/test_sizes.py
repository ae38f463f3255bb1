"""One token in steps of several sizes, which take other kernels: how far its results may differ."""

import pytest
import torch
from ops import DEVICE, error, joint_of, linear_truth, make_problem
from vllm_adafuse.kernels.expand import expand_raw_triton
from vllm_adafuse.kernels.stream_linear import stream_linear_triton
from vllm_adafuse.kernels.tile_linear import tile_linear_triton
from vllm_adafuse.kernels.wide_expand import wide_expand_triton

WIDTHS, SIZE_IN, RANK = [64, 64], 96, 16


def common(p, big, tokens):
    """The first tokens of the big problem, with the weights of p."""
    p.x, p.gates = big.x[:tokens], big.gates[:tokens].contiguous()
    return p


def streamed(p, counter, activation):
    return stream_linear_triton(
        p.x, p.weight, None, p.bank_a, p.bank_b, p.gates, p.present, counter, p.scratch,
        p.parts, p.widths, activation,
    )  # fmt: skip


def tiled(p, counter, activation):
    joint = joint_of(p)
    return tile_linear_triton(
        p.x, joint, None, p.bank_b, p.gates, counter, p.scratch, p.parts, p.widths,
        activation,
    )  # fmt: skip


def products(p):
    return p.x @ p.weight.T, p.x @ p.bank_a.flatten(0, 2).T


def expanded(p, counter, activation):
    y, s = products(p)
    shared = p.bank_b, p.gates, p.present, p.parts, p.widths, activation
    return expand_raw_triton(y, s, None, *shared)


def wide(p, counter, activation):
    return wide_expand_triton(*products(p), p.bank_b, p.gates, p.widths, activation)


PATHS = {
    "stream": (5, streamed), "tile": (40, tiled), "expand": (90, expanded),
    "wide": (120, wide),
}  # fmt: skip


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("activation", ["", "silu"])
def test_sizes_differ_by_less_than_two_roundings(dtype, activation):
    big = make_problem(150, SIZE_IN, WIDTHS, 8, 2, RANK, dtype=dtype)
    results = {}
    for name, (tokens, run) in PATHS.items():
        p = common(make_problem(150, SIZE_IN, WIDTHS, 8, 2, RANK, dtype=dtype), big, tokens)
        counter = torch.zeros(4, dtype=torch.int32, device=DEVICE)
        results[name] = run(p, counter, activation)[:5]
    p = common(big, big, 5)
    truth = linear_truth(p, activation)
    plain = 1e-5 if dtype == torch.float32 else error(linear_truth(p, activation, dtype), truth)
    for one in results.values():
        for other in results.values():
            assert ((one.double() - other.double()).norm() / truth.norm()).item() <= 2 * plain
