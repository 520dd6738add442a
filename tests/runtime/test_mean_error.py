"""Errors that add coherently: their mean, and how it grows with the length of the context.

A random error of one value shrinks as keys are averaged; a biased one does not. Both kinds of attention matter:
diffuse (every key weighs the same) and peaked (a few carry the row).
"""

import math
from functools import cache

import pytest
import torch

from lamp_compile.ir import Precision
from lamp_compile.runtime import reference
from lamp_compile.runtime.arguments import Scores, Visibility
from lamp_compile.runtime.formats import nested8
from tests.tolerances import MEAN_ERROR

DIM = 64
LENGTHS = (1024, 4096, 16384, 65536, 131072)


@cache
def errors(keys: int, sharpness: float, level: Precision, seeds: int = 3, planted: bool = False) -> tuple[float, float]:
    """(relative error of the output, shift of the log-sum-exp), root mean square and mean over seeds.

    ``planted`` only tells a run with a planted fault from one without, for the cache.
    """
    relative, shift = 0.0, 0.0
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        k, v = (torch.randn(1, 1, keys, DIM, generator=g) for _ in range(2))
        q = torch.randn(1, 4, 1, DIM, generator=g) * sharpness
        visible, scores = Visibility(keys), Scores(DIM**-0.5, rotation="hadamard")
        exact, exact_lse = reference.exact_attention(q, k, v, visible, scores.scale)
        planes = reference.quantize(k, v, None, "nested8", "nested8", "hadamard", 128)
        levels = torch.full((1, 1, 1, keys // 32), int(level), dtype=torch.uint8)
        out, lse, _ = reference.attend(q, planes, levels, None, None, visible, scores, "nested8", "nested8", 32)
        relative += float((out - exact).norm() / exact.norm()) ** 2 / seeds
        shift += float((lse - exact_lse).mean()) / seeds
    return math.sqrt(relative), shift


@pytest.mark.parametrize("sharpness", [0.05, 3.0], ids=["diffuse", "peaked"])
@pytest.mark.parametrize("level", [Precision.HIGH, Precision.BOTH])
def test_relative_error_does_not_grow_with_length(level: Precision, sharpness: float) -> None:
    measured = [errors(keys, sharpness, level)[0] for keys in LENGTHS]
    limit = MEAN_ERROR[level.name, "diffuse" if sharpness < 1 else "peaked"]
    assert max(measured) < limit.relative
    assert measured[-1] < limit.growth * measured[0]


@pytest.mark.parametrize("level", [Precision.HIGH, Precision.BOTH])
def test_log_sum_exp_has_no_drift_on_diffuse_attention(level: Precision) -> None:
    assert all(abs(errors(keys, 0.05, level)[1]) < 0.01 for keys in LENGTHS)


def test_without_the_offset_the_error_would_not_average_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant the fault: read the high plane as 16 hi alone. The test above must be able to see it."""
    corrected = errors(16384, 0.05, Precision.HIGH)[0]
    monkeypatch.setattr(nested8, "HIGH_OFFSET", 0.0)
    assert errors(16384, 0.05, Precision.HIGH, planted=True)[0] > 2 * corrected
