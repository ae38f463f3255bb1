"""A and routers times x: sums in float32, whatever the dtype of the numbers."""

import pytest
import torch
from ops import DEVICE, error
from vllm_adafuse.kernels.layerwise.low_product import low_product


@pytest.mark.parametrize("tokens, size_in, rows", [(1, 200, 40), (7, 131, 3), (80, 4100, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_float64(tokens, size_in, rows, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, size_in, generator=g).to(dtype).to(DEVICE)
    bank = (torch.randn(rows, size_in, generator=g) * size_in**-0.5).to(dtype).to(DEVICE)
    low = low_product(x, bank)
    assert low.dtype == torch.float32
    # Half precision too: only the sums are rounded, and in float32.
    assert error(low, x.double() @ bank.double().T) <= 1e-5


@pytest.mark.skipif(DEVICE == "cuda", reason="checks the schema and fakes once")
def test_schema_and_fake():
    arguments = torch.randn(3, 8).half(), torch.randn(5, 8).half()
    torch.library.opcheck(torch.ops.vllm_adafuse.low_product.default, arguments)
