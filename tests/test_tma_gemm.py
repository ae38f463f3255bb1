"""The tiled kernel against float64, over odd shapes and configs of the product."""

import ops
import pytest
import torch
from ops import DEVICE, error, linear_truth, make_problem
from vllm_adafuse.kernels.configs import GemmConfig
from vllm_adafuse.kernels.device.epilogues import rotate_torch
from vllm_adafuse.kernels.dispatch import can_tile
from vllm_adafuse.kernels.plans import Device, Shape
from vllm_adafuse.kernels.tma_gemm import tma_gemm_triton

CONFIGS = [GemmConfig(32, 64), GemmConfig(48, 32, shrink_split_k=3, tma=True), GemmConfig(64, 16, shrink_split_k=4)]


def in_eights(tokens, size_in, widths, experts, top_k, rank):
    """The accelerator wants rows of whole 16 bytes: of x and W, and of s and B."""
    while experts * rank % 8:
        rank += 1
    return tokens, -(-size_in // 8) * 8, widths, experts, top_k, rank


SHAPES = {name: in_eights(*shape) for name, shape in ops.SHAPES.items()}
SHAPES["hundred-tokens"] = (100, 72, [64, 70], 5, 2, 16)


def run(p, epilogue="", config=None, out=None, cos_sin=None):
    of = p.projection(epilogue, cos_sin)
    return tma_gemm_triton(p.x, of, p.step(cos_sin), config, out)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name, config):
    p = make_problem(*SHAPES[name], bias=name != "one-token")
    assert error(run(p, config=config), linear_truth(p)) <= 1e-5


@pytest.mark.parametrize("name", ["one-token", "not-a-multiple", "slices", "hundred-tokens"])
@pytest.mark.parametrize("split", [1, 2, 3])
def test_slices_are_left_unadded(name, split):
    p = make_problem(*SHAPES[name])
    tokens, out = p.x.shape[0], sum(p.widths)
    slices = p.workspace.split_sums(split, tokens, out)
    run(p, config=GemmConfig(16, 32, split, shrink_split_k=2), out=slices)
    assert error(slices.sum(0), linear_truth(p)) <= 1e-5
    assert split == 1 or error(slices[0], slices.sum(0).double()) > 0.1


@pytest.mark.parametrize("adapted", [[0, -1, 1], [-1, 0, -1], [0, 0, 0], [-1, -1, 0]])
def test_parts_without_experts(adapted):
    p = make_problem(4, 64, [40, 50, 30], 4, 2, 4, adapted=adapted, bias=True)
    assert error(run(p, config=GemmConfig(16, 32, shrink_split_k=2)), linear_truth(p)) <= 1e-5


