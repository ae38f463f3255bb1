"""Activations of an MLP that is mixed at its output, and the deltas of its down projection,
against float64, one expert of one token after the other."""

import pytest
import torch
import torch.nn.functional as F
from ops import DEVICE, error
from vllm_adafuse.kernels.layerwise.ffn_mix import ffn_mix, ffn_mix_torch, ffn_mix_triton

# tokens, width, experts, top_k, always, rank, adapted, activation
CASES = {
    "one-token": (1, 96, 4, 2, 0, 8, [0, 1], "silu"),
    "odd": (5, 77, 3, 2, 0, 5, [0, 1], "gelu_tanh"),
    "always": (17, 64, 4, 3, 2, 4, [0, 1], "silu"),
    "gate-alone": (3, 70, 4, 1, 1, 3, [0, -1], "silu"),
    "up-alone": (3, 70, 4, 2, 0, 3, [-1, 0], "silu"),
    "packed": (4, 64, 4, 2, 1, 4, [0, 0], "silu"),
    "no-adapted": (4, 64, 4, 2, 0, 4, [-1, -1], "silu"),
    "dense": (20, 130, 3, 3, 0, 16, [0, 1], "silu"),
    "rank-100": (2, 64, 2, 1, 0, 100, [0, 1], "silu"),
}


def make(name, dtype=torch.float32, seed=0):
    tokens, width, experts, top_k, always, rank, adapted, activation = CASES[name]
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype).to(DEVICE)

    num_all_experts, count = experts + always, max(adapted) + 1
    ids = torch.rand(tokens, experts, generator=g).argsort(1)[:, :top_k]
    gates = torch.full((tokens + 2, 1, experts), float("nan"))
    gates[:tokens] = 0
    gates[:tokens, 0].scatter_(1, ids, torch.rand(tokens, top_k, generator=g) + 0.1)
    gates = gates.to(DEVICE)
    s = normal(tokens, count, num_all_experts, rank)
    chosen = torch.cat([gates[:tokens, 0] != 0, gates.new_ones(tokens, always) > 0], 1)
    s = torch.where(chosen[:, None, :, None], s, 0.0)
    gemm_out = torch.cat([normal(tokens, 2 * width), s.flatten(1)], 1)
    rows_of_b = sum(width for p in adapted if p >= 0)
    lora_b = normal(rows_of_b, num_all_experts, rank, scale=rank**-0.5)
    return gemm_out, gates, lora_b, adapted, width, top_k, activation


def truth(gemm_out, gates, lora_b, adapted, width, slots, activation):
    """[1 + slots, T, I] in float64."""
    tokens, (_, num_all_experts, rank), experts = len(gemm_out), lora_b.shape, gates.shape[-1]
    y, b = gemm_out[:, : 2 * width].double(), lora_b.double()
    s = gemm_out[:, 2 * width :].reshape(tokens, -1, num_all_experts, rank).double()
    x = torch.zeros(1 + slots, tokens, width, dtype=torch.float64, device=gemm_out.device)

    def half(t, i, e):
        out = y[t, i * width : (i + 1) * width]
        if adapted[i] >= 0:
            first = width if i == 1 and adapted[0] >= 0 else 0
            own = b[first : first + width]
            for expert in [e, *range(experts, num_all_experts)]:
                out = out + own[:, expert] @ s[t, adapted[i], expert]
        return out

    for t in range(tokens):
        for j, e in enumerate(gates[t, 0].nonzero()[:, 0].tolist()):
            gate, up = half(t, 0, e), half(t, 1, e)
            act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
            x[1 + j, t] = act * up
            x[0, t] += gates[t, 0, e].double() * act * up
    return x


@pytest.mark.parametrize("function", [ffn_mix_torch, ffn_mix_triton])
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name, function):
    arguments = make(name)
    expected = truth(*arguments)
    found = function(*arguments)
    assert found.shape == expected.shape
    assert error(found, expected) <= 1e-5
    gemm_out, gates, lora_b, adapted, width, _, activation = arguments
    alone = function(gemm_out, gates, lora_b, adapted, width, 0, activation)
    assert error(alone[0], expected[0]) <= 1e-5 and len(alone) == 1


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("name", ["one-token", "always", "dense"])
def test_half_precision_is_no_worse_than_plain_torch(name, dtype):
    arguments = make(name, dtype)
    gemm_out, gates, lora_b, adapted, width, slots, activation = arguments
    expected = truth(*arguments)
    # Op by op in the dtype, as a plain implementation would.
    tokens, (_, num_all_experts, rank), experts = len(gemm_out), lora_b.shape, gates.shape[-1]
    s = gemm_out[:, 2 * width :].reshape(tokens, -1, num_all_experts, rank)
    mixed = gemm_out.new_zeros(tokens, width)
    for e in range(experts):
        halves = []
        for i, own in enumerate(lora_b.split(width)):
            y = gemm_out[:, i * width : (i + 1) * width]
            for expert in [e, *range(experts, num_all_experts)]:
                y = y + s[:, adapted[i], expert] @ own[:, expert].T
            halves.append(y)
        g = gates[:tokens, 0, e, None].to(dtype)
        mixed += g * (F.silu(halves[0]) * halves[1])
    found = ffn_mix_triton(*arguments)
    assert error(found[0], expected[0]) <= 1.2 * error(mixed, expected[0])


@pytest.mark.parametrize("function", [ffn_mix_torch, ffn_mix_triton])
def test_rows_of_nan_stay_inside(function):
    """Padding rows of a captured graph may hold anything; they must write no other row."""
    gemm_out, gates, *rest = make("always")
    expected = truth(gemm_out, gates, *rest)
    gemm_out[3], gates[3] = float("nan"), float("nan")
    found = function(gemm_out, gates, *rest)
    rows = [t for t in range(len(gemm_out)) if t != 3]
    assert error(found[:, rows], expected[:, rows]) <= 1e-5


def test_inside_torch_compile():
    gemm_out, *rest = make("odd")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(gemm_out):
        return ffn_mix(gemm_out * 1.0, *rest) * 1.0

    assert error(f(gemm_out), truth(gemm_out, *rest)) <= 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the schema and fakes once")
def test_schema_and_fake():
    torch.library.opcheck(torch.ops.vllm_adafuse.ffn_mix.default, make("odd"))
