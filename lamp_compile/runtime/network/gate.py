"""The arithmetic of one layer's gate. Pure functions of tensors: training, the reference and graphs run the same.

Keys are summarised as they are appended: ``rank`` numbers for every ``group`` keys, a projection of their mean in the
stored basis (rotated, balanced). A query, the one that attention itself uses (``reference.prepare_query``), is
projected to ``rank`` numbers too, and the product of the two stands for the score of a group. A sub-tile's log mass is
the log-sum-exp over its groups, plus what its age, being the first, and its importance at the steps before say. The
channel envelope of a group beside its mean found no more on a trained model.

Letters as in ``runtime/ops.py``; R rank, M groups of a sub-tile, T sub-tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

AGES = 16
"""Points of the bias by age, in sub-tiles: log2(1 + age) between them is interpolated."""
SINK, OFFSET, LAST, MEAN = range(4)
"""Fields of ``extra``: bias of the first live sub-tile; log of importance over mass beyond what the groups say; weights
of log importance at the step before, and of its running mean."""
DECAY = 0.9
"""Of the running mean of importance."""
LOWEST = -1e30
"""Score of a group without a live key: nothing, and still a number."""
LEAST = 1e-4
"""Importance below this is no evidence: it is added before a logarithm is taken."""


@dataclass(frozen=True)
class Gate:
    """Weights of one layer, float32."""

    query: Tensor
    """``[H, D, R]``."""
    query_bias: Tensor
    """``[H, R]``."""
    key: Tensor
    """``[G, D, R]``."""
    key_bias: Tensor
    """``[G, R]``."""
    age: Tensor
    """``[W + 1, H, AGES]``, by steps ahead."""
    extra: Tensor
    """``[W + 1, H, 4]``, by steps ahead."""
    ahead: Tensor
    """``[W, H, R, R]``: turns a projected query into what stands for the query 1 ... W steps on."""
    ahead_bias: Tensor
    """``[W, H, R]``."""
    limit: Tensor
    """``[G]``: excess (``audit.py``) beyond which the gate is not believed."""
    margin: Tensor
    """``[G]``: factor on a predicted importance below which the true one lies, measured (``skip``)."""

    def to(self, device: torch.device | str) -> Gate:
        """The same weights on another device."""
        return Gate(*(getattr(self, field.name).to(device) for field in fields(self)))

    @property
    def rank(self) -> int:
        """R."""
        return int(self.query.shape[-1])


def shapes(heads: int, kv_heads: int, dim: int, rank: int, ahead: int) -> dict[str, tuple[int, ...]]:
    """The shape of every weight."""
    return {
        "query": (heads, dim, rank), "query_bias": (heads, rank),
        "key": (kv_heads, dim, rank), "key_bias": (kv_heads, rank),
        "age": (ahead + 1, heads, AGES), "extra": (ahead + 1, heads, 4),
        "ahead": (ahead, heads, rank, rank), "ahead_bias": (ahead, heads, rank),
        "limit": (kv_heads,), "margin": (kv_heads,),
    }  # fmt: skip


def pool(keys: Tensor, present: Tensor) -> Tensor:
    """Keys ``[..., group, D]``, of which ``present`` ``[..., group]`` count -> their mean ``[..., D]``; zeros where
    none is present."""
    return keys.masked_fill(~present[..., None], 0.0).sum(-2) / present.sum(-1, keepdim=True).clamp_min(1)


def summarise(pooled: Tensor, key: Tensor, key_bias: Tensor) -> Tensor:
    """Pooled keys ``[B, G, n, D]`` -> summaries ``[B, G, n, R]``."""
    return pooled @ key.to(pooled.dtype) + key_bias[:, None]


def project(query: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Prepared queries ``[B, H, S, D]`` -> ``[B, H, S, R]``."""
    return query @ weight.to(query.dtype) + bias[:, None]


def look_forward(projected: Tensor, gate: Gate, steps: int) -> Tensor:
    """What stands for the queries ``steps`` (1 ... W) later, ``[B, H, S, R]``; itself for 0."""
    if steps == 0:
        return projected
    return projected + projected @ gate.ahead[steps - 1].to(projected.dtype) + gate.ahead_bias[steps - 1][:, None]


def content(projected: Tensor, summary: Tensor, live: Tensor, tiles: int, scale: float) -> tuple[Tensor, Tensor]:
    """What the summaries say of each sub-tile: log mass and log energy, not normalised, ``[B, H, S, T]``.

    Args:
        projected: ``[B, H, S, R]``.
        summary: ``[B, G, T * M, R]``.
        live: Whether a group has a live key, boolean, broadcastable to ``[B, H, S, T * M]``.
        tiles: T.
        scale: On products.
    """
    batch, heads, queries, rank = projected.shape
    grouped = projected.reshape(batch, summary.shape[1], -1, rank)
    score = (grouped @ summary.to(projected.dtype).transpose(-1, -2)) * scale
    score = (
        score.reshape(batch, heads, queries, -1).masked_fill(~live, LOWEST).reshape(batch, heads, queries, tiles, -1)
    )
    peak = score.amax(-1, keepdim=True)
    weight = (score - peak).exp()
    return weight.sum(-1).log() + peak[..., 0], weight.square().sum(-1).log() / 2 + peak[..., 0]


