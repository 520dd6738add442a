"""lamp_strict: the column norm of the softmax Jacobian weighted by |y| (LAMP, arXiv 2601.21623 v2)."""

from torch import Tensor

from lamp_compile.runtime.lookahead._base import Rule


def importance(z: Tensor, y: Tensor, live: Tensor) -> Tensor:
    """max over the sub-tile of 2 z_j (1 - z_j) |y_j|."""
    return (2 * z * (1 - z) * y.abs()).amax(-1)


RULE = Rule("lamp_strict", importance, source="arXiv 2601.21623 v2, strict rule")
