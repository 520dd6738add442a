"""static_tiles: a control. The sink's sub-tile and the newest ones are refined, whatever their scores."""

import torch
from torch import Tensor

from lamp_compile.runtime.lookahead._base import Rule


def importance(z: Tensor, y: Tensor, live: Tensor) -> Tensor:
    """1 for the first live sub-tile, 1 / (1 + age) for the others: tau = 1 / (n + 1) keeps the newest n."""
    any_live = live.any(-1)
    tile = torch.arange(any_live.shape[-1], device=z.device)
    newest = torch.where(any_live, tile, -1).amax(-1, keepdim=True)
    oldest = torch.where(any_live, tile, any_live.shape[-1]).amin(-1, keepdim=True)
    age = (newest - tile).clamp_min(0).to(z.dtype)
    return torch.where(tile == oldest, 1.0, 1 / (1 + age)).expand(z.shape[:-1])


RULE = Rule("static_tiles", importance, source="control", control=True)
