"""How well gates predict on held-out text, against copying the step before and against sink + newest; and what is set
by it: the level of the predicted importance, the limit of the audit, the margin of skipping."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lamp_compile.quality.network.samples import BURN_IN, Sample, Sampling
from lamp_compile.quality.network.train import divergence, forward
from lamp_compile.runtime.network import audit, gate
from lamp_compile.runtime.network.gate import Gate

TAU = 0.01
"""Threshold at which sub-tiles count as hot: that of the default plan."""
BLENDS = (1e-3, 1e-2, 1e-1)
"""Shares of a uniform distribution that copying the step before is blended with; the best counts."""
SURE = 0.999
"""Share of sub-tiles whose importance the margin must cover."""


@dataclass(frozen=True)
class Row:
    """One layer and one step ahead: divergence in nats and share of hot sub-tiles found, at an equal refined share."""

    ahead: int
    hot_share: float
    kl: float
    kl_copy: float
    kl_static: float
    recall: float
    recall_copy: float
    recall_static: float
    missed: float
    """Energy left unrefined over that which the exact look-ahead leaves, at an equal share."""

    @property
    def better(self) -> bool:
        """Than both baselines, in both measures."""
        return self.kl < min(self.kl_copy, self.kl_static) and self.recall > max(self.recall_copy, self.recall_static)


def measure(made: Gate, samples: list[Sample], sampling: Sampling) -> list[Row]:
    """Rows for t, t+1 ... t+W of one layer over held-out samples."""
    rows = slice(BURN_IN, BURN_IN + sampling.rows)
    return [_row(made, samples, rows, step, sampling) for step in range(sampling.ahead + 1)]


def calibrated(made: Gate, samples: list[Sample], sampling: Sampling) -> Gate:
    """The gate with its level, limit and margin set on held-out samples.

    The level is shifted so that at ``TAU`` as many sub-tiles are hot as by the exact look-ahead; the limit of the audit
    is twice the largest excess over a window of the guard; the margin covers ``SURE`` of the sub-tiles called cold.
    """
    rows = slice(BURN_IN, BURN_IN + sampling.rows)
    kv_heads, per = made.limit.shape[0], made.query.shape[0] // made.limit.shape[0]
    shift, limit, margin = [], [], []
    seen = [(_shared(forward(made, s, _all(s), rows, 0)[0][0], s, rows, kv_heads), s) for s in samples]
    for g in range(kv_heads):
        pairs = [_flat(guess[:, g], s, rows, g) for guess, s in seen]
        guess, exact = (torch.cat(x) for x in zip(*pairs, strict=True))
        hot = int((exact > TAU).sum())
        shift.append(float((TAU / guess.topk(max(1, hot)).values[-1].clamp(1e-6, 1.0)).log()))
        excess = [audit_excess((guess_ * torch.tensor(shift[g]).exp())[:, g], s, rows, g) for guess_, s in seen]
        limit.append(max(4.0, 2 * float(torch.cat(excess).max())))
        cold = guess * torch.tensor(shift[g]).exp()
        kept = cold <= TAU
        ratio = (exact[kept] / cold[kept].clamp_min(1e-12)).sort().values
        margin.append(max(1.0, float(ratio[int(SURE * (ratio.numel() - 1))]) if ratio.numel() else 1.0))
    extra = made.extra.clone()
    extra[:, :, gate.OFFSET] += torch.tensor(shift).repeat_interleave(per)
    # Half precision in the file: a margin or limit beyond it would be infinite.
    return replace(
        made, extra=extra, limit=torch.tensor(limit).clamp_max(6e4), margin=torch.tensor(margin).clamp_max(6e4)
    )


def audit_excess(guess: Tensor, sample: Sample, rows: slice, g: int) -> Tensor:
    """Means over windows of the audit of its excess, as a running sequence would see them."""
    exact = sample.shared[:, g, rows]
    energy = exact.square()
    allowed = (energy * (exact <= TAU)).sum(-1) + audit.SLACK * TAU**2
    whole = guess.masked_fill(~_whole(sample, rows), 1.0)
    excess = ((energy * (whole <= TAU)).sum(-1) / allowed).clamp_max(audit.CEILING)
    return excess.unfold(-1, min(audit.WINDOW, excess.shape[-1]), 1).mean(-1).flatten()


def _row(made: Gate, samples: list[Sample], rows: slice, step: int, sampling: Sampling) -> Row:
    """One step ahead. Every method is given the newest sub-tile, which is refined anyway."""
    later = slice(rows.start + step, rows.stop + step)
    kv_heads = made.limit.shape[0]
    guesses: dict[str, list[Tensor]] = {"network": [], "copy": [], "static": []}
    kls: dict[str, list[Tensor]] = {"network": [], "static": [], **{f"copy {blend}": [] for blend in BLENDS}}
    profile = _profile(samples, later)
    exact = []
    for s in samples:
        log, mass = forward(made, s, _all(s), rows, sampling.ahead)[step]
        target = s.mass[:, :, later]
        kls["network"].append(divergence(target, mass).flatten())
        before = s.mass[:, :, rows.start - 1 : rows.stop - 1].exp()
        alive = s.live(_all(s), later, s.subtile)
        for blend in BLENDS:
            uniform = alive / alive.sum(-1, keepdim=True)
            copied = (before * (1 - blend) + blend * uniform).clamp_min(1e-26).log()
            kls[f"copy {blend}"].append(divergence(target, copied).flatten())
        static = (profile[_age(s, later)] * alive).clamp_min(1e-26)
        kls["static"].append(divergence(target, (static / static.sum(-1, keepdim=True)).log()).flatten())
        newest = _age(s, later) == 0
        sink = torch.arange(s.mass.shape[-1]) == 0
        ranked = {
            "network": _shared(log, s, later, kv_heads),
            "copy": s.shared[:, :, rows.start - 1 : rows.stop - 1],
            "static": torch.where(sink, 2.0, 1 / (1.0 + _age(s, later))).expand_as(s.shared[:, :, later]),
        }
        for name, values in ranked.items():
            held = values.masked_fill(newest, 3.0).masked_fill(~alive, -1.0)
            guesses[name].append(held[alive.expand_as(held)])
        exact.append(s.shared[:, :, later][alive.expand(-1, kv_heads, -1, -1)])
    truth = torch.cat(exact)
    found = {name: _found(torch.cat(values), truth) for name, values in guesses.items()}
    kl = {name: float(torch.cat(values).mean()) for name, values in kls.items()}
    return Row(
        step, float((truth > TAU).float().mean()), kl["network"], min(kl[f"copy {b}"] for b in BLENDS), kl["static"],
        found["network"][0], found["copy"][0], found["static"][0], found["network"][1],
    )  # fmt: skip


def _found(guess: Tensor, truth: Tensor) -> tuple[float, float]:
    """Share of hot sub-tiles among as many that the guess puts first, and the energy missed over that of the cold."""
    hot = truth > TAU
    count = max(1, int(hot.sum()))
    chosen = torch.zeros_like(hot)
    chosen[guess.topk(count).indices] = True
    left = (truth.square() * ~hot).sum().clamp_min(1e-12)
    return float((hot & chosen).sum()) / count, float((truth.square() * ~chosen).sum() / left)


def _profile(samples: list[Sample], rows: slice) -> Tensor:
    """Mean mass by age in sub-tiles, the first sub-tile apart (at the end): the best that ages alone can say."""
    size = max(s.mass.shape[-1] for s in samples) + 1
    total, count = torch.zeros(size), torch.zeros(size)
    for s in samples:
        mass = s.mass[:, :, rows].exp().mean(1, keepdim=True)
        index = _age(s, rows).flatten()
        total.index_add_(0, index % size, mass.flatten())
        count.index_add_(0, index % size, torch.ones_like(mass).flatten())
    return total / count.clamp_min(1)


def _age(sample: Sample, rows: slice) -> Tensor:
    """Sub-tiles back from the row's own ``[b, 1, n, T]``; -1 for the first sub-tile of all unless it is the newest."""
    tile = torch.arange(sample.mass.shape[-1])
    own = sample.rows[:, None, rows, None] // sample.subtile
    age = (own - tile).clamp_min(0)
    return torch.where((tile == 0) & (age > 0), -1, age)


def _whole(sample: Sample, rows: slice) -> Tensor:
    """Sub-tiles ``[b, n, T]`` that the row sees to their end."""
    end = (torch.arange(sample.mass.shape[-1]) + 1) * sample.subtile
    return end <= sample.rows[:, rows, None]


def _all(sample: Sample) -> Tensor:
    return torch.arange(sample.query.shape[0])


def _shared(log: Tensor, sample: Sample, rows: slice, kv_heads: int) -> Tensor:
    """Log importance ``[b, H, n, T]`` -> importance by the most interested head of the group ``[b, G, n, T]``."""
    return log.exp().reshape(log.shape[0], kv_heads, -1, *log.shape[2:]).amax(2)


def _flat(guess: Tensor, sample: Sample, rows: slice, g: int) -> tuple[Tensor, Tensor]:
    whole = _whole(sample, rows)
    return guess[whole], sample.shared[:, g, rows][whole]


def describe(rows: list[Row]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [{**vars(row), "better": row.better} for row in rows]
