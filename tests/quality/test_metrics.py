from __future__ import annotations

import math

import pytest
import torch

from lamp_compile.errors import InputError
from lamp_compile.quality import metrics
from lamp_compile.quality.metrics import Comparison, wilson


def _logits(
    windows: int = 3, length: int = 40, vocabulary: int = 97
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    reference = torch.randn(windows, length, vocabulary) * 3
    test = reference + 0.5 * torch.randn_like(reference)
    return reference, test, torch.randint(vocabulary, (windows, length))


def _brute_force(reference, test, ids):
    ref, new = reference.double().log_softmax(-1), test.double().log_softmax(-1)
    kl = (ref.exp() * (ref - new)).sum(-1).mean().item()
    same = (ref.argmax(-1) == new.argmax(-1)).double().mean().item()
    pick = ids[:, 1:, None]
    change = (ref[:, :-1].gather(-1, pick) - new[:, :-1].gather(-1, pick)).flatten()
    return kl, same, math.exp(change.mean().item()), change.abs().max().item()


def test_scores_are_those_of_brute_force_in_float64():
    reference, test, ids = _logits()
    comparison = Comparison()
    comparison.add(reference, test, ids)
    scores = comparison.result()
    kl, same, ratio, largest = _brute_force(reference, test, ids)
    assert scores.positions == ids.numel()
    assert scores.kl == pytest.approx(kl, rel=1e-5)
    assert 0.3 < same < 0.999, "the example must tell agreement from its opposite"
    assert scores.agreement == pytest.approx(same, abs=1e-12)
    assert scores.perplexity_ratio == pytest.approx(ratio, rel=1e-5)
    assert scores.max_dlogp == pytest.approx(largest, rel=1e-4)
    assert scores.agreement_low < scores.agreement < scores.agreement_high


def test_windows_and_chunks_do_not_change_the_scores(monkeypatch):
    reference, test, ids = _logits()
    whole = Comparison()
    whole.add(reference, test, ids)
    monkeypatch.setattr(metrics, "POSITIONS_AT_ONCE", 7)
    parts = Comparison()
    for i in range(3):
        parts.add(reference[i : i + 1], test[i : i + 1], ids[i : i + 1])
    for name, value in vars(whole.result()).items():
        assert getattr(parts.result(), name) == pytest.approx(value, rel=1e-6)


def test_a_model_agrees_with_itself():
    reference, _, ids = _logits()
    comparison = Comparison()
    comparison.add(reference, reference.clone(), ids)
    scores = comparison.result()
    assert (scores.kl, scores.agreement, scores.perplexity_ratio, scores.max_dlogp) == (0.0, 1.0, 1.0, 0.0)


def test_kl_is_of_the_reference_and_not_the_other_way_round():
    reference = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    test = torch.tensor([[[0.0, 3.0], [0.0, 3.0]]])
    comparison = Comparison()
    comparison.add(reference, test, torch.zeros(1, 2, dtype=torch.int64))
    forward = 0.5 * sum(math.log(0.5) - x for x in torch.tensor([0.0, 3.0]).double().log_softmax(-1).tolist())
    assert comparison.result().kl == pytest.approx(forward, rel=1e-5)


def test_a_nan_is_not_hidden():
    reference, test, ids = _logits()
    test[0, 3] = torch.nan
    comparison = Comparison()
    comparison.add(reference, test, ids)
    assert math.isnan(comparison.result().kl)
    assert math.isnan(comparison.result().perplexity_ratio)


def test_wilson_interval_against_known_values():
    # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3.
    for (hits, n), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)
    assert wilson(0, 0) == (0.0, 1.0)


def test_mismatched_shapes_and_nothing_at_all_are_refused():
    reference, test, ids = _logits()
    with pytest.raises(InputError, match="logits"):
        Comparison().add(reference, test[:, :-1], ids)
    with pytest.raises(InputError, match="nothing was compared"):
        Comparison().result()
