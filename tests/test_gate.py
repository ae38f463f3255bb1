"""The live router: formula, ties, both weight rules; independent of the batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ops import DEVICE, error
from vllm_adafuse.kernels.gate import Gate, gate
from vllm_adafuse.serving.routes import Router


def inputs(tokens=6, hidden=32, experts=5, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, hidden, generator=g).to(dtype).to(DEVICE),
        torch.randn(experts, hidden, generator=g).to(DEVICE),
        torch.randn(experts, generator=g).to(DEVICE),
        (1 + 0.2 * torch.randn(hidden, generator=g)).to(DEVICE),
        torch.rand(experts, generator=g).to(DEVICE),
    )


def truth(hidden, weight, bias, norm, scales, eps, temperature, top_k, softmax_first):
    def array(t):
        return t.double().cpu().numpy()

    u = array(hidden)
    u = u / np.sqrt((u**2).mean(-1, keepdims=True) + eps) * array(norm)
    z = (u @ array(weight).T + array(bias)) / temperature
    ids = np.argsort(-z, axis=-1, kind="stable")[:, :top_k]
    every = np.exp(z - z.max(-1, keepdims=True))
    chosen = np.take_along_axis(every, ids, -1)
    total = every.sum(-1, keepdims=True) if softmax_first else chosen.sum(-1, keepdims=True)
    return ids, chosen / total * array(scales)[ids]


@pytest.mark.parametrize("softmax_first", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula(softmax_first, top_k, dtype):
    tensors = inputs(dtype=dtype)
    options = {"norm_eps": 1e-5, "temperature": 0.7, "top_k": top_k, "softmax_first": softmax_first}
    ids, weights = gate(tensors[0], Gate(*tensors[1:], **options))
    want_ids, want = truth(*tensors, *options.values())
    assert ids.dtype == torch.int32 and ids.cpu().numpy().tolist() == want_ids.tolist()
    np.testing.assert_allclose(weights.cpu().numpy(), want, rtol=1e-5)


def test_ties_go_to_the_lower_expert():
    hidden, weight, _, _, scales = inputs(experts=8)
    weight[:] = weight[0]
    options = {"norm_eps": 0.0, "temperature": 1.0, "top_k": 3, "softmax_first": False}
    ids, weights = gate(hidden, Gate(weight, None, None, scales, **options))
    assert ids.tolist() == [[0, 1, 2]] * 6
    assert torch.allclose(weights, scales[:3].expand(6, 3) / 3)


def test_a_row_does_not_depend_on_the_batch():
    """Large terms of a logit cancel: in float32 what is left would hang on the order of the sum."""
    hidden, weight, bias, _, scales = inputs(tokens=300, hidden=64)
    hidden[:, 0] = hidden[:, 63] = 2.0**20
    weight[:, 0], weight[:, 63] = 3, -3
    tensors = weight, bias, None, scales
    options = {"norm_eps": 1e-6, "temperature": 1.0, "top_k": 2, "softmax_first": True}
    router = Gate(*tensors, **options)
    ids, weights = gate(hidden, router)
    for row in range(0, 300, 37):
        one_ids, one_weights = gate(hidden[row : row + 1], router)
        assert torch.equal(one_ids[0], ids[row])
        torch.testing.assert_close(one_weights[0], weights[row], rtol=1e-6, atol=0)
    exact = (hidden.double() @ weight.double().T + bias.double()).softmax(-1).topk(2)
    assert torch.equal(ids.long(), exact.indices)
    assert error(weights, exact.values * scales.double()[exact.indices]) <= 1e-5


def test_a_router_has_the_norms_factors_in_float32():
    norm = SimpleNamespace(weight=torch.tensor([0.001, -0.5], dtype=torch.bfloat16))
    config = SimpleNamespace(num_experts=2, top_k=1, scales=[1.0, 1.0])
    router = Router(config, None, 2, 0, 1e-5)
    for offset in (0.0, 1.0):
        assert not list(router.stamp(torch.nn.Identity(), norm, offset))
        expected = norm.weight.double() + offset
        torch.testing.assert_close(router.norm_weight.double(), expected, rtol=0, atol=1e-7)
