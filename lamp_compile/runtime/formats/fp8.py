"""fp8: OCP e4m3 (no infinities), one fp16 scale a row so that the largest value meets the format's 448."""

from __future__ import annotations

import torch
from torch import Tensor

from lamp_compile.runtime.formats._base import Format, Rows, compute_dtype, mean_square_of_peak

LARGEST = 448.0


def quantize(x: Tensor) -> Rows:
    scale = (x.abs().amax(-1) / LARGEST).to(torch.float16)
    divisor = compute_dtype(scale).to(x.dtype)[..., None]
    value = torch.where(divisor == 0, 0.0, x / divisor).nan_to_num(0.0).clamp(-LARGEST, LARGEST)
    high = value.to(torch.float8_e4m3fn).view(torch.uint8)
    return high, high[..., :0], scale


def dequantize(high: Tensor, residual: Tensor | None, scale: Tensor) -> Tensor:
    scale = compute_dtype(scale)
    value = high.view(torch.float8_e4m3fn).to(scale.dtype)
    return value * torch.where(scale.isinf(), torch.nan, scale)[..., None]


def mean_square(high: Tensor, scale: Tensor) -> Tensor:
    return mean_square_of_peak(scale, LARGEST)


def noise(scale: Tensor, mean_square: Tensor, refined: bool) -> Tensor:
    """Three stored mantissa bits: relative step 2^-3 of the binade; 1/12 for uniform, 7/3 = mean of m^2 on [1, 2)."""
    return mean_square * (2.0**-6 / 12 / (7 / 3))


FORMAT = Format("fp8", 8, 0, 16, quantize, dequantize, mean_square, noise)
