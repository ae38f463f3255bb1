"""Experts in eight bits: A and B as e4m3 numbers, and for each rank one factor.

    B A = Bq diag(scale) Aq        scale[r] = 2^(i[r] + j[r]), A[r] = 2^i[r] Aq[r], B[:, r] = 2^j[r] Bq[:, r]

The largest number of every row of A and of every column of B lies in the upper half of what e4m3 has,
so that three bits of a number's four are kept down to 2^-14 of its row's largest. Factors are powers of
two: an expert that was rounded is one in float32 and bfloat16 too, bit for bit, and what rounding costs
is all that is lost.
"""

from __future__ import annotations

import torch

E4M3 = torch.float8_e4m3fn
# The largest number of e4m3 is 0.875 2^9.
_MOST, _EXPONENT = 0.875, 9
# Of a row's factor, so that neither it nor its inverse leaves float32. Rows below 2^-110 lose bits.
_LEAST = -118


def round_pair(
    a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An expert, or several, in eight bits.

    Args:
        a: [..., r, in], finite, any float dtype.
        b: [..., out, r], likewise; the leading dimensions broadcast.

    Returns:
        Aq and Bq of the same shapes in float8_e4m3fn, and scale [..., r] float32.
    """
    a, of_a = _rounded(a, -1)
    b, of_b = _rounded(b, -2)
    exponents = (of_a.squeeze(-1) + of_b.squeeze(-2)).clamp(-126, 127)
    return a, b, _power(exponents)


def widened(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of an expert when it has been rounded: A and B of the shapes and the dtype of those
    that are given; see `round_pair`."""
    (of_a, i), (of_b, j) = _rounded(a, -1), _rounded(b, -2)
    return (of_a.float() * _power(i)).to(a.dtype), (of_b.float() * _power(j)).to(b.dtype)


def _rounded(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x in e4m3, and the exponents by which it was divided: of each row along a dimension, which is
    kept as 1."""
    mantissa, exponent = torch.frexp(x.abs().amax(dim, keepdim=True).float())
    exponent = (exponent - _EXPONENT + (mantissa > _MOST)).clamp(min=_LEAST)
    # An adapter has hundreds of millions of numbers: `ldexp` of them all takes ten times as long.
    return (x * _power(-exponent)).to(E4M3), exponent


def _power(exponent: torch.Tensor) -> torch.Tensor:
    """2^exponent in float32, exact."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
