"""The streaming kernel against float64, over odd shapes and configs of the product."""

import pytest
import torch
from ops import DEVICE, SHAPES, active_of, error, linear_truth, make_problem
from vllm_adafuse.kernels.configs import GemmConfig
from vllm_adafuse.kernels.decode_gemm import decode_gemm_triton
from vllm_adafuse.kernels.device.epilogues import rotate_torch
from vllm_adafuse.kernels.dispatch import default_config

CONFIGS = [GemmConfig(32, 64), GemmConfig(16, 32, 2), GemmConfig(64, 16, 4)]


def run(p, epilogue="", config=None, cos_sin=None):
    return decode_gemm_triton(p.x, p.projection(epilogue, cos_sin), p.step(cos_sin), config)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", SHAPES)
def test_equals_float64(name, config):
    p = make_problem(*SHAPES[name], bias=name != "one-token")
    assert error(run(p, config=config), linear_truth(p)) <= 1e-5


@pytest.mark.parametrize("tokens,experts,top_k", [(1, 64, 2), (3, 40, 12), (20, 64, 5)])
@pytest.mark.parametrize("rank", [4, 40])
def test_active_ones_of_many_experts(tokens, experts, top_k, rank):
    """Fewer programs shrink than there are experts, and take them in turns; some take none."""
    p = make_problem(tokens, 96, [40, 50], experts, top_k, rank)
    truth, absent = linear_truth(p), p.gates[:tokens].sum(0) == 0
    p.lora_a[:, absent], p.lora_b[:, absent] = float("nan"), float("nan")
    p.active[2 + p.active[1] :] = 1 << 40
    for config in (None, GemmConfig(16, 32, 2, shrink_split_k=3)):
        assert error(run(p, config=config), truth) <= 1e-5


@pytest.mark.parametrize("adapted", [[0, -1, 1], [-1, 0, -1], [0, 0, 0], [-1, -1, 0]])
def test_parts_without_experts(adapted):
    p = make_problem(4, 64, [40, 50, 30], 4, 2, 4, adapted=adapted, bias=True)
    assert error(run(p, config=GemmConfig(16, 32, 2)), linear_truth(p)) <= 1e-5


@pytest.mark.parametrize("epilogue", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("adapted", [[0, 1], [0, 0], [-1, 0], [0, -1]])
def test_gate_up_with_its_activation(adapted, epilogue):
    p = make_problem(5, 96, [70, 70], 3, 2, 4, adapted=adapted, bias=True)
    out = run(p, epilogue, GemmConfig(32, 32))
    assert error(out, linear_truth(p, epilogue)) <= 1e-5
    with pytest.raises(ValueError, match="split_k is 2, expected 1 before"):
        run(p, epilogue, GemmConfig(32, 32, 2))


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
@pytest.mark.parametrize("name", ["packed-qkv-gqa", "thirty-tokens", "rank-256", "slices", "list"])
def test_half_precision_is_no_worse_than_plain_torch(name, dtype):
    shapes = SHAPES | {"list": (20, 200, [64, 70], 64, 2, 24)}
    p = make_problem(*shapes[name], dtype=dtype, bias=True)
    truth, plain = linear_truth(p), linear_truth(p, dtype=dtype)
    assert error(run(p), truth) <= 1.2 * error(plain, truth)


@pytest.mark.parametrize(
    "size_in,experts,rank", [(8192, 4, 4), (1024, 40, 4), (1024, 7, 24), (1024, 12, 16)]
)
def test_a_token_does_not_see_its_company(size_in, experts, rank, sums_of_sixteen):
    p = make_problem(16, size_in, [64, 32], experts, 2, rank)
    other = make_problem(16, size_in, [64, 32], experts, 2, rank, seed=1)
    for name in ("weight", "lora_a", "lora_b"):
        setattr(other, name, getattr(p, name))
    p.gates[:16] = p.gates[5]  # alone with each other in a list, and far apart among all
    p.active = active_of(p.gates[5] != 0)
    for name in ("x", "gates"):
        getattr(other, name)[5] = getattr(p, name)[5]
    other.active = active_of(torch.ones(experts, dtype=torch.bool, device=DEVICE))
    one, two = run(p), run(other)
    assert torch.equal(one[5], two[5]) and not torch.equal(one[4], two[4])


@pytest.mark.parametrize("adapted", [[0, 1], [0, -1], [-1, 0]])
def test_a_list_of_blocks_for_both_members(adapted):
    p = make_problem(12, 96, [64, 64], 40, 2, 16, adapted=adapted)
    assert (p.gates != 0).any(0).sum() > 16  # blocks of 8 experts
    assert error(run(p, "silu"), linear_truth(p, "silu")) <= 1e-5


def test_rows_without_gates_are_the_bare_projection(sums_of_sixteen):
    p = make_problem(4, 64, [64], 4, 2, 4)
    p.gates[2] = 0
    bare = make_problem(4, 64, [64], 4, 2, 4)
    bare.gates[:4] = 0
    bare.active.zero_()
    one, two = run(p), run(bare)
    assert torch.equal(one[2], two[2]) and not torch.equal(one[1], two[1])


@pytest.mark.parametrize("rows", [16, 100, 896, 4096, 12288, 22016])
@pytest.mark.parametrize("epilogue", ["", "silu"])
def test_chosen_cuts_are_valid_and_fit_shared_memory(rows, epilogue):
    for tokens, size_in, itemsize in ((1, 64, 2), (32, 11008, 2), (32, 4096, 4)):
        config = default_config(tokens, size_in, rows, epilogue, itemsize)
        rows = config.rows * (2 if epilogue else 1) + max(16, tokens)
        assert config.stages * rows * config.cols * itemsize <= 100 << 10
