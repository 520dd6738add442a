"""lamp_relaxed: needs a row maximum, not the row sum (LAMP, arXiv 2601.21623 v2)."""

import torch
from torch import Tensor

from lamp_compile.runtime.lookahead._base import Rule


def importance(z: Tensor, y: Tensor, live: Tensor) -> Tensor:
    """max over the sub-tile of |y_j| e^{y_j}, relative to the largest of the row; 0 in a row of zeros.

    z stands for e^{y_j}: their ratio is one number per row, and z knows the additive bias, which y does not.
    """
    weight = y.masked_fill(~live, 0.0).abs() * z
    largest = weight.amax((-2, -1), keepdim=True)
    return (weight / largest.clamp_min(torch.finfo(y.dtype).tiny)).amax(-1)


RULE = Rule("lamp_relaxed", importance, source="arXiv 2601.21623 v2, relaxed rule")
