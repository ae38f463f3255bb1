"""Every kernel ten thousand times beside a stream of random work: the same bits each time; those
that wait within a launch at a served model's sizes, and as near to float64 as plain torch.

A wait that is missing, or for too few, shows only where programs are late. So s is NaN before each
launch, and another stream keeps processors and memory busy.
"""

import random
from collections.abc import Callable

import every_kernel
import pytest
import torch
from ops import DEVICE, Problem, error, linear_truth, make_problem
from vllm_adafuse.kernels.configs import GemmConfig
from vllm_adafuse.kernels.decode_gemm import decode_gemm_triton
from vllm_adafuse.kernels.tma_gemm import tma_gemm_triton

LAUNCHES, PER_GRAPH = 10_000, 50
# kernel, tokens, widths, epilogue, E, r, config, slices of the result that are left unadded
CASES = {
    "stream": ("stream", 1, [1, 1, 1], "", 8, 16, None, 0),
    "stream-list": ("stream", 16, [4], "", 40, 16, None, 0),
    "stream-gate-up": ("stream", 8, [4, 4], "silu", 8, 16, None, 0),
    "stream-is_split": ("stream", 8, [4], "", 8, 16, GemmConfig(64, 128, 3, shrink_split_k=3), 0),
    "stream-slices-left": ("stream", 32, [4], "", 8, 64, GemmConfig(64, 64, 2, shrink_split_k=2), 2),
    "tile": ("tile", 40, [8], "", 8, 16, None, 0),
    "tile-gate-up": ("tile", 100, [8, 8], "silu", 8, 16, None, 0),
    "tile-many-ranks": ("tile", 24, [4], "", 40, 16, GemmConfig(32, 128, stages=4, tma=True), 0),
    "tile-slices-left": (
        "tile", 64, [4], "", 8, 16, GemmConfig(64, 128, 2, 4, 4, shrink_split_k=2, tma=True), 2
    ),
}  # fmt: skip


class Stress:
    """One case: its problem and what to launch.

    Args:
        size: `in`; widths are multiples of a quarter of it.
    """

    def __init__(self, name: str, size: int, dtype: torch.dtype):
        kind, tokens, widths, epilogue, experts, rank, config, split = CASES[name]
        self.tiled, self.epilogue, self.config, self.split = kind == "tile", epilogue, config, split
        widths = [width * size // 4 for width in widths]
        self.p: Problem = make_problem(tokens, size, widths, experts, 2, rank, dtype=dtype)
        self.of, self.step = self.p.projection(epilogue), self.p.step()
        self.left = None
        if split:
            self.left = torch.empty(split, tokens, sum(widths), device=DEVICE)

    def launch(self) -> torch.Tensor:
        """[T, out], or slices of it, from an s of NaN."""
        p = self.p
        p.workspace.lora_a_out.fill_(255)
        self.of.semaphore.zero_()
        launch = tma_gemm_triton if self.tiled else decode_gemm_triton
        return launch(p.x, self.of, self.step, self.config, self.left)

    def assert_near(self, out: torch.Tensor) -> None:
        found = out.sum(0) if self.split else out
        truth = linear_truth(self.p, self.epilogue)
        plain = linear_truth(self.p, self.epilogue, self.p.x.dtype)
        assert error(found, truth) <= max(1e-5, 1.2 * error(plain, truth))


def beside_random_work(some: Callable[[], None]) -> int:
    """Runs `some` of PER_GRAPH launches until there were LAUNCHES, while another stream streams
    memory and multiplies matrices of random sizes; how much of that there was."""
    draw, side, done = random.Random(0), torch.cuda.Stream(), torch.cuda.Event()
    a, b = torch.ones(1 << 28, device=DEVICE), torch.empty(1 << 28, device=DEVICE)  # 1 GiB each
    matrix = torch.randn(4096, 4096, dtype=torch.bfloat16, device=DEVICE)
    torch.cuda.synchronize()
    beside = 0
    for _ in range(LAUNCHES // PER_GRAPH):
        some()
        done.record()
        busy = False
        while not (busy and done.query()):
            with torch.cuda.stream(side):
                count = draw.randrange(1 << 20, 1 << 28)
                torch.add(a[:count], 1, out=b[:count])
                rows = draw.randrange(64, 4096)
                torch.mm(matrix[:rows], matrix)
            side.synchronize()
            busy, beside = True, beside + 1
    torch.cuda.synchronize()
    return beside


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_ten_thousand_launches_beside_a_busy_memory(name):
    stress = Stress(name, 4096, torch.bfloat16)
    first = stress.launch().clone()  # alone
    stress.assert_near(first)
    others = torch.zeros((), dtype=torch.int64, device=DEVICE)
    whole = torch.int32 if first.dtype == torch.float32 else torch.int16

    def one_more() -> None:
        others.add_((stress.launch().view(whole) != first.view(whole)).any())

    one_more()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(PER_GRAPH):
            one_more()
    others.zero_()
    assert beside_random_work(graph.replay) >= LAUNCHES // PER_GRAPH  # busy all along
    assert others.item() == 0
    stress.assert_near(stress.launch())


@pytest.mark.gpu
@pytest.mark.parametrize("name", every_kernel.CASES)
def test_every_kernel_ten_thousand_times_beside_random_work(name):
    run = every_kernel.CASES[name]()
    first = [tensor.clone() for tensor in run()]
    others = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def some() -> None:
        for _ in range(PER_GRAPH):
            others.add_(every_kernel.differ(run(), first))

    assert beside_random_work(some) >= LAUNCHES // PER_GRAPH
    assert others.item() == 0


@pytest.mark.skipif(DEVICE == "cuda", reason="the same, once and small, where there is no GPU")
@pytest.mark.parametrize("name", CASES)
def test_each_of_them_is_right(name):
    stress = Stress(name, 64, torch.float16)
    stress.assert_near(stress.launch())
