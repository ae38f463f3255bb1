"""The router that sees a request's past, without serving."""

import torch
from vllm_adafuse.kernels.context_routes import choose_by_past, context_rows
from vllm_adafuse.kernels.gate import gate


def test_without_a_past_it_is_gate():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 32, generator=generator), torch.randn(6, 32, generator=generator)
    bias, norm, scales = torch.randn(6, generator=generator), torch.rand(32), torch.rand(6)
    w, c = context_rows(
        hidden, weight, bias, torch.zeros_like(weight), norm, norm_eps=1e-6, temperature=0.7,
        scale=4.0,
    )  # fmt: skip
    assert w.dtype == c.dtype == torch.float32 and not c.any()
    for softmax_first in (False, True):
        ids, weights = choose_by_past(w, c, scales, 3, softmax_first)
        expected = gate(
            hidden, weight, bias, norm, scales, norm_eps=1e-6, temperature=0.7, top_k=3,
            softmax_first=softmax_first,
        )  # fmt: skip
        assert torch.equal(ids, expected[0])
        torch.testing.assert_close(weights, expected[1])


def test_after_many_tokens_it_is_still_right():
    generator = torch.Generator().manual_seed(1)
    w, c = torch.randn(2, 32_000, 8, generator=generator).unbind()
    ids, weights = choose_by_past(w, c + 0.1, torch.ones(8), 8, False)
    mean = (c + 0.1).double().mean(0)
    expected = torch.softmax(w[-1].double() + mean, -1)[ids[-1].long()]
    assert (weights[-1].double() - expected).abs().max() < 1e-6
