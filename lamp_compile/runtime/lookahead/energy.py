"""energy: errors of quantised entries are independent, so they add in squares; so does this rule."""

from torch import Tensor

from lamp_compile.runtime.lookahead._base import Rule


def importance(z: Tensor, y: Tensor, live: Tensor) -> Tensor:
    """sqrt(sum of z_i^2 over the sub-tile): refine when the sum exceeds tau^2."""
    return z.square().sum(-1).sqrt()


RULE = Rule("energy", importance, source="lamp_compile")
