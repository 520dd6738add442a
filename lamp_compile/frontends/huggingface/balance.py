"""The balance: one factor per key channel that takes outlier channels away before the rotation spreads their rounding
error.

Keys are divided by b and queries multiplied by it, after their position is rotated in: exact in real numbers. The
rounding error of a score grows with |q b| |k / b|; over channels that is least for b = sqrt(rms k / rms q), and then
the error is smaller by the gain R = sqrt(sum rms_q^2) sqrt(sum rms_k^2) / sum(rms_q rms_k) >= 1.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.frontends.huggingface.sites import ProbedSite

MODES = ("auto", "always", "never")
THRESHOLD = 1.25
"""Gain from which on ``auto`` balances a site. ``benchmarks/balance.py`` on a trained model with D 128: plain 1.04
to 1.10, where balancing costs 2 % of KL; with three RoPE pairs per kv head scaled by 3, 1.1 to 1.8 and a seventh
less KL; by 10, 1.8 and more and a quarter of the KL; by 30, 4.3 and more and a twentieth."""
SMALLEST = 1e-3
"""Channels quieter than this share of the loudest count as that loud: the factors stay finite and modest."""


def gain(query_rms: Tensor, key_rms: Tensor) -> float:
    """R, the largest over the kv heads of a site. Both ``[G, D]``."""
    q, k = _floored(query_rms), _floored(key_rms)
    ratio = q.square().sum(-1).sqrt() * k.square().sum(-1).sqrt() / (q * k).sum(-1)
    return float(ratio.max())


def factors(query_rms: Tensor, key_rms: Tensor) -> Tensor:
    """b ``[G, D]``, with geometric mean 1."""
    b = (_floored(key_rms) / _floored(query_rms)).sqrt()
    return b / b.log().mean(-1, keepdim=True).exp()


def pooled(site: ProbedSite, config: Any) -> tuple[Tensor, Tensor]:
    """The site's rms of q and k ``[G, D]``, each RoPE pair given one value: later positions turn a pair's channels
    into each other, so that 128 positions say little about the two apart. Channels without a known partner stay
    alone."""
    partner = _partners(site.module, site.head_dim, config)
    return tuple(((x.square() + x[:, partner].square()) / 2).sqrt() for x in (site.query_rms, site.key_rms))  # type: ignore[return-value]


def _partners(module: nn.Module, head_dim: int, config: Any) -> Tensor:
    """The other channel of each channel's pair, asked of the model file's own rotation."""
    alone = torch.arange(head_dim)
    source = sys.modules[type(module).__module__]
    turn = getattr(source, "rotate_half", None) or getattr(source, "rotate_every_two", None)
    if turn is None:
        return alone
    turned = _rotated_channels(head_dim, config)
    with torch.no_grad():
        there = turn(torch.arange(1.0, turned + 1).reshape(1, 1, 1, turned)).reshape(-1)
    if there.shape != (turned,):
        return alone
    return torch.cat((there.abs().long() - 1, alone[turned:]))


def _rotated_channels(head_dim: int, config: Any) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    share = rope.get("partial_rotary_factor") if isinstance(rope, dict) else None
    share = share or getattr(config, "partial_rotary_factor", None) or getattr(config, "rotary_pct", None) or 1.0
    return int(head_dim * share) // 2 * 2


def _floored(rms: Tensor) -> Tensor:
    return rms.maximum((rms.amax(-1, keepdim=True) * SMALLEST).clamp_min(1e-12))
