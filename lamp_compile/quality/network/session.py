"""One training of a look-ahead network, from a model and a text to a file: split, train, calibrate, measure, save."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lamp_compile.errors import InputError, ModelError
from lamp_compile.quality.network import score
from lamp_compile.quality.network.samples import Sample, Sampling, observe
from lamp_compile.quality.network.score import Row
from lamp_compile.quality.network.train import Settings, Trainer
from lamp_compile.runtime.network import audit, cost
from lamp_compile.runtime.network.cost import Shape
from lamp_compile.runtime.network.files import About, Layer, Network, basis_of, weights_mark

COST_LIMIT = 0.02
"""Share of the model's operations and bytes that a network may cost, at the length it is trained for."""
RANKS = (8, 16, 24, 32, 40, 48)
SERVES = 3.0
"""A site is served where the network leaves at most this many times the energy unrefined that the exact look-ahead
leaves, on held-out text at an equal refined share, where its audit stays within ``audit.MOST_EXCESS`` there, and where
it beats both baselines; the others keep the exact look-ahead."""
HELD_OUT = 0.15
LEAST_HELD_OUT = 4


@dataclass(frozen=True)
class Text:
    """Windows of one text: those to learn from, and those at its end that are held out.

    Attributes:
        train: int64 ``[n, N]``.
        held_out: int64 ``[m, N]``; the first half sets levels and limits, the second half is measured.
        name: Of the file.
        sha256: Of its ids.
    """

    train: Tensor
    held_out: Tensor
    name: str
    sha256: str


@dataclass(frozen=True)
class Trained:
    """A network and how good it is: rows by site, and costs as shares of the model's."""

    network: Network
    rows: dict[str, list[Row]]
    costs: dict[str, Any]


def split(ids: Tensor, context: int, windows: int, name: str) -> Text:
    """Windows spread over the first part of a text, and over its end.

    Raises:
        InputError: The text is too short for both.
    """
    from lamp_compile.quality.windows import spread

    held = max(LEAST_HELD_OUT, round(windows * HELD_OUT / (1 - HELD_OUT)))
    cut = min(int(ids.numel() * (1 - HELD_OUT)), ids.numel() - context * 2)
    if cut < context:
        raise InputError(
            f"{ids.numel()} tokens are too few to learn from and to hold some out, in windows of {context}",
            where=name,
            fix="a longer text, or a smaller --context",
        )
    room = ids.numel() - cut - context
    count = max(2, min(held, room // max(1, context // 2) + 1))
    digest = hashlib.sha256(ids.to(torch.int32).numpy().tobytes()).hexdigest()
    # Windows may overlap where a text is short; those held out never touch those learnt from.
    train = spread(ids[:cut], context, min(windows, max(1, cut - context)), where=name)
    return Text(train, spread(ids[cut:], context, min(count, max(1, room)), where=name), name, digest)


def shapes_of(fast: Any) -> list[Shape]:
    """Sizes of the sites of a compiled model."""
    return [Shape(s.heads, s.kv_heads, s.head_dim, s.value_dim) for s in fast.lamp.sites if not s.reason]


def costs_of(fast: Any, keys: int, *, rank: int, group: int, subtile: int) -> dict[str, Any]:
    """Shares of the model's operations and bytes in a decode step at ``keys`` cached tokens: network, and exact."""
    linear = sum(m.weight.numel() for m in fast.modules() if isinstance(m, nn.Linear))
    shapes = shapes_of(fast)
    whole = cost.model(linear, shapes, keys)
    return {
        "keys": keys,
        "network": cost.network(shapes, keys, rank=rank, group=group, subtile=subtile).share_of(whole),
        "exact": cost.exact(shapes, keys).share_of(whole),
    }


def largest_rank(fast: Any, keys: int, group: int, subtile: int) -> int:
    """The largest rank that stays within ``COST_LIMIT`` at that length.

    Raises:
        ModelError: None does.
    """
    for rank in reversed(RANKS):
        share = costs_of(fast, keys, rank=rank, group=group, subtile=subtile)["network"]
        if max(share.values()) <= COST_LIMIT:
            return rank
    raise ModelError(
        f"no network for this model costs less than {COST_LIMIT:.0%} of it at {keys} tokens",
        where="rank",
        fix="name a rank, and read the cost that is printed",
    )


def train(
    fast: Any, text: Text, settings: Settings, checkpoint: Path | None, on_window: Callable[[str], None]
) -> Trained:
    """Train, calibrate and measure.

    Args:
        fast: A model of ``lamp_compile.compile(model, mode="eager")``.
        text: What to learn from.
        settings: How.
        checkpoint: See ``Trainer``.
        on_window: Called after each window, trained or held out, with what it was.
    """
    gates = Trainer(fast, settings, text.train, checkpoint).run(on_window)
    samples = _held_out(fast, text.held_out, settings.sampling, on_window)
    half = max(1, text.held_out.shape[0] // 2)
    with torch.no_grad():
        gates = {name: score.calibrated(made, samples[name][:half], settings.sampling) for name, made in gates.items()}
        rows = {name: score.measure(made, samples[name][half:], settings.sampling) for name, made in gates.items()}
    subtile = next(iter(samples.values()))[0].subtile
    costs = costs_of(fast, text.train.shape[1], rank=settings.rank, group=settings.sampling.group, subtile=subtile)
    steady = {name: bool((made.limit < audit.MOST_EXCESS).all()) for name, made in gates.items()}
    about = _about(fast, text, settings, rows, (costs, subtile, steady))
    return Trained(Network(about, gates), rows, costs)


def _held_out(
    fast: Any, windows: Tensor, sampling: Sampling, on_window: Callable[[str], None]
) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    device = next(fast.parameters()).device
    for index in range(windows.shape[0]):
        ids = windows[index : index + 1].to(device)
        observe(fast, ids, 1_000_000 + index, sampling, lambda name, s: found.setdefault(name, []).append(s))
        on_window("held out")
    return found


def _about(
    fast: Any,
    text: Text,
    settings: Settings,
    rows: dict[str, list[Row]],
    measured: tuple[dict[str, Any], int, dict[str, bool]],
) -> About:
    costs, subtile, steady = measured
    layers = []
    for site in fast.lamp.sites:
        if site.name in rows:
            row, plan = rows[site.name], fast.lamp.plan.site(site.name)
            layers.append(
                Layer(
                    site.name,
                    site.heads,
                    site.kv_heads,
                    site.head_dim,
                    serves=row[0].better and row[0].missed <= SERVES and steady[site.name],
                    basis=basis_of(plan.rotation, plan.balance),
                    metrics={"held_out": score.describe(row)},
                )
            )
    modules = [site.module for site in fast.lamp.sites if not site.reason]
    return About(
        tuple(layers), model=fast.lamp.spec.model, weights=weights_mark(modules), rank=settings.rank,
        group=settings.sampling.group, subtile=subtile, ahead=settings.sampling.ahead, trained=text.train.shape[1],
        text=text.name, text_sha256=text.sha256, seed=settings.seed,
        provenance={"windows": text.train.shape[0], "held_out": text.held_out.shape[0], "steps": settings.steps,
                    "costs": costs},
    )  # fmt: skip
