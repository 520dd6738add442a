"""Drawing tokens: the right distribution, from one number each."""

from __future__ import annotations

import pytest
import torch

from lamp_compile.frontends.huggingface.sampling import Sampling
from tests.tolerances import ARITHMETIC

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.0, -torch.inf, 0.0])


def frequencies(sampling: Sampling, logits: torch.Tensor, count: int = 1 << 16) -> torch.Tensor:
    """Shares of the tokens over evenly spaced numbers: the distribution up to 1 / count."""
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    chosen = sampling.choose(logits.expand(count, -1), uniform)
    return torch.bincount(chosen, minlength=logits.shape[0]) / count


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_shares_are_those_of_the_softmax(temperature: float) -> None:
    wanted = (LOGITS / temperature).softmax(-1)
    found = frequencies(Sampling(temperature), LOGITS)
    assert float((found - wanted).norm() / wanted.norm()) < 2 * ARITHMETIC[torch.float32].relative
    assert found[4] == 0


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, [0]), (0.6, [0, 3]), (0.8, [0, 3, 2]), (1e-9, [0])])
def test_only_the_likeliest_are_drawn(top_p: float, kept: list[int]) -> None:
    wanted = torch.zeros(6)
    wanted[kept] = LOGITS.softmax(-1)[kept]
    wanted /= wanted.sum()
    found = frequencies(Sampling(1.0, top_p), LOGITS)
    assert float((found - wanted).norm() / wanted.norm()) < 2 * ARITHMETIC[torch.float32].relative


def test_ends_of_the_range() -> None:
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert Sampling(1.0).choose(LOGITS.expand(2, -1), ends).tolist() == [0, 1], "the likeliest, the least likely"
    assert Sampling(1.0, 0.6).choose(LOGITS.expand(2, -1), ends).tolist() == [0, 3]
    assert Sampling().choose(LOGITS[None], None).tolist() == [0]
