"""What one attention layer did over one window of text, as a gate learns it: a few blocks of rows, and all keys pooled.

Memory is bounded by one window of one layer at a time, and by the blocks kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.frontends.huggingface.attention import observing
from lamp_compile.plan import SitePlan
from lamp_compile.runtime import formats, reference
from lamp_compile.runtime.arguments import Scores
from lamp_compile.runtime.network import gate

BURN_IN = 16
"""Rows at the head of a block that only fill the running mean of importance."""
FAINTEST = -60.0
"""Log masses below this count as this."""


@dataclass(frozen=True)
class Sample:
    """Blocks of successive rows of one layer in one window; b blocks, n rows each, W of them only as what comes next.

    Attributes:
        query: Prepared queries ``[b, H, n, D]``.
        pooled: Pooled keys ``[G, N / group, D]``.
        rows: Positions ``[b, n]``.
        mass: Log mass of each sub-tile ``[b, H, n, T]``.
        importance: Log importance, the same shape.
        shared: Importance by the most interested head of the group ``[b, G, n, T]``.
        history: What each row knows of those before it ``[b, G, n, T, 2]``.
        scale: On products of queries and keys.
        group: Keys per summary.
        subtile: Keys per sub-tile.
    """

    query: Tensor
    pooled: Tensor
    rows: Tensor
    mass: Tensor
    importance: Tensor
    shared: Tensor
    history: Tensor
    scale: float
    group: int
    subtile: int

    def live(self, blocks: Tensor, rows: slice, size: int) -> Tensor:
        """Whether a span of ``size`` keys has one that the row may see, ``[b, 1, n, N / size]``."""
        first = torch.arange(self.mass.shape[-1] * self.subtile // size) * size
        return first <= self.rows[blocks][:, None, rows, None]


@dataclass(frozen=True)
class Sampling:
    """Which rows are taken.

    Attributes:
        blocks: Blocks of a window.
        rows: Rows of a block that are learnt from; ``BURN_IN`` before and ``ahead`` after them come on top.
        ahead: W.
        group: Keys per summary.
        seed: Of the choice.
    """

    blocks: int = 8
    rows: int = 32
    ahead: int = 3
    group: int = 8
    seed: int = 0

    @property
    def length(self) -> int:
        """Rows of a block."""
        return BURN_IN + self.rows + self.ahead

    def starts(self, context: int, window: int) -> Tensor:
        """First rows of the blocks of one window ``[b]``, spread over it and shifted at random."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + window)
        room = context - self.length
        shift = torch.rand(self.blocks, generator=generator)
        return ((torch.arange(self.blocks) + shift) * room / self.blocks).long().clamp(0, room)


OnSample = Callable[[str, Sample], None]


def observe(fast: Any, ids: Tensor, window: int, sampling: Sampling, on_sample: OnSample) -> None:
    """Run the model over one window ``[1, N]`` and hand each planned layer's sample on as it comes.

    Args:
        fast: A model of ``lamp_compile.compile(model, mode="eager")``; its own attention runs, LAMP looks on.
        ids: The window.
        window: Its number, for the seed.
        sampling: Which rows.
        on_sample: Takes the site's name and its sample.
    """
    rows = {site.module: fast.lamp.plan.site(site.name) for site in fast.lamp.sites if not site.reason}
    starts = sampling.starts(ids.shape[1], window)

    def seen(module: nn.Module, query: Tensor, key: Any, value: Any, arguments: dict[str, Any]) -> None:
        row = rows.get(module)
        if row is not None and row.apply:
            scale = arguments.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
            window_size = int(arguments.get("sliding_window") or 0)
            with torch.enable_grad():
                on_sample(row.name, sample_of(row, query, key, starts, sampling, (scale, window_size)))

    with warnings.catch_warnings(), torch.no_grad(), observing(seen):
        warnings.simplefilter("ignore")  # "LAMP is off for this call", as it should be here
        fast(input_ids=ids, use_cache=False, logits_to_keep=1)


def sample_of(
    row: SitePlan, query: Tensor, key: Tensor, starts: Tensor, sampling: Sampling, how: tuple[float, int]
) -> Sample:
    """The sample of one layer from its queries ``[1, H, N, D]`` and keys ``[1, G, N, D]``; ``how`` is scale and sliding
    window. Targets are the model's own attention, features what the cache would store."""
    scale, window = how
    device = key.device
    balance = None if row.balance is None else torch.tensor(row.balance, device=device)
    positions = (starts[:, None] + torch.arange(sampling.length)).to(device)
    flat = positions.flatten()
    mass, importance = _targets(query[:, :, flat], key, flat, row.subtile, scale, window)
    blocks, length = positions.shape
    heads, kv_heads = query.shape[1], key.shape[1]

    def blocked(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], blocks, length, x.shape[-1]).transpose(0, 1)

    mass, importance = blocked(mass), blocked(importance)
    shared = importance.reshape(blocks, kv_heads, heads // kv_heads, length, -1).amax(2).exp()
    state = shared[:, :, 0, :, None].expand(-1, -1, -1, 2)
    history, _ = gate.histories(shared, state)
    scores = Scores(scale, 0.0, row.rotation, row.query_bits)
    prepared = reference.prepare_query(query[:, :, flat].float(), balance, scores)[0]
    return Sample(
        blocked(prepared), _pooled(row, key, balance, sampling.group), positions.cpu(), mass, importance, shared,
        history, scale, sampling.group, row.subtile,
    )  # fmt: skip


def _targets(
    query: Tensor, key: Tensor, rows: Tensor, subtile: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Log mass and log importance ``[H, rows, T]`` of each sub-tile, by the model's own scores."""
    y = reference._product(query.float(), key.float(), Scores(scale))[0]
    tiles = -(-key.shape[2] // subtile)
    j = torch.arange(key.shape[2], device=key.device)
    live = j <= rows[:, None]
    if window:
        live = live & (j > rows[:, None] - window)
    y = (y - torch.logsumexp(y.masked_fill(~live, -torch.inf), -1, keepdim=True)).masked_fill(~live, -torch.inf)
    y = torch.nn.functional.pad(y, (0, tiles * subtile - y.shape[-1]), value=-torch.inf)
    y = y.reshape(*y.shape[:-1], tiles, subtile)
    return y.logsumexp(-1).clamp_min(FAINTEST), ((2 * y).logsumexp(-1) / 2).clamp_min(FAINTEST)


def _pooled(row: SitePlan, key: Tensor, balance: Tensor | None, group: int) -> Tensor:
    """Pooled keys as stored ``[G, N / group, D]``."""
    planes = reference.quantize(key.float(), key.float(), balance, row.k_format, row.k_format, row.rotation, tile=0)
    stored = formats.get(row.k_format).dequantize(planes.k_high, planes.k_residual, planes.k_scale).float()
    pad = -stored.shape[2] % row.subtile
    stored = torch.nn.functional.pad(stored, (0, 0, 0, pad))[0]
    stored = stored.reshape(stored.shape[0], -1, group, stored.shape[2])
    present = torch.arange(stored.shape[1] * group).reshape(-1, group) < key.shape[2]
    return gate.pool(stored, present.to(key.device).expand(stored.shape[0], -1, -1))
