"""The worst case of the error certificate: a bound on ||delta out|| per output row, from scales and stored bytes.

``runtime/certificate.py`` estimates the error; this bounds it, for any errors that rounding could have made. It is
looser by orders of magnitude, costs more than the attention itself, and no kernel computes it: it is for audits and
tests.

Derivation. With the rotated and balanced query q and key k_i in real numbers, what is used instead is q^ and k^_i with
|q - q^| <= a and |k_i - k^_i| <= h_i in every channel: h = s/2 for both planes, 8 s for the high plane alone (lo + 1/2
lies in [-7.5, 7.5], and the half step besides), a = max|q|/254 for an 8-bit query. For the scores y_i = scale q . k_i,

    |y_i - y^_i| = |scale| |q^ . e_i + e . k^_i + e . e_i| <= |scale| (h_i |q^|_1 + a |k^_i|_1 + a D h_i) =: d_i

(a soft cap has slope <= 1 and keeps that). Weights p_i = p^_i e^(y_i - y^_i) / sum_j p^_j e^(y_j - y^_j) then lie
between

    p^_i e^-d_i / (p^_i e^-d_i + sum_(j!=i) p^_j e^d_j)   and   p^_i e^d_i / (p^_i e^d_i + sum_(j!=i) p^_j e^-d_j);

let c_i be the larger distance of these ends from p^_i and u_i the upper end. Since weights sum to 1 (the sink counted
as a key of value 0), sum p_i v_i - o^ = sum p_i (v_i - v^_i) + sum (p_i - p^_i)(v^_i - o^), so with |v_i - v^_i| <=
g_i = sqrt(Dv) times the same h for values,

    |delta out| <= min(sum u_i g_i, max g_i) + sum c_i |v^_i - o^|,   and   <= max (|v^_i - o^| + g_i)

as o is an average of the v_i. The smaller of the two is taken. Rotations keep norms, so all is said of rotated values.

``out`` is held against o^ computed in float64 from the stored bytes, and their distance is added: the bound holds for
whatever arithmetic made ``out``, rounded weights included. What float32 did before the bytes were stored is in h and a.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lamp_compile.errors import OptionError
from lamp_compile.ir import Precision
from lamp_compile.runtime import formats, layout, reference, rotation
from lamp_compile.runtime.arguments import Planes, Scores, Visibility
from lamp_compile.runtime.formats._base import Format

FLOAT32 = 2.0**-24
"""Unit roundoff of the arithmetic before storing; a sum of D terms errs by at most D times that."""
LARGEST = 300.0
"""Score errors beyond this say nothing: exp of them is not formed, and the average's own range is the bound."""

UNDERFLOW = 1e-55
"""More than all true weights together can be of keys whose weight underflows (e^-745), with errors to ``LARGEST``."""


@dataclass(frozen=True)
class Stored:
    """What attention read.

    Attributes:
        planes: Keys and values as ``reference.quantize`` stored them, from float32 or finer.
        levels: Precisions ``[B, G, S, T]`` that attention used: ``HIGH`` or ``BOTH`` wherever a key is live.
        balance: As given to attention.
        k_format: Of the planes; ``nested8`` or ``int8``.
        v_format: The same.
        subtile: Keys per decision.
    """

    planes: Planes
    levels: Tensor
    balance: Tensor | None = None
    k_format: str = "nested8"
    v_format: str = "nested8"
    subtile: int = layout.SUBTILE


def bound(q: Tensor, stored: Stored, visible: Visibility, scores: Scores, out: Tensor | None = None) -> Tensor:
    """A bound on the error of attention over stored planes, ``[B, H, S]`` float64; 0 for rows that see no key, infinity
    where a stored row is no number.

    Args:
        q: ``[B, H, S, D]``, as given to attention.
        stored: What attention read.
        visible: As given to attention.
        scores: As given to attention, with 8 query bits or 0.
        out: What attention gave, ``[B, H, S, Dv]``; None bounds the error of exact arithmetic on the stored bytes.

    Raises:
        OptionError: A format or a query precision without a worst case, or levels that skip or that use originals.
    """
    _check(stored, scores)
    planes, levels = stored.planes, stored.levels
    groups = q.shape[1] // levels.shape[1]
    level = levels.repeat_interleave(stored.subtile, dim=-1).repeat_interleave(groups, dim=1)
    live = visible.live(slice(0, q.shape[2]), q.shape[2], level.shape[-1], q.device) & (level > Precision.SKIP)
    weights, sink, score_error = _weights(q, stored, level, live, visible, scores)
    center, distance, value_error = _values(planes, level, weights, stored.v_format, groups)

    total = _average(weights, sink, score_error, distance, value_error, center.norm(dim=-1))
    seen = live.expand(weights.shape)
    reach = (distance + value_error).masked_fill(~seen, 0.0).amax(-1)
    if visible.sinks is not None:
        reach = torch.maximum(reach, center.norm(dim=-1))
    total = total + UNDERFLOW * reach
    found = torch.where(score_error.masked_fill(~seen, 0.0).amax(-1) > LARGEST, reach, torch.minimum(total, reach))
    found = torch.where(seen.any(-1), (found * (1 + 1e-9)).nan_to_num(torch.inf, torch.inf), 0.0)
    if out is None:
        return found
    rounded = (rotation.unrotate(center, scores.rotation) - out.double()).norm(dim=-1)
    return found + torch.where(seen.any(-1), rounded, 0.0)


