"""Deltas of a step's adapters are added where the step has any, and nothing is done elsewhere."""

import torch
from ops import delta_truth, error, make_problem
from vllm_adafuse.kernels.page_sgmm import page_sgmm


def run(active: bool):
    p = make_problem(5, 64, [32, 16, 16], 6, 2, 16)
    y = torch.randn(5, 64)
    before = y.clone()
    page_sgmm(
        y, p.x, torch.tensor([active]), p.bank_a, p.bank_b, p.gates, p.present, p.scratch,
        p.parts, p.widths,
    )  # fmt: skip
    return y, before, p


def test_adds_in_steps_with_adapters_alone():
    y, before, p = run(True)
    assert error(y.double() - before.double(), delta_truth(p)) <= 1e-5
    y, before, _ = run(False)
    assert torch.equal(y, before)


def test_the_op_is_what_torch_compile_expects():
    _, y, p = run(True)
    arguments = (
        y, p.x, torch.tensor([True]), p.bank_a, p.bank_b, p.gates, p.present, *p.scratch,
        p.parts, p.widths,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.vllm_adafuse.page_sgmm.default, arguments)
