"""nested8: eight bits as two four-bit planes, so that the low precision is a view of the high one.

s = fp16(max|x| / 119), q = clamp(round(x / s), -119, 119) with that *stored* s (q = 0 where s = 0),
hi = floor((q + 8) / 16) in [-7, 7], lo = q - 16 hi in [-8, 7].

A byte of a plane holds channel j in its upper nibble and channel j + D/2 in its lower one, so that ``b & 0xF0`` *is*
16 * hi as int8 and ``(b << 4) & 0xF0`` the other half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamp_compile.runtime.formats._base import Format, Rows, compute_dtype, mean_square_of_peak, worst_of_steps

LARGEST = 119
"""The largest |q|: 16 * 7 + 7."""
HIGH_OFFSET = -0.5
"""lo is uniform on -8..7 and so averages -1/2: the high plane alone reads (16 hi - 1/2) s. Left out, the error is
coherent over channels and keys and grows with the length of the context."""


def _pack(nibbles: Tensor) -> Tensor:
    """int values in [-8, 7], ``[..., D]`` -> uint8 ``[..., D/2]``."""
    half = nibbles.shape[-1] // 2
    upper, lower = nibbles[..., :half], nibbles[..., half:]
    return (((upper & 15) << 4) | (lower & 15)).to(torch.uint8)


def _unpack16(plane: Tensor) -> Tensor:
    """uint8 ``[..., D/2]`` -> 16 * nibble as int8 ``[..., D]``."""
    upper, lower = plane & 0xF0, plane << 4
    return torch.cat((upper, lower), dim=-1).view(torch.int8)


def quantize(x: Tensor) -> Rows:
    scale = (x.abs().amax(-1) / LARGEST).to(torch.float16)
    divisor = compute_dtype(scale).to(x.dtype)[..., None]
    steps = torch.where(divisor == 0, 0.0, x / divisor)
    # NaN in, NaN out: the scale carries it (an integer cannot), so that no output looks healthy.
    q = steps.nan_to_num(0.0).round().clamp(-LARGEST, LARGEST).to(torch.int16)
    hi = (q + 8) >> 4
    return _pack(hi), _pack(q - (hi << 4)), scale


def dequantize(high: Tensor, residual: Tensor | None, scale: Tensor) -> Tensor:
    scale = compute_dtype(scale)
    value = _unpack16(high).to(scale.dtype)
    if residual is None:
        value = value + HIGH_OFFSET
    else:
        value = value + _unpack16(residual).to(scale.dtype) / 16
    # A finite nibble times an infinite scale must not look like a number.
    return value * torch.where(scale.isinf(), torch.nan, scale)[..., None]


def mean_square(high: Tensor, scale: Tensor) -> Tensor:
    return mean_square_of_peak(scale, LARGEST)


def noise(scale: Tensor, mean_square: Tensor, refined: bool) -> Tensor:
    """A uniform error over one step: s for both planes, 16 s for the high plane alone."""
    step = compute_dtype(scale) * (1 if refined else 16)
    return step * step / 12


def worst(scale: Tensor, refined: bool) -> Tensor:
    """lo - HIGH_OFFSET lies in [-7.5, 7.5] steps."""
    return worst_of_steps(scale, LARGEST, 0.0 if refined else 7.5)


FORMAT = Format("nested8", 4, 4, 16, quantize, dequantize, mean_square, noise, packed=2, worst=worst)
