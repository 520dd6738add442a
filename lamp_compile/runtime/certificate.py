"""The error certificate: an estimate of ||delta out|| per output row, from what attention has at hand.

To first order delta out = sum_i p_i d_i (v_i - o) + sum_i p_i dv_i, with d_i the error of score i and dv_i that of
value i. Rounding errors of stored keys and values are independent between keys, so they add in squares (E|v_i - o|^2
is taken as |v_i|^2 + |o|^2). The rounding of the query is one vector for all keys: its share is bounded with
Jensen's inequality, |sum p_i x_i|^2 <= sum p_i |x_i|^2, instead of being assumed independent.

Per row the certificate holds three sums, already scaled so that

    estimate^2 = certificate[0] * |o|^2 + certificate[1] + certificate[2]

    [0] = E sum p_i^2 d_i^2 (+ query)      [1] = E sum p_i^2 |dv_i|^2      [2] = E sum p_i^2 d_i^2 |v_i|^2 (+ query)

It is an estimate, not a bound. Sums of squares cannot see coherent errors; those are removed at the source
(``formats/nested8.py``: HIGH_OFFSET).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lamp_compile.ir import Precision
from lamp_compile.runtime import formats, layout
from lamp_compile.runtime.arguments import Planes, Scores


@dataclass(frozen=True)
class RowNoise:
    """Per stored key, ``[B, G, 1, N]``: error variances per channel at both precisions, and squared norms."""

    key_high: Tensor
    key_both: Tensor
    value_high: Tensor
    value_both: Tensor
    key_square: Tensor
    value_square: Tensor
    value_dim: int


def row_noise(planes: Planes, head_dim: int, value_dim: int, k_format: str, v_format: str) -> RowNoise:
    """Error variances of every stored row, from its scale."""
    key, value = formats.get(k_format), formats.get(v_format)
    k_square = key.mean_square(layout.key_rows(planes.k_high), planes.k_scale)
    v_square = value.mean_square(layout.value_rows(planes.v_high), planes.v_scale)
    return RowNoise(
        key.noise(planes.k_scale, k_square, False)[:, :, None],
        key.noise(planes.k_scale, k_square, True)[:, :, None],
        value.noise(planes.v_scale, v_square, False)[:, :, None],
        value.noise(planes.v_scale, v_square, True)[:, :, None],
        k_square[:, :, None] * head_dim,
        v_square[:, :, None] * value_dim,
        value_dim,
    )


def sums(p: Tensor, level: Tensor, noise: RowNoise, query: Tensor, scores: Scores) -> Tensor:
    """The three sums ``[B, H, S, 3]`` for weights p ``[B, H, S, N]`` at precisions ``level`` (same shape).

    ``query`` is the prepared query ``[B, H, S, D]``; one softmax row is never quantised here, so it adds no term.
    """
    heads = p.shape[1]

    def per_head(row: Tensor) -> Tensor:
        return row.to(p.dtype).repeat_interleave(heads // row.shape[1], dim=1)

    def at_level(high: Tensor, both: Tensor) -> Tensor:
        stored = torch.where(level >= Precision.BOTH, per_head(both), per_head(high))
        return stored.masked_fill(level == Precision.EXACT, 0.0)

    dead = p == 0
    value_square = per_head(noise.value_square).masked_fill(dead, 0.0)
    key_error = at_level(noise.key_high, noise.key_both).masked_fill(dead, 0.0) * p.square()
    value_error = at_level(noise.value_high, noise.value_both).masked_fill(dead, 0.0) * p.square()
    query_share = per_head(noise.key_square).masked_fill(dead, 0.0) * p * _query_noise(query, scores)
    from_scores = scores.scale**2 * (key_error * query.square().sum(-1, keepdim=True) + query_share)
    return torch.stack(
        (from_scores.sum(-1), value_error.sum(-1) * noise.value_dim, (from_scores * value_square).sum(-1)), dim=-1
    )


def estimate(out: Tensor, certificate: Tensor) -> Tensor:
    """||delta out|| ``[B, H, S]`` from output ``[B, H, S, Dv]`` and certificate ``[B, H, S, 3]``."""
    square = out.to(certificate.dtype).square().sum(-1)
    return (certificate[..., 0] * square + certificate[..., 1] + certificate[..., 2]).sqrt()


def _query_noise(query: Tensor, scores: Scores) -> Tensor:
    """Rounding variance per channel of the prepared query, ``[B, H, S, 1]``."""
    if scores.query_bits == 8:
        return (query.abs().amax(-1, keepdim=True) / 127).square() / 12
    if scores.query_bits == 16:
        return query.square().mean(-1, keepdim=True) * (2.0**-14 / 12 / (7 / 3))
    return torch.zeros_like(query[..., :1])
