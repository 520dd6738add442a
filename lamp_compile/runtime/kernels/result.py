"""What kernels give back, on any device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Result:
    """What one attention leaves: output ``[B, H, S, Dv]``, natural log-sum-exp ``[B, H, S]``, certificate
    ``[B, H, S, 3]``."""

    out: Tensor
    lse: Tensor
    certificate: Tensor
