"""random_tiles: a control. A sub-tile is refined with probability 1 - tau, whatever its scores."""

import torch
from torch import Tensor

from lamp_compile.runtime.lookahead._base import Rule


def importance(z: Tensor, y: Tensor, live: Tensor) -> Tensor:
    """Uniform on (0, 1), seeded by the shape so that a run repeats."""
    generator = torch.Generator(device=z.device).manual_seed(z.shape[-3] * 1_000_003 + z.shape[-2])
    return torch.rand(z.shape[:-1], generator=generator, device=z.device, dtype=z.dtype)


RULE = Rule("random_tiles", importance, source="control", control=True)
