"""How far one model's predictions are from another's, accumulated window by window without leaving the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lamp_compile.errors import InputError

NORMAL_95 = 1.959963984540054
POSITIONS_AT_ONCE = 512
"""Positions whose log-probabilities exist in float32 at a time: 512 x 16,384 tokens are 32 MiB a copy."""


@dataclass(frozen=True)
class Scores:
    """The predictions of a model under test against those of a reference, on the same tokens.

    Attributes:
        positions: Positions compared.
        kl: Mean of KL(reference || test) over positions, in nats.
        agreement: Share of positions with the same most likely next token.
        agreement_low: Lower end of its 95 % Wilson interval.
        agreement_high: Upper end.
        perplexity_ratio: Perplexity of the test on the text over that of the reference.
        max_dlogp: Largest change of the log-probability of a token that does follow in the text.
    """

    positions: int
    kl: float
    agreement: float
    agreement_low: float
    agreement_high: float
    perplexity_ratio: float
    max_dlogp: float


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, NORMAL_95**2
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, middle - half), min(1.0, middle + half)


class Comparison:
    """Running sums of one comparison. ``add`` makes no host synchronisation; ``result`` makes one."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._largest: Tensor | None = None
        self._positions = 0
        self._targets = 0

    def add(self, reference: Tensor, test: Tensor, ids: Tensor) -> None:
        """Take in one batch of windows.

        Args:
            reference: Logits of the reference ``[B, S, V]``.
            test: Logits under test ``[B, S, V]``.
            ids: The tokens ``[B, S]``; position i predicts token i + 1.

        Raises:
            InputError: The shapes do not belong together.
        """
        if reference.shape != test.shape or reference.shape[:2] != ids.shape:
            raise InputError(
                f"logits {tuple(reference.shape)} and {tuple(test.shape)} for ids {tuple(ids.shape)}",
                where="Comparison.add",
                fix="two logits [B, S, V] and ids [B, S] of the same windows",
            )
        targets = torch.full_like(ids, -1)
        targets[:, :-1] = ids[:, 1:]
        self.add_rows(reference.flatten(0, 1), test.flatten(0, 1), targets.reshape(-1))

    def add_rows(self, reference: Tensor, test: Tensor, targets: Tensor) -> None:
        """Take in chosen positions: logits ``[N, V]`` of both, and the tokens ``[N]`` that follow (-1: none does)."""
        device = reference.device
        if self._sums is None:
            self._sums = torch.zeros(4, dtype=torch.float64, device=device)
            self._largest = torch.zeros((), device=device)
        flat = targets.to(device)
        for first in range(0, flat.numel(), POSITIONS_AT_ONCE):
            rows = slice(first, first + POSITIONS_AT_ONCE)
            self._add_rows(reference[rows].float(), test[rows].float(), flat[rows])
        self._positions += flat.numel()
        self._targets += int((targets >= 0).sum())

    def _add_rows(self, reference: Tensor, test: Tensor, targets: Tensor) -> None:
        assert self._sums is not None
        assert self._largest is not None
        ref, new = reference.log_softmax(-1), test.log_softmax(-1)
        kl = (ref.exp() * (ref - new)).sum(-1)
        same = ref.argmax(-1) == new.argmax(-1)
        known = targets >= 0
        index = targets.clamp_min(0)[:, None]
        ref_target = ref.gather(-1, index)[:, 0].masked_fill(~known, 0.0)
        new_target = new.gather(-1, index)[:, 0].masked_fill(~known, 0.0)
        sums = (
            kl.sum(dtype=torch.float64),
            same.sum(),
            ref_target.sum(dtype=torch.float64),
            new_target.sum(dtype=torch.float64),
        )
        self._sums += torch.stack([s.double() for s in sums])
        self._largest = torch.maximum(self._largest, (ref_target - new_target).abs().amax())

    def result(self) -> Scores:
        """The scores so far.

        Raises:
            InputError: Nothing was added.
        """
        if self._sums is None or self._largest is None or not self._targets:
            raise InputError(
                "nothing was compared", where="Comparison.result", fix="add at least one window of two tokens"
            )
        kl, same, ref_logp, new_logp = self._sums.tolist()
        low, high = wilson(round(same), self._positions)
        return Scores(
            positions=self._positions,
            kl=kl / self._positions,
            agreement=same / self._positions,
            agreement_low=low,
            agreement_high=high,
            perplexity_ratio=_exp((ref_logp - new_logp) / self._targets),
            max_dlogp=float(self._largest),
        )


def _exp(x: float) -> float:
    """A model that has fallen apart may give an infinite ratio; it is a result, not an error."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
