"""What waits within a launch: programs that run at once, not in the order of their numbers."""

import pytest
from ops import DEVICE, error, linear_truth, make_problem
from vllm_adafuse.kernels.configs import GemmConfig
from vllm_adafuse.kernels.decode_gemm import decode_gemm_triton
from vllm_adafuse.kernels.tma_gemm import tma_gemm_triton
from waiting_programs import all_at_once  # noqa: F401

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs them at once by itself")

SHAPES = {  # (tokens, in, widths, experts, k, rank), adapted, epilogue
    "one-part": ((3, 64, [64], 4, 2, 8), None, ""),
    "adapted-without-experts": ((5, 64, [48, 32, 32], 4, 2, 8), [0, -1, 1], ""),
    "gate-up": ((5, 64, [64, 64], 3, 2, 8), None, "silu"),
    "up-alone": ((5, 64, [64, 64], 3, 2, 8), [-1, 0], "silu"),
    "list": ((3, 64, [64, 32], 20, 3, 16), None, ""),
}
# Slices of W x are for products that nothing follows.
CONFIGS = {
    "whole": GemmConfig(32, 32),
    "is_split-shrink": GemmConfig(16, 32, shrink_split_k=2, shrink_cols=16),
    "is_split": GemmConfig(16, 32, 2, shrink_split_k=2, shrink_cols=16),
}


@pytest.mark.parametrize("run", [decode_gemm_triton, tma_gemm_triton])
@pytest.mark.parametrize(
    "name, config", [(n, c) for n in SHAPES for c in CONFIGS if c != "is_split" or not SHAPES[n][2]]
)
def test_tiles_wait_for_all_of_the_shrink(name, run, config, all_at_once):
    """s is NaN until it is written, so a tile that goes on too early says so."""
    shape, adapted, epilogue = SHAPES[name]
    p = make_problem(*shape, adapted=adapted, bias=True)
    out = run(p.x, p.projection(epilogue), p.step(), CONFIGS[config])
    assert all_at_once.asked > 1
    assert error(out, linear_truth(p, epilogue)) <= 1e-5
    assert not p.workspace.split_k_semaphores.any()
