"""Every family, both spellings of attention, both routes: what is claimed is counted, what is computed is compared."""

from __future__ import annotations

import pytest
import torch

import lamp_compile
from lamp_compile.errors import ModelError
from lamp_compile.report import Report
from tests.models import table
from tests.models.measure import Outcome, on_decoder, on_graph, on_module
from tests.models.zoo import FAMILIES, Expected, Family, build
from tests.tolerances import HIGH_OVER_BOTH, ZOO

pytestmark = pytest.mark.usefixtures("one_thread")
GRAPHS = [(family, spelling) for family in FAMILIES for spelling in family.graph]
MODULES = [family for family in FAMILIES if not family.decoder and not family.refusal]
DECODERS = [family for family in FAMILIES if family.decoder]


def check(report: Report, expected: Expected) -> None:
    """Counts, and the reason of everything that was left alone."""
    assert len(report.rewritten) == expected.rewritten, report.text()
    assert len(set(report.rewritten)) == expected.rewritten
    assert len(report.refusals) == expected.refused, report.text()
    assert len(report.unclaimed) == expected.unclaimed, report.text()
    for refusal in (*report.refusals, *report.unclaimed):
        assert refusal.reason
        assert expected.reason in refusal.reason


def check_errors(outcome: Outcome) -> None:
    assert outcome.both <= ZOO["both"].relative
    assert outcome.high >= HIGH_OVER_BOTH * outcome.both
    assert outcome.exact is None or outcome.exact <= ZOO["exact"].relative


@pytest.mark.parametrize(("family", "spelling"), GRAPHS, ids=[f"{f.name}-{spelling}" for f, spelling in GRAPHS])
def test_graph_route(family: Family, spelling: str) -> None:
    outcome = on_graph(family, spelling)
    check(outcome.report, family.graph[spelling])
    check_errors(outcome)
    assert outcome.exact is not None


@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.name)
def test_decoder_route(family: Family) -> None:
    assert family.decoder is not None
    outcome = on_decoder(family)
    check(outcome.report, family.decoder)
    check_errors(outcome)


@pytest.mark.parametrize("family", MODULES, ids=lambda family: family.name)
def test_compile_takes_the_graph_route(family: Family) -> None:
    outcome = on_module(family)
    check(outcome.report, family.graph["sdpa"])
    check_errors(outcome)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.refusal], ids=lambda family: family.name)
def test_refused_decoders_say_why(family: Family) -> None:
    """``compile`` refuses and names another way; ``explain`` lists every site with its reason."""
    model = build(family, "eager")
    with pytest.raises(ModelError, match=family.refusal) as caught:
        lamp_compile.compile(model, mode="eager")
    assert "backend=" in caught.value.fix
    report = lamp_compile.explain(model)
    assert not report.rewritten
    assert len(report.refusals) == family.graph["eager"].rewritten
    assert all(family.refusal in refusal.reason for refusal in report.refusals)


def test_every_family_and_spelling_is_accounted_for() -> None:
    """Tested, or a note says why it cannot be."""
    assert len(FAMILIES) == 17
    for family in FAMILIES:
        for spelling in ("sdpa", "eager"):
            assert (spelling in family.graph) != (spelling in family.notes), (family.name, spelling)


def test_weights_are_the_same_each_time() -> None:
    first, second = (build(FAMILIES[0], "eager").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_table_is_current() -> None:
    assert table.PAGE.read_text(encoding="utf-8") == table.page(), "run `make golden`"
