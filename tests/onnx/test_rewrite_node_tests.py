"""The Attention tests that the onnx package ships, through the rewriter: within tolerance, or refused with a reason."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from lamp_compile.errors import ModelError
from lamp_compile.frontends.onnx.rewriting.rewrite import rewrite_onnx
from tests import tolerances
from tests.onnx import sessions
from tests.onnx.cases import attention_cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the reference evaluator

REFUSED = {
    "its scores are an output": 18,
    "scores or weights are used elsewhere": 18,
    "head_dim 1 is odd": 2,
}
"""Reason -> tests of onnx 1.23.2; the second are the first with the operator spelled out."""
REWRITTEN = 148
ON_THE_EVALUATOR = (
    "test_attention_3d_gqa_causal",
    "test_attention_4d_softcap_neginf_mask_poison",
    "test_attention_local_window_with_past",
    "test_attention_4d_gqa_causal_nonpad_decode",
)


def outcome(name: str) -> str:
    """Why a test is refused, or "" once its outputs were compared."""
    case = attention_cases()[name]
    try:
        done = rewrite_onnx(case.model, tau=0.0)
    except ModelError as refusal:
        return next((reason for reason in REFUSED if f"nothing to rewrite: attention: {reason}" in refusal.what), "?")
    model = sessions.sound(done, case.model)
    for inputs, outputs in case.data_sets:
        feeds = {given.name: value for given, value in zip(model.graph.input, inputs, strict=True)}
        # ONNX Runtime has no bfloat16 arithmetic on a CPU; the evaluator has.
        plain = "bf16" not in name and name not in ON_THE_EVALUATOR
        got = sessions.run(model, feeds) if plain else ReferenceEvaluator(model).run(None, feeds)
        for ours, wanted in zip(got, outputs, strict=True):
            assert sessions.error(np.asarray(ours), np.asarray(wanted)) < tolerances.REWRITTEN.relative, name
            assert np.asarray(ours).dtype == np.asarray(wanted).dtype
    return ""


def test_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    counts = Counter(outcome(name) for name in attention_cases())
    with capsys.disabled():
        reasons = ", ".join(f"{count} refused ({reason})" for reason, count in counts.items() if reason)
        print(f"\nAttention node tests of onnx: {counts['']} rewritten and within tolerance, {reasons}")
    assert counts.pop("") == REWRITTEN
    assert counts == REFUSED


@pytest.mark.parametrize("name", ["test_attention_3d_gqa_causal", "test_attention_4d_attn_mask"])
def test_precision_is_really_lower(name: str) -> None:
    """The same tests with the high plane alone are far off: what was compared is not the original in disguise."""
    case = attention_cases()[name]
    feeds = dict(zip((given.name for given in case.model.graph.input), case.data_sets[0][0], strict=True))
    wanted = case.data_sets[0][1][0]
    errors = [
        sessions.error(sessions.run(rewrite_onnx(case.model, tau=tau).model, feeds)[0], wanted) for tau in (0.0, 1e9)
    ]
    assert errors[1] > tolerances.HIGH_OVER_BOTH * errors[0] > 0