@pytest.mark.parametrize("epilogue", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("adapted", [[0, 1], [0, 0], [-1, 0], [0, -1]])
def test_gate_up_with_its_activation(adapted, epilogue):
    p = make_problem(5, 96, [70, 70], 3, 2, 4, adapted=adapted, bias=True)
    for config in (GemmConfig(32, 32), GemmConfig(48, 32, tma=True)):
        out = run(p, epilogue, config)
        assert error(out, linear_truth(p, epilogue)) <= 1e-5


@pytest.mark.parametrize("adapted", [[0, 1, 2], [0, 0, 0], [-1, 0, 1], [0, -1, -1]])
@pytest.mark.parametrize("widths,head_dim", [([128, 64, 64], 64), ([96, 32, 32], 32)])
def test_queries_and_keys_are_turned(widths, head_dim, adapted):
    p = make_problem(5, 96, widths, 3, 2, 4, adapted=adapted, bias=True)
    cos_sin = torch.randn(7, head_dim, device=DEVICE)
    truth = rotate_torch(linear_truth(p), cos_sin, widths[0] + widths[1])
    for config in (None, GemmConfig(16, 32)):
        assert error(run(p, "rotary", config, cos_sin=cos_sin), truth) <= 1e-5


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("name", ["packed-qkv-gqa", "hundred-tokens", "rank-256", "slices"])
def test_half_precision_is_no_worse_than_plain_torch(name, dtype):
    p = make_problem(*SHAPES[name], dtype=dtype, bias=True)
    truth, plain = linear_truth(p), linear_truth(p, dtype=dtype)
    assert error(run(p), truth) <= 1.2 * error(plain, truth)


@pytest.mark.parametrize("activation", ["", "silu", "rotary"])
@pytest.mark.parametrize("experts,rank,cols", [(16, 16, 64), (40, 16, 128), (20, 32, 64)])
@pytest.mark.parametrize("chosen", [[], [0], [5, 6], [3, 15], range(16)])
def test_blocks_without_a_token_are_not_read(experts, rank, cols, chosen, activation):
    widths = [128, 64, 64] if activation == "rotary" else [96, 96]
    p = make_problem(9, 256, widths, experts, 1, rank, bias=bool(activation))
    p.gates.fill_(0)
    for t in range(len(p.gates)):
        p.gates[t, [*chosen][t::9]] = 0.5 + t
    p.active.copy_(ops.active_of((p.gates != 0).any(0)))
    cos_sin = torch.randn(9, 64, device=DEVICE)
    truth = linear_truth(p, "" if activation == "rotary" else activation)
    if activation == "rotary":
        truth = rotate_torch(truth, cos_sin, 192)
    for block in range(experts // (of := 64 // rank)):
        if not {*chosen} & {*range(block * of, (block + 1) * of)}:
            p.lora_a[:, block * of : (block + 1) * of] = torch.inf
    for block in range(experts // (of := cols // rank)):
        if not {*chosen} & {*range(block * of, (block + 1) * of)}:
            p.lora_b[:, block * of : (block + 1) * of] = torch.inf
    for split_k in (1, 3):
        config = GemmConfig(32, cols, shrink_split_k=split_k, tma=True)
        assert error(run(p, activation, config, cos_sin=cos_sin), truth) <= 1e-5
    if not activation:
        left = p.workspace.split_sums(3, 9, 192)
        run(p, config=GemmConfig(32, cols, 3, shrink_split_k=2, tma=True), out=left)
        assert error(left.sum(0), truth) <= 1e-5


SMALL, ODD = (GemmConfig(rows, 32, tma=True) for rows in (32, 48))
LARGE = GemmConfig(96, 64, 1, 8, 4, shrink_split_k=2, tma=True)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(
    "epilogue,widths,adapted",
    [
        *(("silu", [280, 280], adapted) for adapted in ([0, 1], [0, 0], [-1, 0], [0, -1])),
        *(("rotary", [256, 128, 128], adapted) for adapted in ([0, 1, 2], [-1, 0, 1], [0, -1, 0])),
        *(("", [200, 72, 40], adapted) for adapted in ([0, 1, 2], [0, -1, 1], [-1, -1, 0])),
    ],
)
@pytest.mark.parametrize(
    "config,size_in,experts,rank",  # s is waited for before the loop, or within it
    [(SMALL, 96, 4, 16), (ODD, 96, 5, 8), (LARGE, 512, 8, 16), (ODD, 264, 8, 32)],
)
def test_ranks_are_steps_of_the_loop(
    epilogue, widths, adapted, config, size_in, experts, rank, dtype
):
    tokens = 100
    p = make_problem(
        tokens, size_in, widths, experts, 2, rank, adapted=adapted, bias=True, dtype=dtype
    )
    options, gated = {}, "" if epilogue == "rotary" else epilogue
    truth, plain = linear_truth(p, gated), linear_truth(p, gated, dtype=dtype)
    if epilogue == "rotary":
        options["cos_sin"] = torch.randn(tokens, 64, device=DEVICE).to(dtype)
        truth, plain = (rotate_torch(y, options["cos_sin"], 384) for y in (truth, plain))
    assert error(run(p, epilogue, config, **options), truth) <= 1.2 * error(plain, truth)


@pytest.mark.parametrize("split", [2, 3])
@pytest.mark.parametrize("size_in", [96, 384])
def test_slices_in_half_precision(split, size_in):
    p = make_problem(40, size_in, [64, 70], 4, 2, 16, dtype=torch.float16)
    slices = p.workspace.split_sums(split, 40, 134)
    run(p, config=GemmConfig(32, 32, split, shrink_split_k=2, tma=True), out=slices)
    truth, plain = linear_truth(p), linear_truth(p, dtype=torch.float16)
    assert error(slices.sum(0), truth) <= 1.2 * error(plain, truth)


def test_a_token_does_not_see_its_company(sums_of_sixteen):
    p = make_problem(16, 8192, [64, 32], 4, 2, 4)
    other = make_problem(16, 8192, [64, 32], 4, 2, 4, seed=1)
    for name in ("weight", "lora_a", "lora_b"):
        setattr(other, name, getattr(p, name))
    for name in ("x", "gates"):
        getattr(other, name)[5] = getattr(p, name)[5]
    other.active.fill_(-1)
    one, two = run(p), run(other)
    assert torch.equal(one[5], two[5]) and not torch.equal(one[4], two[4])


def test_few_ranks_are_not_tiled():
    for experts, rank, takes in ((4, 16, True), (2, 4, True), (3, 4, False), (1, 1, False)):
        of = Shape(64, (64,), (0,), experts, rank)
        assert can_tile(of, Device("a GPU", 9)) == takes
        assert not can_tile(of, Device("an older one", 8))


def test_rows_without_gates_are_the_bare_projection(sums_of_sixteen):
    p = make_problem(4, 64, [64], 4, 2, 4)
    p.gates[2] = 0
    bare = make_problem(4, 64, [64], 4, 2, 4)
    bare.gates[:4] = 0
    bare.active.zero_()
    one, two = run(p), run(bare)
    assert torch.equal(one[2], two[2]) and not torch.equal(one[1], two[1])