def predict(
    said: tuple[Tensor, Tensor], history: Tensor, live: Tensor, age: Tensor, extra: Tensor,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log importance (energy rule) and log mass of each sub-tile for each query head, both ``[B, H, S, T]``; -inf where
    no key is live.

    Args:
        said: Of ``content``.
        history: Importance at the step before and its running mean, ``[B, G, S, T, 2]``.
        live: Whether a sub-tile has a live key, boolean, broadcastable to ``[B, H, S, T]``; it may hold one that no
            summary speaks for yet, of steps to come.
        age: The gate's, of one step ahead ``[H, AGES]``.
        extra: The gate's ``[H, 4]``.
        sinks: Logits ``[H]`` that join the softmax's denominator.
    """
    mass, energy = (torch.where(x > LOWEST / 2, x, 0.0) for x in said)
    bias = _bias(history, live, age, extra, mass.shape[1])
    total = (mass + bias).masked_fill(~live, -torch.inf)
    lse = torch.logsumexp(total, dim=-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype).reshape(1, -1, 1, 1))
    lse = lse.masked_fill(lse == -torch.inf, 0.0)  # a row without a live key
    importance = energy + bias + extra[:, OFFSET, None, None] - lse
    return importance.clamp_max(0.0).masked_fill(~live, -torch.inf), total - lse


def hot_newest(importance: Tensor, live: Tensor) -> Tensor:
    """Importance 1 for the newest live sub-tile of each row: it is not whole yet, so no summary speaks for it."""
    tile = torch.arange(live.shape[-1], device=live.device)
    newest = torch.where(live, tile, -1).amax(-1, keepdim=True)
    return torch.where(live & (tile == newest), 1.0, importance)


def histories(importance: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What each of S rows knows of the steps before it, ``[B, G, S, T, 2]``, and the state after them
    ``[B, G, T, 2]``.

    Args:
        importance: Of the rows themselves ``[B, G, S, T]``; below 0 where no key is live. What is no number leaves no
            trace: a spoilt key may be cropped away again.
        state: Before the first row.
    """
    seen = torch.where(importance > 0, importance, 0.0)
    last = torch.cat((state[:, :, None, :, 0], seen[:, :, :-1]), dim=2)
    means, carry = [], state[..., 1]
    for block in torch.split(seen, 64, dim=2):
        rows = block.shape[2]
        back = torch.arange(rows, device=seen.device)
        power = back[:, None] - 1 - back
        weights = torch.where(power >= 0, (1 - DECAY) * DECAY ** power.clamp_min(0).to(seen.dtype), 0.0)
        before = weights @ block + (DECAY ** back.to(seen.dtype))[:, None] * carry[:, :, None]
        means.append(before)
        carry = DECAY * before[:, :, -1] + (1 - DECAY) * block[:, :, -1]
    after = torch.stack((seen[:, :, -1], carry), dim=-1)
    return torch.stack((last, torch.cat(means, dim=2)), dim=-1), after


def _bias(history: Tensor, live: Tensor, age: Tensor, extra: Tensor, heads: int) -> Tensor:
    """Age, first sub-tile and history as a bias ``[B, H, S, T]``."""
    tile = torch.arange(history.shape[3], device=history.device)
    newest = torch.where(live, tile, -1).amax(-1, keepdim=True)
    oldest = torch.where(live, tile, tile.shape[0]).amin(-1, keepdim=True)
    back = (newest - tile).clamp_min(0)
    points = _points(tile.shape[0], age) @ age.T  # [T, H]
    if back.shape[1] == 1:
        by_age = torch.nn.functional.embedding(back[:, 0], points).permute(0, 3, 1, 2)
    else:  # heads that see different keys
        by_age = points.T[None, :, None].expand(*back.shape[:3], -1).gather(3, back)
    weights = extra[:, LAST : MEAN + 1].reshape(history.shape[1], -1, 1, 1, 2)
    past = ((history + LEAST).log()[:, :, None] * weights).sum(-1).flatten(1, 2)
    return by_age + extra[:, SINK, None, None] * (tile == oldest) + past


def _points(tiles: int, like: Tensor) -> Tensor:
    """Weights of the points of the bias by age, for ages 0 ... T - 1, ``[T, AGES]``."""
    octave = (1.0 + torch.arange(tiles, device=like.device, dtype=like.dtype)).log2().clamp_max(AGES - 1)
    return (1 - (octave[:, None] - torch.arange(AGES, device=like.device)).abs()).clamp_min(0.0)
