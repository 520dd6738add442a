"""Choosing the next token of every sequence of a batch, each by a random number of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lamp_compile.errors import OptionError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the likeliest token; above, logits are divided by it.
        top_p: Only the likeliest tokens that together have this probability can be drawn.

    Raises:
        OptionError: A number is impossible.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.temperature, int | float) and 0 <= self.temperature < math.inf):
            raise OptionError(
                f"temperature is {self.temperature!r}", where="generate_many", fix="0 for greedy, or a number above"
            )
        if not (isinstance(self.top_p, int | float) and 0 < self.top_p <= 1):
            raise OptionError(f"top_p is {self.top_p!r}", where="generate_many", fix="above 0, at most 1")

    @property
    def greedy(self) -> bool:
        """Whether no random number is needed."""
        return self.temperature == 0

    def choose(self, logits: Tensor, uniform: Tensor | None) -> Tensor:
        """Token ids ``[B]`` for logits ``[B, V]``.

        Args:
            logits: Of the last position of every sequence.
            uniform: One number in [0, 1) per sequence, ``[B]``: where in its distribution the token is taken from. The
                same number gives the same token, whatever else is in the batch. None where none is needed.
        """
        if self.greedy or uniform is None:
            return logits.argmax(-1)
        # float64, so that the last bits of a sum over the vocabulary decide nothing.
        probabilities = torch.softmax(logits.double() / self.temperature, dim=-1)
        likely, order = probabilities.sort(dim=-1, descending=True, stable=True)
        upto = likely.cumsum(-1)
        kept = (upto - likely) < self.top_p  # the first is always kept
        mass = (likely * kept).sum(-1, keepdim=True)
        place = (upto <= uniform.to(upto)[:, None] * mass).sum(-1, keepdim=True)
        last = kept.sum(-1, keepdim=True) - 1
        return order.gather(-1, torch.minimum(place, last)).squeeze(-1)
