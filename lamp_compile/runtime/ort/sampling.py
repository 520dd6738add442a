"""Choosing the next token of every sequence of a batch from its logits, each by a random number of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamp_compile.errors import OptionError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the likeliest token; above, logits are divided by it.
        top_k: Only that many of the likeliest tokens can be drawn; 0 for all.
        top_p: Of these, only the likeliest that together have this probability.

    Raises:
        OptionError: A number is impossible.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, int | float) and 0 <= self.temperature < math.inf):
            raise OptionError(
                f"temperature is {self.temperature!r}", where="generate", fix="0 for greedy, or a number above"
            )
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise OptionError(f"top_k is {self.top_k!r}", where="generate", fix="a whole number, 0 for all tokens")
        if not (isinstance(self.top_p, int | float) and 0 < self.top_p <= 1):
            raise OptionError(f"top_p is {self.top_p!r}", where="generate", fix="above 0, at most 1")

    def choose(self, logits: NDArray[np.float32], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
        """Token ids ``[B]`` for logits ``[B, V]``.

        Args:
            logits: Of the last position of every sequence.
            uniform: One number in [0, 1) per sequence, ``[B]``: where in its distribution the token is taken from. The
                same number gives the same token, whatever else is in the batch.
        """
        if self.temperature == 0:
            return np.asarray(logits.argmax(-1), np.int64)
        # float64, so that the last bits of a sum over the vocabulary decide nothing.
        scores = logits.astype(np.float64) / self.temperature
        order: NDArray[Any] = np.argsort(-scores, axis=-1, kind="stable")
        if self.top_k:
            order = order[:, : self.top_k]
        sorted_scores = np.take_along_axis(scores, order, -1)
        likely = np.exp(sorted_scores - sorted_scores[:, :1])
        likely /= likely.sum(-1, keepdims=True)
        upto = likely.cumsum(-1)
        kept = (upto - likely) < self.top_p  # the first is always kept
        mass = (likely * kept).sum(-1, keepdims=True)
        place = (upto <= uniform[:, None] * mass).sum(-1)
        place = np.minimum(place, kept.sum(-1) - 1)
        return np.asarray(np.take_along_axis(order, place[:, None], -1)[:, 0], np.int64)


def draws(seed: int, count: int) -> list[np.random.Generator]:
    """One source of random numbers for each of ``count`` prompts; what it gives depends on seed and index only.

    Raises:
        OptionError: The seed is no whole number from 0 on.
    """
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise OptionError(f"seed is {seed!r}", where="generate", fix="a whole number from 0 on")
    return [np.random.default_rng([seed, index]) for index in range(count)]
