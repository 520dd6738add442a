"""Fragile keys: channels that a text makes much larger than the others of their kv head, and what their part is.

A per-row scale follows the largest channel, so one large channel makes the steps of all others coarse; after the
rotation its rounding error reaches every channel that the query reads. Large key biases do that (Qwen2), and so do
outlier channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.frontends.huggingface import balance
from lamp_compile.frontends.huggingface.attention import NAME, observing
from lamp_compile.frontends.huggingface.sites import ProbedSite
from lamp_compile.frontends.structure import structural_copy

FRAGILE = 6.0
"""A RoPE pair of keys is listed as fragile from this many times the rms of the head's median channel on. A trained
Llama without biases has a few of 7 to 12 times by itself, and is no worse for it; planted biases reach 150. The list
says where to look: what is done is decided by KL."""


@dataclass(frozen=True)
class FragileKey:
    """One large channel.

    Attributes:
        site: Attention module.
        head: kv head.
        channel: Of the key, after RoPE.
        times: Its rms (with the other channel of its RoPE pair) over that of the head's median channel.
        constant: Share of its mean square that is the same for all keys, 0 to 1: near 1 a bias, near 0 an outlier.
    """

    site: str
    head: int
    channel: int
    times: float
    constant: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True)
class KeyStatistics:
    """Of one site, on a text, after RoPE: root mean squares ``[G, D]`` of query and key, and mean of the keys."""

    query_rms: Tensor
    key_rms: Tensor
    key_mean: Tensor


def statistics(
    model: nn.Module, windows: Tensor, on_window: Callable[[str], None] | None = None
) -> dict[str, KeyStatistics]:
    """Statistics of every attention of a transformers decoder over windows ``[n, T]``: one exact forward for each.

    Memory does not grow with the text: sums of one number per channel are kept.
    """
    exact: Any = structural_copy(model)
    exact.set_attn_implementation(NAME)
    names = {id(module): name for name, module in exact.named_modules()}
    sums: dict[str, tuple[Tensor, Tensor, Tensor, int]] = {}

    def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> None:
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[-1]) if q.shape[1] % k.shape[1] == 0 else q
        new = (_mean(grouped.double().square()), _mean(k.double().square()), _mean(k.double()))
        old = sums.get(names[id(module)])
        count = 1 if old is None else old[3] + 1
        kept = new if old is None else tuple(a + b for a, b in zip(old[:3], new, strict=True))
        sums[names[id(module)]] = (kept[0], kept[1], kept[2], count)

    for window in windows:
        with torch.no_grad(), observing(observe):
            exact(input_ids=window[None].to(exact.device), use_cache=False)
        if on_window is not None:
            on_window("keys")
    return {
        name: KeyStatistics((q / n).sqrt().float(), (k / n).sqrt().float(), (mean / n).float())
        for name, (q, k, mean, n) in sums.items()
    }


def fragile(site: ProbedSite, found: KeyStatistics, config: Any) -> list[FragileKey]:
    """The fragile channels of a site, the largest first."""
    _, pooled = balance.pooled(on_text(site, found), config)
    times = pooled / pooled.median(-1, keepdim=True).values.clamp_min(1e-12)
    constant = found.key_mean.square() / found.key_rms.square().clamp_min(1e-24)
    listed = [
        FragileKey(
            site.name, head, channel, round(float(times[head, channel]), 2), round(float(constant[head, channel]), 3)
        )
        for head, channel in (times >= FRAGILE).nonzero().tolist()
    ]
    return sorted(listed, key=lambda key: -key.times)


def on_text(site: ProbedSite, found: KeyStatistics) -> ProbedSite:
    """The site with the statistics of a text instead of the probe's random tokens."""
    return replace(site, query_rms=found.query_rms, key_rms=found.key_rms)


def _mean(x: Tensor) -> Tensor:
    """``[B, G, n, D]`` -> ``[G, D]`` on the CPU."""
    return x.mean((0, 2)).cpu()
