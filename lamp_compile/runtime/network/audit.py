"""Whom to believe: the gate, or the exact look-ahead. Held per slot and kv head, decided on the device.

The audit compares what the gate left unrefined with what the exact look-ahead would have left. The energy (sum of z^2,
to which the squared output error is proportional) of sub-tiles it calls cold, over that of those which are cold, is its
*excess*; where sub-tiles may be skipped, the mass lost over the budget counts as well. The share it calls hot over the
share that is hot is its *expense*. Running means of both above a limit, or a prediction that is no number, hand the
head over to the exact look-ahead for ``HOLD`` steps. So does a sequence longer than the gate was trained for, and a
floor that the guard has raised.

Whom to believe is known before a step reads any key; what the step then reads is the audit's evidence: the softmax
weights that it ends up with. Of sub-tiles that were skipped nothing is known, so the first step of every ``WINDOW``
skips nothing, and what it could have skipped counts for the others too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lamp_compile.runtime import guard

EXCESS, EXPENSE, HELD, FLAGS, STEPS, EXACT, DROPPED = range(7)
"""Fields of the trust, float32 ``[B, G, 7]``: running means of excess and expense; steps left with the exact
look-ahead; sticky flags; steps; of these with the exact look-ahead; times that the gate was dropped."""
FIELDS = 7
MISSED, LAVISH, NO_NUMBER, TOO_LONG = 1, 2, 4, 8
"""Flags: it left too much unrefined; it called too much important; it gave no number; sequences outgrew it."""
WORDS = {
    MISSED: "the look-ahead network missed what matters; the exact look-ahead took over",
    LAVISH: "the look-ahead network called too much important; the exact look-ahead took over",
    NO_NUMBER: "the look-ahead network gave no number; the exact look-ahead took over",
    TOO_LONG: "a sequence is longer than the look-ahead network was trained for; the exact look-ahead took over",
}
WINDOW, HOLD = 16, 64
"""Steps of the running means (one of them skips nothing), and of an exact look-ahead before the gate is tried again."""
LAVISH_LIMIT = 2.5
"""Expense beyond which the gate is dropped: it then saves little."""
SLACK = 4.0
"""Sub-tiles at the threshold that are added to what the exact look-ahead leaves, and to what it calls hot: a ratio to
nothing says nothing."""
MOST_EXCESS = 20.0
"""A limit that a file names counts up to this: a file cannot ask for blind trust."""
CEILING = 1e4
"""An excess counts up to this much, so that one row does not hold the running mean up for ever."""


def new(batch: int, kv_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """A fresh trust ``[B, G, 7]``: believed."""
    return torch.zeros(batch, kv_heads, FIELDS, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Terms:
    """What predictions are held against.

    Attributes:
        tau: ``[G]`` or ``[B, G]``.
        state: The guard's ``[B, G, 4]``, as it was before the step.
        limit: Of the excess ``[G]``.
        length: Tokens of each sequence, ``[B]`` or ``[1]``.
        trained: Tokens of the longest sequence the gate was trained on.
        subtile: Keys per sub-tile.
        skip_below: Importance at and below which sub-tiles may be skipped ``[B, G]``, or None.
        lost: Softmax mass that a row may lose to skipping.
        counted: How often each sub-tile counts as evidence ``[B, G, S, T]`` (``evidence_of``); None = once.
    """

    tau: Tensor
    state: Tensor
    limit: Tensor
    length: Tensor
    trained: int
    subtile: int
    skip_below: Tensor | None = None
    lost: float = 0.0
    counted: Tensor | None = None


def trusted(predicted: Tensor, trust: Tensor, state: Tensor, length: Tensor, trained: int) -> Tensor:
    """Heads ``[B, G]`` that go by the gate's prediction ``[B, G, S, T]``: known before any key is read. The other
    arguments as in ``Terms``."""
    believed = _believed(trust, state, _too_long(trust, length, trained))
    return believed & predicted.isfinite().all(-1).all(-1)


def sees_all(trust: Tensor) -> Tensor:
    """Heads ``[B, G]`` whose next step skips nothing, so that the audit sees every sub-tile: the first step of each
    ``WINDOW``."""
    return trust[..., STEPS] % WINDOW == 0


def evidence_of(
    predicted: Tensor, unread: Tensor, trust: Tensor, use: Tensor, skip_below: Tensor | None
) -> Tensor | None:
    """How often each sub-tile counts as evidence in one step, ``[B, G, 1, T]``; None where nothing may be skipped.

    What was not read says nothing. Where a head reads all once in a ``WINDOW``, what it would have skipped in the
    other steps stands for these, and counts ``WINDOW`` times.

    Args:
        predicted: The gate's importance ``[B, G, 1, T]``.
        unread: Sub-tiles that were skipped, boolean ``[B, G, 1, T]``.
        trust: Before the step.
        use: Heads that go by the gate ``[B, G]``.
        skip_below: Importance at and below which sub-tiles may be skipped ``[B, G]``, or None.
    """
    if skip_below is None:
        return None
    stands = (use & sees_all(trust))[..., None, None] & (predicted <= skip_below[..., None, None])
    return torch.where(unread, 0.0, torch.where(stands, float(WINDOW), 1.0))


def arbitrate(exact: Tensor, predicted: Tensor, trust: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """The importance to act on ``[B, G, S, T]``, and the new trust, where the exact importance of all rows is at hand.

    One row is judged by what was known before it, so that nothing waits for the exact look-ahead; several rows at a
    time (a measurement over a window) by their own audit as well.

    Args:
        exact: Importance by the exact look-ahead ``[B, G, S, T]``, below 0 where no key is live.
        predicted: The gate's.
        trust: ``[B, G, 7]``.
        terms: See there.
    """
    use = trusted(predicted, trust, terms.state, terms.length, terms.trained)
    new_trust, dropped = judge(exact, predicted, trust, terms)
    if exact.shape[2] > 1:
        use = use & ~dropped
    return torch.where(use[..., None, None], predicted, exact), new_trust


def judge(known: Tensor, predicted: Tensor, trust: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """The trust after a step ``[B, G, 7]``, and which heads were dropped by it ``[B, G]``.

    Args:
        known: What importance the sub-tiles turned out to have ``[B, G, S, T]``; below 0 where no key is live.
        predicted: The gate's.
        trust: ``[B, G, 7]``.
        terms: See there.
    """
    excess, expense, stepped, broken = _evidence(known, predicted, terms)
    rows, held = known.shape[2], trust[..., HELD]
    too_long = _too_long(trust, terms.length, terms.trained)
    raised = terms.state[..., guard.FLOOR] > 0
    blend = 1.0 if rows > 1 else 1.0 / WINDOW
    believed = _believed(trust, terms.state, too_long)
    means = [trust[..., f] + (x - trust[..., f]) * blend for f, x in ((EXCESS, excess), (EXPENSE, expense))]
    missed, lavish = (means[0] > terms.limit.clamp_max(MOST_EXCESS)) & believed, (means[1] > LAVISH_LIMIT) & believed
    dropped = (missed | lavish | (broken & believed)) & stepped
    use = believed & ~broken & ~(dropped if rows > 1 else torch.zeros_like(dropped))
    flags = trust[..., FLAGS]
    for bit, where in ((MISSED, missed), (LAVISH, lavish), (NO_NUMBER, broken & believed), (TOO_LONG, too_long)):
        flags = guard._set(flags, where & stepped, bit)
    counted = stepped.float() * rows
    clear = dropped | ~believed
    new_trust = torch.stack(
        (
            torch.where(clear, 0.0, means[0]), torch.where(clear, 0.0, means[1]),
            torch.where(dropped | raised, float(HOLD), (held - rows).clamp_min(0.0)), flags,
            trust[..., STEPS] + counted, trust[..., EXACT] + counted * ~use, trust[..., DROPPED] + dropped,
        ),
        dim=-1,
    )  # fmt: skip
    return torch.where(stepped[..., None], new_trust, trust), dropped


def skip_threshold(budget: float, margin: Tensor, length: Tensor, subtile: int) -> Tensor:
    """Predicted importance ``[B, G]`` at and below which a sub-tile is skipped, so that a row loses at most ``budget``
    of its softmax mass wherever the margin holds: a sub-tile's mass is at most sqrt(subtile) times its importance
    (Cauchy-Schwarz), and there are length / subtile of them."""
    tiles = (length.reshape(-1, 1).to(margin.dtype) / subtile).clamp_min(1.0)
    return budget / (tiles * math.sqrt(subtile) * margin)


def flag_names(flags: int) -> list[str]:
    """The sticky flags in words."""
    return [text for bit, text in WORDS.items() if flags & bit]


def _too_long(trust: Tensor, length: Tensor, trained: int) -> Tensor:
    return (length.reshape(-1, 1) > trained).expand(trust.shape[:2])


def _believed(trust: Tensor, state: Tensor, too_long: Tensor) -> Tensor:
    """Heads ``[B, G]`` whose gate is neither held off, nor outgrown, nor overruled by the guard."""
    return (trust[..., HELD] == 0) & ~too_long & ~(state[..., guard.FLOOR] > 0)


def _evidence(known: Tensor, predicted: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean excess and expense over live rows, whether any was live, whether a prediction is no number; ``[B, G]``."""
    skip_below, subtile = terms.skip_below, terms.subtile
    bar = terms.tau.reshape(-1, terms.tau.shape[-1])[..., None, None]
    live = known >= 0  # not where the scores themselves are no numbers: nothing can be held against the gate there
    bad = ~predicted.isfinite()
    seen = torch.where(bad, 0.0, predicted)
    size = torch.where(live, known, 0.0)
    often = 1.0 if terms.counted is None else terms.counted
    energy = size.square() * often
    allowed = (energy * (size <= bar)).sum(-1) + SLACK * bar[..., 0].square()
    left = (energy * (seen <= bar)).sum(-1)
    excess = left / allowed.clamp_min(torch.finfo(energy.dtype).tiny)
    if skip_below is not None:
        gone = (size * often * (seen <= skip_below[..., None, None])).sum(-1) * math.sqrt(subtile)
        # Mass of a sub-tile is between its importance and sqrt(subtile) times it; the geometric mean is taken.
        excess = torch.maximum(excess, gone / (terms.lost * subtile**0.25))
    rows = live.any(-1)
    count = rows.sum(-1).clamp_min(1)
    hot = (live & (known > bar)).sum((-1, -2)) + SLACK * count
    expense = (live & (seen > bar)).sum((-1, -2)) / hot
    return (
        (excess.clamp_max(CEILING) * rows).sum(-1) / count, expense.to(excess.dtype), rows.any(-1), bad.any(-1).any(-1)
    )  # fmt: skip
