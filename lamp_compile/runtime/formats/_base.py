"""What a storage format is: how rows of K or V become planes and back, and how noisy that is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor, Tensor]
"""(high ``[..., N, width]``, residual ``[..., N, width]``, scale ``[..., N]``) of N rows of D channels."""


@dataclass(frozen=True)
class Format:
    """One storage format of keys or values.

    Attributes:
        name: The name its standard gives it.
        high_bits: Bits per value in the high plane.
        residual_bits: Bits per value in the residual plane; 0 = the high plane is all there is.
        scale_bits: Bits of scale per row (token and kv head).
        quantize: ``x [..., N, D]`` (float32 or float64) -> ``Rows``.
        dequantize: ``(high, residual or None, scale)`` -> ``[..., N, D]`` in the scale's compute dtype (see ``dtype``);
            without a residual plane the value is that of the high plane alone, unbiased.
        mean_square: ``(high, scale)`` -> mean square of a row's channels, as cheaply as a kernel would know it.
        noise: ``(scale, mean square of the row, refined)`` -> variance of the rounding error per channel.
        plane_dtype: Element type of the planes.
        packed: Values per element of a plane; the head dimension must be a multiple of it.
        worst: ``(scale, refined)`` -> the largest rounding error that a channel can have, in the scale's dtype; None
            where nobody has said (``runtime/worst_case.py``).
    """

    name: str
    high_bits: int
    residual_bits: int
    scale_bits: int
    quantize: Callable[[Tensor], Rows]
    dequantize: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    mean_square: Callable[[Tensor, Tensor], Tensor]
    noise: Callable[[Tensor, Tensor, bool], Tensor]
    plane_dtype: torch.dtype = torch.uint8
    packed: int = 1
    worst: Callable[[Tensor, bool], Tensor] | None = None

    def plane_widths(self, channels: int) -> tuple[int, int]:
        """Elements per row of the high and the residual plane."""
        width = channels // self.packed
        return width, width if self.residual_bits else 0

    def channels(self, width: int) -> int:
        """Channels of a row whose high plane has ``width`` elements."""
        return width * self.packed

    def bits_per_value(self, head_dim: int, refined_share: float = 1.0) -> float:
        """Bits read per stored value when ``refined_share`` of the rows need their residual plane."""
        return self.high_bits + self.residual_bits * refined_share + self.scale_bits / head_dim


def worst_of_steps(scale: Tensor, largest: int, below: float) -> Tensor:
    """Largest error of rounding to ``largest`` steps of a stored fp16 scale, and ``below`` steps left out.

    Half a step; where the scale is subnormal it may have been rounded down so far that the row's peak is cut off.
    """
    exponent = torch.where(scale == 0, -13, torch.frexp(scale).exponent).clamp_min(-13) - 1  # fp16 goes down to -14
    spacing = torch.ldexp(torch.ones_like(scale), exponent - 10)
    rounded = torch.maximum(scale * (0.5 + 2.0**-15), spacing * (largest / 2) * (1 + 2.0**-15))
    return torch.where(scale.isfinite(), rounded + below * scale, torch.inf)


PEAK_TO_MEAN_SQUARE = 7.5
"""Largest square over mean square of a rotated row: about 2.74 standard deviations for 128 normal channels."""


def mean_square_of_peak(scale: Tensor, largest: float) -> Tensor:
    """Mean square of a row whose largest value is ``largest * scale``: a proxy that needs no plane byte."""
    return (compute_dtype(scale) * largest).square() / PEAK_TO_MEAN_SQUARE


def compute_dtype(scale: Tensor) -> Tensor:
    """Scales are stored in 16 bits and computed with in 32 (float64 scales stay, for oracles)."""
    return scale if scale.dtype.itemsize == 8 else scale.float()
