"""bf16: brain float, the values themselves. Its scale is 1; there is nothing to refine."""

from __future__ import annotations

import torch
from torch import Tensor

from lamp_compile.runtime.formats._base import Format, Rows

MANTISSA_BITS = 7


def quantize(x: Tensor) -> Rows:
    high = x.to(torch.bfloat16)
    # Every row has a scale slot so that all formats share one layout; here it is 1 and no more than a placeholder.
    return high, high[..., :0], torch.ones_like(high[..., 0], dtype=torch.float16)


def dequantize(high: Tensor, residual: Tensor | None, scale: Tensor) -> Tensor:
    return high.to(torch.float64 if scale.dtype == torch.float64 else torch.float32)


def mean_square(high: Tensor, scale: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(high, dim=-1, dtype=torch.float32)
    return norm.square() / high.shape[-1]


def noise(scale: Tensor, mean_square: Tensor, refined: bool) -> Tensor:
    """Relative step 2^-7 of the binade; 1/12 for a uniform error, 7/3 = mean of m^2 over [1, 2)."""
    return mean_square * (2.0 ** (-2 * MANTISSA_BITS) / 12 / (7 / 3))


FORMAT = Format("bf16", 16, 0, 16, quantize, dequantize, mean_square, noise, plane_dtype=torch.bfloat16)
