"""One token in steps of several sizes, which take other kernels: how far its results may differ."""

import pytest
import torch
from ops import error, linear_truth, make_problem
from vllm_adafuse.kernels.decode_gemm import decode_gemm_triton
from vllm_adafuse.kernels.expand import expand_raw_triton
from vllm_adafuse.kernels.tma_expand import tma_expand_triton
from vllm_adafuse.kernels.tma_gemm import tma_gemm_triton

WIDTHS, SIZE_IN, RANK = [64, 64], 96, 16


def common(p, big, tokens):
    """The first tokens of the big problem, with the weights of p."""
    p.x, p.gates = big.x[:tokens], big.gates[:tokens].contiguous()
    return p


def streamed(p, epilogue):
    return decode_gemm_triton(p.x, p.projection(epilogue), p.step())


def tiled(p, epilogue):
    return tma_gemm_triton(p.x, p.projection(epilogue), p.step())


def products(p):
    return p.x @ p.weight.T, p.x @ p.lora_a.flatten(0, 2).T


def expanded(p, epilogue):
    return expand_raw_triton(*products(p), None, p.projection(epilogue), p.step())


def wide(p, epilogue):
    return tma_expand_triton(*products(p), p.projection(epilogue), p.step())


PATHS = {
    "stream": (5, streamed), "tile": (40, tiled), "expand": (90, expanded),
    "wide": (120, wide),
}  # fmt: skip


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("epilogue", ["", "silu"])
def test_sizes_differ_by_less_than_two_roundings(dtype, epilogue):
    big = make_problem(150, SIZE_IN, WIDTHS, 8, 2, RANK, dtype=dtype)
    results = {}
    for name, (tokens, run) in PATHS.items():
        p = common(make_problem(150, SIZE_IN, WIDTHS, 8, 2, RANK, dtype=dtype), big, tokens)
        results[name] = run(p, epilogue)[:5]
    p = common(big, big, 5)
    truth = linear_truth(p, epilogue)
    plain = 1e-5 if dtype == torch.float32 else error(linear_truth(p, epilogue, dtype), truth)
    for one in results.values():
        for other in results.values():
            assert ((one.double() - other.double()).norm() / truth.norm()).item() <= 2 * plain
