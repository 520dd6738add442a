"""The claims on a trained model with D 128, where one is at hand (``LAMP_TEST_MODEL``, ``LAMP_TEST_DATA``).

One window of 1,024 tokens: enough to see a broken rule, format or balance, too little for the published figures, which
``benchmarks/quality.py`` measures on 65,536 positions. More is refined of it than of longer ones.
"""

from __future__ import annotations

import pytest

import lamp_compile
from lamp_compile.quality import evaluate, load, rows, windows
from lamp_compile.quality.engine import CompiledEngine


@pytest.fixture(scope="module")
def measured(small_model, text_data):
    model = load.load_model(small_model)
    ids = windows.token_ids(text_data / "heldout.u16", None, vocabulary=model.config.vocab_size)
    evaluation = evaluate.Evaluation(
        model,
        windows.spread(ids, 1024, 3, where="heldout")[1:2],
        lambda m, balance: CompiledEngine(lamp_compile.compile(m, mode="eager", balance=balance)),
    )
    wanted = [rows.FP8, rows.ALL_HIGH, rows.ALL_LOW, rows.LAMP, rows.STATIC, rows.LAMP.on_twin(30.0)]
    done = evaluation.measure_all(wanted)
    return {(row.name, row.twin): row for row in done}


def test_both_planes_are_nearly_the_model(measured):
    assert measured["all_high", 0.0].kl < 1.3e-4
    assert measured["all_high", 0.0].bits_per_value == 8.125


def test_the_default_plan_keeps_the_quality_at_two_thirds_of_the_bits_of_fp8(measured):
    lamp, fp8 = measured["lamp", 0.0], measured["fp8_kv", 0.0]
    assert lamp.agreement > 0.985
    assert lamp.kl < fp8.kl / 4
    assert lamp.bits_per_value < 5.5 < 8.0 < fp8.bits_per_value


def test_choosing_by_the_scores_is_what_does_it(measured):
    lamp, static = measured["lamp", 0.0], measured["static_tiles", 0.0]
    assert static.refined_share >= lamp.refined_share
    assert lamp.kl < static.kl / 2
    assert lamp.kl < measured["all_low", 0.0].kl / 20


def test_outlier_channels_cost_nothing_more(measured):
    assert measured["lamp", 30.0].kl < 1.5 * measured["lamp", 0.0].kl
