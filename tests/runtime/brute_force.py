"""Attention with one precision per sub-tile, one number at a time, from the written definition. Slow on purpose."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lamp_compile.ir import Precision
from lamp_compile.runtime import reference
from lamp_compile.runtime.arguments import Planes, Scores, Visibility


@dataclass(frozen=True)
class Case:
    """Inputs of one attention; see ``make``."""

    q: Tensor
    k: Tensor
    v: Tensor
    visible: Visibility
    scores: Scores


def make(
    seed: int = 0,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    queries: int = 3,
    keys: int = 70,
    dim: int = 16,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    softcap: float = 0.0,
    rotation: str = "hadamard",
    query_bits: int = 8,
    **visible: object,
) -> Case:
    """Standard-normal q, k, v of the given shape."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, dim, generator=g, dtype=torch.float64).to(dtype)
    k = torch.randn(batch, kv_heads, keys, dim, generator=g, dtype=torch.float64).to(dtype)
    v = torch.randn(batch, kv_heads, keys, value_dim or dim, generator=g, dtype=torch.float64).to(dtype)
    return Case(q, k, v, Visibility(keys, **visible), Scores(dim**-0.5, softcap, rotation, query_bits))  # type: ignore[arg-type]


def is_live(case: Case, b: int, h: int, i: int, j: int) -> bool:
    """The liveness rule, for one query and key."""
    see, queries = case.visible, case.q.shape[2]
    end = see.keys if see.lengths is None else min(see.keys, int(see.lengths.expand(case.q.shape[0])[b]))
    start = 0 if see.start is None else int(see.start.expand(case.q.shape[0])[b])
    if not start <= j < end:
        return False
    position = {"": None, "top_left": i, "bottom_right": end - queries + i}[see.causal]
    if position is not None and (j > position or (see.window and j <= position - see.window)):
        return False
    return see.mask is None or bool(see.mask.expand(case.q.shape[0], case.q.shape[1], queries, -1)[b, h, i, j])


def scores_of(case: Case, b: int, h: int, i: int, key: Tensor, query: Tensor, start: int = 0) -> list[float]:
    """Scaled and soft-capped scores of one query against ``key`` ``[N, D]``."""
    y = (key @ query * case.scores.scale).tolist()
    cap = case.scores.softcap
    return [math.tanh(x / cap) * cap for x in y] if cap else y


def attend(
    case: Case, planes: Planes, levels: Tensor, balance: Tensor | None, names: tuple[str, str], subtile: int
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, S, Dv]`` and log-sum-exp ``[B, H, S]``."""
    k = [
        reference._dequantize_keys(planes.k_high, r, planes.k_scale, names[0], torch.float64)
        for r in (None, planes.k_residual)
    ]
    v = [
        reference._dequantize_values(planes.v_high, r, planes.v_scale, names[1], torch.float64)
        for r in (None, planes.v_residual)
    ]
    prepared = reference.prepare_query(case.q.double(), balance, case.scores)
    batch, heads, queries, _ = case.q.shape
    group = heads // case.k.shape[1]
    out = torch.zeros(batch, heads, queries, case.v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, queries), -math.inf, dtype=torch.float64)
    from lamp_compile.runtime import rotation

    for b in range(batch):
        for h in range(heads):
            g = h // group
            values = [rotation.unrotate(x[b, g], case.scores.rotation) for x in v]
            for i in range(queries):
                y = [scores_of(case, b, h, i, k[r][b, g], prepared[b, h, i]) for r in (0, 1)]
                y.append(scores_of(case, b, h, i, case.k[b, g].double(), case.q[b, h, i].double()))
                terms: list[tuple[float, Tensor]] = []
                for j in range(case.visible.keys):
                    level = int(levels[b, g, i, j // subtile])
                    if level == Precision.SKIP or not is_live(case, b, h, i, j):
                        continue
                    source = {Precision.HIGH: 0, Precision.BOTH: 1, Precision.EXACT: 2}[Precision(level)]
                    added = 0.0
                    if case.visible.bias is not None:
                        added = float(case.visible.bias.expand(batch, heads, queries, -1)[b, h, i, j])
                    value = case.v[b, g, j].double() if source == 2 else values[source][j]
                    terms.append((y[source][j] + added, value))
                if not terms:
                    continue
                logits = [t[0] for t in terms]
                if case.visible.sinks is not None:
                    logits.append(float(case.visible.sinks[h]))
                top = max(logits)
                total = sum(math.exp(x - top) for x in logits)
                lse[b, h, i] = top + math.log(total)
                for score, value in terms:
                    out[b, h, i] += math.exp(score - float(lse[b, h, i])) * value
    return out, lse
