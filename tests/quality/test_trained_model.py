"""The claims on a trained model with D 128, where one is at hand (``LAMP_TEST_MODEL``, ``LAMP_TEST_DATA``).

One window of 2,048 tokens for the default plan, of 1,024 for what it is compared with: enough to see a broken rule,
format or balance, too little for the published figures, which ``benchmarks/quality.py`` measures on 65,536 positions.
"""

from __future__ import annotations

import pytest

import lamp_compile
from lamp_compile.quality import evaluate, load, rows, windows
from lamp_compile.quality.engine import CompiledEngine


def measure(small_model, text_data, tokens, wanted):
    model = load.load_model(small_model)
    ids = windows.token_ids(text_data / "heldout.u16", None, vocabulary=model.config.vocab_size)
    evaluation = evaluate.Evaluation(
        model,
        windows.spread(ids, tokens, 3, where="heldout")[1:2],
        lambda m, balance: CompiledEngine(lamp_compile.compile(m, mode="eager", balance=balance)),
    )
    return {(row.name, row.twin): row for row in evaluation.measure_all(wanted)}


@pytest.fixture(scope="module")
def measured(small_model, text_data):
    wanted = [rows.ALL_HIGH, rows.ALL_LOW, rows.LAMP, rows.STATIC, rows.LAMP.on_twin(30.0)]
    return measure(small_model, text_data, 1024, wanted)


def test_both_planes_are_nearly_the_model(measured):
    assert measured["all_high", 0.0].kl < 1.3e-4
    assert measured["all_high", 0.0].bits_per_value == 8.125


def test_the_default_plan_keeps_the_quality_at_half_the_bits_of_fp8(small_model, text_data):
    longer = measure(small_model, text_data, 2048, [rows.FP8, rows.LAMP])
    lamp, fp8 = longer["lamp", 0.0], longer["fp8_kv", 0.0]
    assert lamp.agreement > 0.985
    assert lamp.kl < fp8.kl / 4
    assert lamp.bits_per_value < 5.0 < 8.0 < fp8.bits_per_value


def test_choosing_by_the_scores_is_what_does_it(measured):
    lamp, static = measured["lamp", 0.0], measured["static_tiles", 0.0]
    assert static.refined_share >= lamp.refined_share
    assert lamp.kl < static.kl / 2
    assert lamp.kl < measured["all_low", 0.0].kl / 20


def test_outlier_channels_cost_nothing_more(measured):
    assert measured["lamp", 30.0].kl < 1.5 * measured["lamp", 0.0].kl
