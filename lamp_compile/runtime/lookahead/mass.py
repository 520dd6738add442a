"""mass: top-p over sub-tiles. The heaviest are refined until they hold 1 - tau of the row's mass (LAMP v1 on tiles)."""

import torch
from torch import Tensor

from lamp_compile.runtime.lookahead._base import Rule


def importance(z: Tensor, y: Tensor, live: Tensor) -> Tensor:
    """1 - (mass of all heavier sub-tiles): exceeds tau exactly while the heavier ones hold less than 1 - tau.

    A sub-tile without mass is never refined, however small tau is. Ties go to the earlier sub-tile.
    """
    tile_mass = z.sum(-1)
    ordered, index = tile_mass.sort(dim=-1, descending=True, stable=True)
    heavier = ordered.cumsum(-1) - ordered
    ranked = torch.where(ordered > 0, (1 - heavier).clamp_min(0.0), 0.0)
    return torch.zeros_like(tile_mass).scatter(-1, index, ranked)


RULE = Rule("mass", importance, source="top-p of arXiv 2601.21623 v1, per sub-tile")
