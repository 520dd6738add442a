"""Inputs of a decode step of a chosen size, and shares of refined sub-tiles imposed on them.

Keys are random, with one key in each sub-tile planted along a query of its group. How strongly it scores varies over
the sub-tiles in clusters, with a heavy tail, a sink at the start and the newest ones raised, as in real text. Which
share of the sub-tiles is refined is then a matter of tau alone, taken per sequence and kv head from the importance that
the look-ahead finds, so that one set of planes serves every share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamp_compile.runtime import fused_ops, guard

TILE = SUBTILE = 32
STORE: dict[str, Any] = dict(k_format="nested8", v_format="nested8", rotation="hadamard")
SHAPE: dict[str, Any] = dict(causal="bottom_right", window=0, scale=None, softcap=0.0)
RULE: dict[str, Any] = dict(rule="energy", query_bits=8, subtile=SUBTILE, site="benchmark")
GUARD: dict[str, Any] = dict(guard_window=16, guard_hold=64, hysteresis=0.5)
NEVER = 1e30
"""A tau that refines nothing."""


@dataclass(frozen=True)
class Case:
    """``batch`` sequences of ``length`` tokens."""

    batch: int
    length: int

    @staticmethod
    def parse(text: str) -> Case:
        """Of ``"32x32768"``."""
        batch, length = text.split("x")
        return Case(int(batch), int(length))

    @property
    def name(self) -> str:
        """As in the results."""
        return f"{self.batch}x{self.length}"

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.batch * self.length


@dataclass(frozen=True)
class Shape:
    """Heads and channels."""

    kv_heads: int = 8
    group: int = 4
    dim: int = 128

    def bytes_touched(self, case: Case, share: float) -> float:
        """Bytes the scheme must read: high planes and scales of all keys, residual planes of the refined ones."""
        per_key = self.dim * (1 + share) + 4
        return case.tokens * self.kv_heads * per_key


@dataclass
class Inputs:
    """One set of inputs: query ``[B, H, 1, D]``, keys and values ``[B, G, N, D]`` in bf16, and their planes."""

    q: Tensor
    k: Tensor
    v: Tensor
    planes: tuple[Tensor, ...]
    lengths: Tensor

    def copy(self) -> Inputs:
        """The same at other addresses."""
        return Inputs(
            self.q.clone(), self.k.clone(), self.v.clone(), tuple(p.clone() for p in self.planes), self.lengths
        )


def make(case: Case, shape: Shape, device: torch.device, seed: int = 0) -> Inputs:
    """Planted inputs, made a sequence at a time."""
    generator = torch.Generator(device).manual_seed(seed)
    like: dict[str, Any] = dict(generator=generator, device=device)
    q = torch.randn(case.batch, shape.kv_heads * shape.group, 1, shape.dim, **like).bfloat16()
    k = torch.empty(
        case.batch, shape.kv_heads, case.length, shape.dim, dtype=torch.bfloat16, device=device
    )  # fmt: skip
    v, planes = torch.empty_like(k), None
    for b in range(case.batch):
        grouped = q[b].float().reshape(shape.kv_heads, shape.group, shape.dim)
        k[b], v[b] = _planted(grouped, case.length, like), torch.randn(k.shape[1:], **like).bfloat16()
        made = torch.ops.lamp.quantize(k[b : b + 1], v[b : b + 1], None, **STORE, tile=TILE, site="benchmark")
        if planes is None:
            planes = tuple(p.new_empty((case.batch, *p.shape[1:])) for p in made)
        for plane, part in zip(planes, made, strict=True):
            plane[b] = part[0]
    assert planes is not None
    return Inputs(q, k, v, planes, torch.full((case.batch,), case.length, device=device))


def _planted(q: Tensor, keys: int, like: dict[str, Any]) -> Tensor:
    """Keys ``[G, N, D]`` for queries ``[G, group, D]``, one of each sub-tile planted."""
    kv_heads, group, dim = q.shape
    tiles = keys // SUBTILE
    k = torch.randn(kv_heads, keys, dim, **like)
    white, slow = torch.randn(kv_heads, tiles, **like), torch.randn(kv_heads, 1, tiles + 7, **like)
    clustered = torch.nn.functional.avg_pool1d(slow, 8, 1)[:, 0] * math.sqrt(8)
    score = 1 + 2 * (0.75 * clustered + 0.66 * white)
    score[:, 0], score[:, -2:] = 8.0, score[:, -2:] + 2.0
    score = score.clamp(0.0, 9.0)
    place = torch.arange(tiles, device=k.device) * SUBTILE + torch.randint(SUBTILE, (kv_heads, tiles), **like)
    row = torch.randint(group, (kv_heads, tiles), **like)
    along = q.gather(1, row[..., None].expand(-1, -1, dim))
    along = along * (score * math.sqrt(dim) / along.square().sum(-1))[..., None]
    return k.scatter_add_(1, place[..., None].expand(-1, -1, dim), along).bfloat16()


def importance(inputs: Inputs) -> Tensor:
    """Importance ``[B, G, T]`` of every sub-tile, largest first, from the look-ahead, a sequence at a time."""
    found = []
    k_high, _, k_scale = inputs.planes[:3]
    keys = k_scale.shape[2]
    for b in range(inputs.q.shape[0]):
        one = slice(b, b + 1)
        found.append(
            torch.ops.lamp.look_ahead(
                inputs.q[one], k_high[one], k_scale[one], None, None, None, None, None, inputs.lengths[one], None,
                **SHAPE, keys=keys, k_format="nested8", rotation="hadamard", **RULE,
            )[:, :, 0]
        )  # fmt: skip
    return torch.cat(found).sort(dim=-1, descending=True).values


def tau_for(ranked: Tensor, share: float) -> Tensor:
    """tau ``[B, G]`` that refines this share of the sub-tiles of every sequence and head."""
    tiles = ranked.shape[-1]
    count = min(tiles, max(0, round(share * tiles)))
    above = ranked[..., count - 1] if count else ranked[..., 0] * 4
    below = ranked[..., count] if count < tiles else ranked[..., -1] / 4
    return (above.clamp_min(1e-30) * below.clamp_min(1e-30)).sqrt()


class Attention:
    """``lamp::fused_attention`` with its hot tensors and state, for inputs of one shape."""

    def __init__(self, inputs: Inputs, floor: int = 0, tau: float = NEVER) -> None:
        batch, kv_heads = inputs.planes[0].shape[:2]
        device = inputs.q.device
        self.tau = torch.full((batch, kv_heads), tau, device=device)
        self.floor = torch.full((kv_heads,), float(floor), device=device)
        self.budget = torch.full((kv_heads,), math.inf, device=device)
        self.state = guard.new_state(batch, kv_heads, device)
        self.stats = guard.new_stats(batch, kv_heads, device)
        options = {**SHAPE, "keys": inputs.planes[2].shape[2], **STORE, **RULE, **GUARD}
        self.settings = fused_ops.settings(options)

    def __call__(self, inputs: Inputs) -> Tensor:
        """As a compiled graph calls it."""
        out: Tensor = torch.ops.lamp.fused_attention.default(
            inputs.q, *inputs.planes, self.tau, self.floor, self.budget, self.state, self.stats,
            None, None, None, None, None, inputs.lengths, None, *self.settings,
        )  # fmt: skip
        return out

    def path(self, inputs: Inputs) -> str:
        """What runs: the kernels, or the reference and why."""
        try:
            from lamp_compile.runtime import kernels
        except ImportError:
            return "reference: there are no kernels"
        options = {**SHAPE, **STORE, **RULE, **GUARD}
        reason = kernels.why_not_attend(inputs.q, inputs.planes, self.state, options)
        if reason or inputs.q.device.type != "cpu":
            return f"reference: {reason}" if reason else "kernels"
        alone = kernels.cpu.join_torch()
        return f"kernels, called by Python: {alone}" if alone else "kernels"

    def share(self, inputs: Inputs) -> float:
        """Share of live sub-tiles that one call refines, as its statistics count it."""
        self.stats.zero_()
        self.state.zero_()
        self(inputs)
        counts = self.stats.sum((0, 1)).tolist()
        self.stats.zero_()
        return counts[guard.REFINED] / max(1, counts[guard.LIVE])

    def impose(self, inputs: Inputs, wanted: float, ranked: Tensor, tolerance: float = 0.05) -> float:
        """Set tau so that this share is refined; gives back the share that is."""
        if wanted >= 1.0:
            self.floor.fill_(1.0)
            return self.share(inputs)
        self.tau.copy_(tau_for(ranked, wanted) if wanted else torch.full_like(self.tau, NEVER))
        start = self.tau.clone()

        def at(factor: float) -> float:
            self.tau.copy_(start * math.exp(factor))
            return self.share(inputs)

        return search(at, wanted, max(tolerance * wanted, 0.5 / ranked.shape[-1]))


def search(at: Callable[[float], float], wanted: float, tolerance: float, span: float = 3.0, steps: int = 10) -> float:
    """Bisect the logarithm of a factor on tau, which lowers the share, starting from 0; gives back the last share."""
    got = at(0.0)
    low, high = -span, span
    for _ in range(steps):
        if not wanted or abs(got - wanted) <= tolerance:
            break
        middle = (low + high) / 2 if (low, high) != (-span, span) else (0.25 if got > wanted else -0.25)
        got = at(middle)
        low, high = (middle, high) if got > wanted else (low, middle)
    return got