def _check(stored: Stored, scores: Scores) -> None:
    for name in (stored.k_format, stored.v_format):
        if formats.get(name).worst is None:
            raise OptionError(f"format {name!r} has no worst case", where="worst_case.bound", fix="nested8 or int8")
    if scores.query_bits == 16:
        raise OptionError("a query of 16 bits has no worst case", where="worst_case.bound", fix="query_bits 8 or 0")
    if bool((stored.levels == Precision.EXACT).any()):
        raise OptionError("levels use the original keys", where="worst_case.bound", fix="HIGH or BOTH")


def _weights(
    q: Tensor, stored: Stored, level: Tensor, live: Tensor, visible: Visibility, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """p^ ``[B, H, S, N]``, the sink's weight ``[B, H, S, 1]`` and d ``[B, H, S, N]``."""
    planes, balance, k_format = stored.planes, stored.balance, stored.k_format
    groups = q.shape[1] // planes.k_high.shape[1]
    made = formats.get(k_format)
    used = reference.prepare_query(q, balance, scores).double()
    plain = reference.prepare_query(q, balance, Scores(scores.scale, 0.0, scores.rotation, 0)).double()
    a = plain.abs().amax(-1, keepdim=True) * (1 + 1e-5) / 254 if scores.query_bits == 8 else used[..., :1] * 0
    a = a + (q.shape[-1] + 4) * FLOAT32 * plain.norm(dim=-1, keepdim=True)
    y = d = used.new_zeros(())
    for refined in (False, True):
        key = _rows(planes.k_high, planes.k_residual if refined else None, planes.k_scale, k_format, layout.key_rows)
        h = _step(made, planes.k_scale, key, refined)
        product = reference._product(used, key, scores)
        h, ones = (x.repeat_interleave(groups, 1)[:, :, None] for x in (h, key.abs().sum(-1)))
        error = abs(scores.scale) * (h * used.abs().sum(-1, keepdim=True) + a * ones + a * q.shape[-1] * h)
        chosen = (level >= Precision.BOTH) == refined
        y, d = torch.where(chosen, product, y), torch.where(chosen, error, d)
    weights, lse = reference._softmax(y, live, visible, slice(0, q.shape[2]))
    sink = torch.zeros_like(weights[..., :1])
    if visible.sinks is not None:
        sink = (visible.sinks.double().reshape(1, -1, 1) - lse).exp().nan_to_num(0.0, 0.0, 0.0)[..., None]
    return weights, sink, d.expand(weights.shape)


def _values(
    planes: Planes, level: Tensor, weights: Tensor, v_format: str, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """o^ ``[B, H, S, Dv]`` (rotated), |v^_i - o^| and g_i ``[B, H, S, N]``."""
    made = formats.get(v_format)
    center, parts = weights.new_zeros(()), []
    for refined in (False, True):
        residual = planes.v_residual if refined else None
        value = _rows(planes.v_high, residual, planes.v_scale, v_format, layout.value_rows)
        g = _step(made, planes.v_scale, value, refined) * value.shape[-1] ** 0.5
        chosen = (level >= Precision.BOTH) == refined
        center = center + reference._weighted(weights * chosen, value)
        parts.append((chosen, value.repeat_interleave(groups, 1), g.repeat_interleave(groups, 1)[:, :, None]))
    distance = error = weights.new_zeros(())
    for chosen, value, g in parts:
        distance = torch.where(
            chosen, torch.cdist(center, value, compute_mode="donot_use_mm_for_euclid_dist"), distance
        )
        error = torch.where(chosen, g, error)
    return center, distance, error.expand(weights.shape)


def _average(
    weights: Tensor, sink: Tensor, score_error: Tensor, distance: Tensor, value_error: Tensor, size: Tensor
) -> Tensor:
    """min(sum u g, max g) + sum c |v^ - o^|, the sink counted as a key of value 0."""
    p = torch.cat([weights, sink], dim=-1)
    d = torch.nn.functional.pad(score_error.clamp_max(LARGEST), (0, 1))
    up, down = p * d.exp(), p * (-d).exp()
    most = up / (up + _others(down)).clamp_min(1e-300)
    least = down / (down + _others(up)).clamp_min(1e-300)
    most = most.clamp_max(1.0).masked_fill(p == 0, 0.0)
    moved = torch.maximum(most - p, p - least).clamp_min(0.0)
    far = torch.cat([distance, size[..., None]], dim=-1)
    g = torch.nn.functional.pad(value_error, (0, 1))
    shared = torch.minimum((most * g).sum(-1), g.masked_fill(p == 0, 0.0).amax(-1))
    return shared + (moved * far).sum(-1)


def _others(x: Tensor) -> Tensor:
    """For every entry the sum of all others; a difference from the whole sum would cancel next to a large entry."""
    before, after = (torch.nn.functional.pad(t[..., :-1].cumsum(-1), (1, 0)) for t in (x, x.flip(-1)))
    return before + after.flip(-1)


def _rows(high: Tensor, residual: Tensor | None, scale: Tensor, name: str, rows: object) -> Tensor:
    """Stored rows as float64 ``[B, G, N, D]``."""
    assert callable(rows)
    made: Tensor = formats.get(name).dequantize(rows(high), None if residual is None else rows(residual), scale)
    return made.double()


def _step(made: Format, scale: Tensor, rows: Tensor, refined: bool) -> Tensor:
    """h ``[B, G, N]``: the format's worst case, and what float32 did before."""
    assert made.worst is not None
    h = made.worst(scale.double(), refined)
    dim = rows.shape[-1]
    stored: Tensor = h + (dim + 4) * FLOAT32 * (rows.norm(dim=-1) + dim**0.5 * h)
    return stored
