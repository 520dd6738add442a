"""int8: one signed byte a value, one fp16 scale a row."""

from __future__ import annotations

import torch
from torch import Tensor

from lamp_compile.runtime.formats._base import Format, Rows, compute_dtype, mean_square_of_peak, worst_of_steps

LARGEST = 127


def quantize(x: Tensor) -> Rows:
    scale = (x.abs().amax(-1) / LARGEST).to(torch.float16)
    divisor = compute_dtype(scale).to(x.dtype)[..., None]
    steps = torch.where(divisor == 0, 0.0, x / divisor).nan_to_num(0.0)
    high = steps.round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return high, high[..., :0], scale


def dequantize(high: Tensor, residual: Tensor | None, scale: Tensor) -> Tensor:
    scale = compute_dtype(scale)
    return high.to(scale.dtype) * torch.where(scale.isinf(), torch.nan, scale)[..., None]


def mean_square(high: Tensor, scale: Tensor) -> Tensor:
    return mean_square_of_peak(scale, LARGEST)


def noise(scale: Tensor, mean_square: Tensor, refined: bool) -> Tensor:
    scale = compute_dtype(scale)
    return scale * scale / 12


def worst(scale: Tensor, refined: bool) -> Tensor:
    return worst_of_steps(scale, LARGEST, 0.0)


FORMAT = Format("int8", 8, 0, 16, quantize, dequantize, mean_square, noise, plane_dtype=torch.int8, worst=worst)
