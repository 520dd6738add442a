"""Whom the audit believes: gates that lie either way, that give no number, that are outgrown, or overruled."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lamp_compile.runtime import guard
from lamp_compile.runtime.network import audit

G, T, TAU = 2, 64, 0.01
HOT = 12


def exact() -> Tensor:
    """One row ``[1, G, 1, T]``: a dozen hot sub-tiles, the others well below tau."""
    row = torch.full((1, G, 1, T), TAU / 4)
    row[..., :HOT] = 0.2
    return row


def step(predicted: Tensor, trust: Tensor, *, truth: Tensor | None = None, **changes: object) -> tuple[Tensor, Tensor]:
    given = {
        "tau": torch.full((G,), TAU), "state": guard.new_state(1, G), "limit": torch.full((G,), 8.0),
        "length": torch.tensor([T * 32]), "trained": 4096, "skip_below": None, "lost": 0.0, "subtile": 32, **changes,
    }  # fmt: skip
    return audit.arbitrate(exact() if truth is None else truth, predicted, trust, audit.Terms(**given))  # type: ignore[arg-type]


def run(predicted: Tensor, steps: int, trust: Tensor | None = None, **changes: object) -> tuple[list[bool], Tensor]:
    """Whether each step went by the prediction (all heads), and the trust after them."""
    trust, went = audit.new(1, G) if trust is None else trust, []
    for _ in range(steps):
        importance, trust = step(predicted, trust, **changes)
        went.append(torch.equal(importance, predicted))
    return went, trust


def flags(trust: Tensor) -> list[str]:
    return audit.flag_names(int(trust[..., audit.FLAGS].max()))


def test_a_gate_that_says_what_is_so_is_believed_for_good() -> None:
    went, trust = run(exact() * 1.01, 200)
    assert all(went)
    assert not flags(trust)
    assert float(trust[..., audit.DROPPED].sum()) == 0
    assert trust[0, 0, audit.STEPS] == 200


def test_always_unimportant_is_dropped_within_a_window_and_tried_again_later() -> None:
    nothing = exact().clamp_max(TAU / 100)
    went, trust = run(nothing, audit.WINDOW)
    assert went[0]
    assert not went[-1]
    dropped = went.index(False)
    assert dropped <= 4, "the excess of a missed head is thousands of times the limit"
    assert flags(trust) == [audit.WORDS[audit.MISSED]]
    went, trust = run(nothing, 3 * audit.HOLD)
    # It is tried for a step or two after each hold, and dropped again.
    assert sum(went) <= 3 * (dropped + 1)
    assert trust[0, 0, audit.DROPPED] >= 2


def test_always_important_costs_a_window_at_most_and_raises_the_alarm() -> None:
    went, trust = run(torch.ones(1, G, 1, T), 3 * audit.HOLD)
    assert sum(went) <= 3 * audit.WINDOW
    assert not went[audit.WINDOW]
    assert flags(trust) == [audit.WORDS[audit.LAVISH]]


def test_what_is_no_number_is_never_acted_on() -> None:
    broken = exact()
    broken[..., 5] = torch.nan
    importance, trust = step(broken, audit.new(1, G))
    assert torch.equal(importance, exact())
    assert flags(trust) == [audit.WORDS[audit.NO_NUMBER]]
    assert trust[..., audit.EXCESS].isfinite().all()


def test_beyond_its_length_and_under_a_raised_floor_the_exact_look_ahead_decides() -> None:
    guess = exact() * 1.01
    importance, trust = step(guess, audit.new(1, G), trained=T * 32 - 1)
    assert torch.equal(importance, exact())
    assert flags(trust) == [audit.WORDS[audit.TOO_LONG]]
    assert torch.equal(step(guess, trust)[0], guess), "a shorter sequence is served again"
    raised = guard.new_state(1, G)
    raised[:, 1, guard.FLOOR] = 1
    importance, trust = step(guess, audit.new(1, G), state=raised)
    assert torch.equal(importance[:, 0], guess[:, 0])
    assert torch.equal(importance[:, 1], exact()[:, 1])
    assert trust[0, 1, audit.HELD] == audit.HOLD
    assert trust[0, 0, audit.HELD] == 0


def test_slots_are_judged_apart_and_an_empty_one_keeps_its_trust() -> None:
    truth = exact().repeat(3, 1, 1, 1)
    truth[2] = -1.0  # no live key
    guess = torch.stack((exact()[0] * 1.01, exact()[0] * 0, exact()[0]))
    trust = audit.new(3, G)
    trust[2, :, audit.HELD] = 5
    for _ in range(4):
        terms = audit.Terms(
            torch.full((G,), TAU), guard.new_state(3, G), torch.full((G,), 8.0), torch.tensor([900, 900, 0]), 4096, 32
        )
        importance, trust = audit.arbitrate(truth, guess, trust, terms)
    assert torch.equal(importance[0], guess[0])
    assert torch.equal(importance[1], truth[1])
    assert (trust[2, :, audit.HELD] == 5).all()
    assert (trust[2, :, audit.STEPS] == 0).all()


def test_a_prompt_is_judged_by_its_own_audit() -> None:
    truth = exact().expand(1, G, 20, T)
    importance, trust = step(torch.zeros_like(truth), audit.new(1, G), truth=truth)
    assert torch.equal(importance, truth)
    assert trust[0, 0, audit.EXACT] == 20


def observed(predicted: Tensor, truth: Tensor, trust: Tensor, below: Tensor, lost: float) -> tuple[Tensor, Tensor]:
    """One step that reads what it must: whether sub-tiles were left out ``[1, G, 1, T]``, and the new trust."""
    terms = audit.Terms(
        torch.full((G,), TAU),
        guard.new_state(1, G),
        torch.full((G,), 8.0),
        torch.tensor([T * 32]),
        4096,
        32,
        below,
        lost,
    )
    use = audit.trusted(predicted, trust, terms.state, terms.length, 4096)
    may = (use & ~audit.sees_all(trust))[..., None, None]
    unread = may & (predicted <= below[..., None, None])
    counted = audit.evidence_of(predicted, unread, trust, use, below)
    known = torch.where(unread, predicted, truth)
    new, _ = audit.judge(known, predicted, trust, dataclasses.replace(terms, counted=counted))
    return unread, new


def test_what_was_never_read_is_found_out_by_the_step_that_reads_all() -> None:
    """A gate that hides what matters below the threshold of skipping: between the steps that read all nothing of it
    can be known."""
    hidden = exact()
    hidden[..., 3:HOT] = 1e-6
    trust, believed = audit.new(1, G), []
    trust[..., audit.STEPS] = 5
    below = torch.full((1, G), 1e-5)
    for _ in range(3 * audit.WINDOW):
        unread, trust = observed(hidden, exact(), trust, below, 0.05)
        believed.append(bool((trust[..., audit.HELD] == 0).all()))
        if believed[-1] and not bool((trust[..., audit.STEPS] == audit.WINDOW + 1).any()):
            assert bool(unread.any())
    # Steps 5 to 15 skip, step 16 reads all and drops it.
    assert believed[: audit.WINDOW - 5] == [True] * (audit.WINDOW - 5)
    assert not any(believed[audit.WINDOW - 4 :])
    assert flags(trust) == [audit.WORDS[audit.MISSED]]


def test_an_honest_gate_that_skips_is_believed_for_good() -> None:
    truth = exact()
    truth[..., HOT:] = 2e-6
    trust, skipped = audit.new(1, G), 0
    for _ in range(10 * audit.WINDOW):
        unread, trust = observed(truth * 1.01, truth, trust, torch.full((1, G), 1e-5), 0.05)
        skipped += int(unread.any())
    assert skipped == 10 * (audit.WINDOW - 1), "one step of each window reads all"
    assert not flags(trust)
    assert (trust[..., audit.EXACT] == 0).all()


def test_skipping_more_than_the_budget_drops_the_gate() -> None:
    guess = exact()
    guess[..., HOT:] = 1e-6
    below = torch.full((1, G), 1e-5)
    assert sum(run(guess, 40, skip_below=below, lost=1e-3)[0]) < 20
    assert all(run(guess, 40, skip_below=below * 0, lost=1e-3)[0])
    margin = torch.full((G,), 2.0)
    threshold = audit.skip_threshold(0.01, margin, torch.tensor([2048]), 32)
    # 64 sub-tiles at the threshold, each truly twice as important, hold at most the budget together.
    assert float(threshold[0, 0]) * 2 * 32**0.5 * 64 == torch.tensor(0.01)
