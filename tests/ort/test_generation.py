"""``OrtSession.generate``: one batch, prompts of several lengths, greedy and drawn."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from lamp_compile.errors import InputError, OptionError
from lamp_compile.runtime.ort.sampling import Sampling
from lamp_compile.runtime.ort.session import OrtSession

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11] * 40]


def test_a_batch_gives_what_each_gives_alone(session: OrtSession) -> None:
    together = session.generate(PROMPTS, max_new_tokens=6)
    for prompt, made in zip(PROMPTS, together, strict=True):
        assert made[: len(prompt)].tolist() == prompt
        assert len(made) == len(prompt) + 6
        (alone,) = session.generate(prompt, max_new_tokens=6)
        assert made.tolist() == alone.tolist()


def test_draws_depend_on_the_seed_and_the_prompt_only(session: OrtSession) -> None:
    drawn: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.5, "top_k": 30, "top_p": 0.95}
    first = session.generate(PROMPTS, seed=3, **drawn)
    assert [x.tolist() for x in session.generate(PROMPTS, seed=3, **drawn)] == [x.tolist() for x in first]
    assert [x.tolist() for x in session.generate(PROMPTS, seed=4, **drawn)] != [x.tolist() for x in first]
    assert session.generate(PROMPTS[:1], seed=3, **drawn)[0].tolist() == first[0].tolist()


def test_streaming_and_progress(session: OrtSession) -> None:
    seen: list[tuple[int, int]] = []
    steps: list[tuple[int, int]] = []
    made = session.generate(
        PROMPTS[:2],
        max_new_tokens=4,
        on_token=lambda i, t: seen.append((i, t)),
        progress=lambda a, b: steps.append((a, b)),
    )
    assert [t for i, t in seen if i == 1] == made[1][7:].tolist()
    assert steps == [(2, 8), (4, 8), (6, 8), (8, 8)]
    stream = session.stream(PROMPTS[:2], max_new_tokens=4)
    assert next(stream) == seen[0]  # before the rest is made
    assert session.lengths == [3, 7]
    assert list(stream) == seen[1:]


def test_a_sequence_ends(session: OrtSession) -> None:
    (free,) = session.generate(PROMPTS[1], max_new_tokens=8)
    end = int(free[9])
    first = free[7:].tolist().index(end)
    (made,) = session.generate(PROMPTS[1], max_new_tokens=8, eos_token_id=end)
    assert made[7:].tolist() == free[7 : 8 + first].tolist()
    both = session.generate([PROMPTS[1], PROMPTS[0]], max_new_tokens=8, eos_token_id=[end])
    assert both[0].tolist() == made.tolist()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, OptionError),
        ({"max_new_tokens": 0}, OptionError),
        ({"max_new_tokens": 4, "temperature": -1.0}, OptionError),
        ({"max_new_tokens": 4, "top_p": 0.0}, OptionError),
        ({"max_new_tokens": 4, "top_k": -1}, OptionError),
        ({"max_new_tokens": 4, "seed": -1}, OptionError),
        ({"max_new_tokens": 4, "beams": 4}, OptionError),
        ({"max_new_tokens": 600}, InputError),
        ({"max_new_tokens": 4, "prompts": []}, InputError),
        ({"max_new_tokens": 4, "prompts": [[]]}, InputError),
        ({"max_new_tokens": 4, "prompts": [[1.5]]}, InputError),
        ({"max_new_tokens": 4, "prompts": [[99]]}, InputError),
    ],
)
def test_impossible_requests(session: OrtSession, options: dict[str, Any], error: type[Exception]) -> None:
    session.start(1)
    session.step([[1]])
    given = {"prompts": PROMPTS, **options}
    with pytest.raises(error):
        session.generate(**given)
    assert session.lengths == [1]  # found before anything began


def test_drawing_follows_the_distribution() -> None:
    logits = np.log(np.array([[0.5, 0.25, 0.15, 0.1]], np.float32))
    places = (np.arange(1000) + 0.5) / 1000

    def shares(sampling: Sampling) -> list[float]:
        counts = Counter(int(sampling.choose(logits, np.array([place]))[0]) for place in places)
        return [counts[token] / 1000 for token in range(4)]

    assert shares(Sampling(1.0)) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=2e-3)
    assert shares(Sampling(1.0, top_k=2)) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=2e-3)
    assert shares(Sampling(1.0, top_p=0.8)) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], abs=2e-3)
    assert shares(Sampling(0.5)) == pytest.approx(np.array([0.5, 0.25, 0.15, 0.1]) ** 2 / 0.345, abs=2e-3)
    assert shares(Sampling()) == [1, 0, 0, 0]
