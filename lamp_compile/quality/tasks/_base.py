"""What a task is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamp_compile.errors import InputError
from lamp_compile.quality.windows import Encode


@dataclass(frozen=True)
class Material:
    """What tasks are made from.

    Attributes:
        model: The uncompiled model in float32, for tasks that let it write.
        ids: A text as token ids, int64 ``[N]``.
        encode: The model's tokenizer; None where there is none.
        context: Tokens of a sample, at most what the model was made for.
        samples: How many.
        seed: Of everything that is drawn.
    """

    model: Any
    ids: Tensor
    encode: Encode | None
    context: int
    samples: int
    seed: int = 0

    def generator(self, sample: int) -> torch.Generator:
        """Of one sample, so that more samples leave the first ones as they are."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + sample)

    def text(self, length: int, generator: torch.Generator) -> Tensor:
        """A stretch of the text, from a place that is drawn.

        Raises:
            InputError: The text is shorter.
        """
        room = self.ids.numel() - length
        if room < 0:
            raise InputError(
                f"the text has {self.ids.numel()} tokens, a task needs {length}", where="--text", fix="a longer text"
            )
        start = int(torch.randint(room + 1, (1,), generator=generator))
        return self.ids[start : start + length]


@dataclass(frozen=True)
class Choices:
    """Questions with a choice of answers, answered by likelihood.

    Attributes:
        positions: Where each question ends, int64 ``[A]``: the prediction there is for the answer's token.
        candidates: Tokens to choose from, int64 ``[C]``.
        answers: Index of the right one, int64 ``[A]``.
    """

    positions: Tensor
    candidates: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Sample:
    """One sequence and the places that count.

    Attributes:
        ids: int64 ``[T]``.
        parts: By label, positions (int64 ``[P]``) whose predictions are compared.
        choices: By label, questions with a choice of answers.
    """

    ids: Tensor
    parts: dict[str, Tensor]
    choices: dict[str, Choices]


@dataclass(frozen=True)
class Task:
    """One hard task.

    Attributes:
        name: What the table calls it.
        about: What it asks of the cache, in a line.
        build: Makes its samples.
        needs_tokenizer: Its text is written here, so the model's tokenizer must be at hand.
    """

    name: str
    about: str
    build: Callable[[Material], Iterator[Sample]]
    needs_tokenizer: bool = False


def quarters(first: int, last: int) -> dict[str, Tensor]:
    """Positions ``first`` to ``last`` (exclusive) in four parts, by label."""
    parts = torch.arange(first, last).tensor_split(4)
    return {f"{int(part[0])}-{int(part[-1]) + 1}": part for part in parts if part.numel()}
