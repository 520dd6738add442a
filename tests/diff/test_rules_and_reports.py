"""Rules for expected changes, and the five ways a comparison is written."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

import lamp_compile
from lamp_compile import Plan, SitePlan
from lamp_compile.diff import reporters, rules
from lamp_compile.diff.compare import TIERS, Change, Comparison
from lamp_compile.errors import InputError, OptionError

A = Plan(tuple(SitePlan(f"layers.{index}.attn") for index in range(12)))
B = Plan(tuple(SitePlan(f"layers.{index}.attn", tau=0.02, tile=64) for index in range(12)))


def test_a_rule_allows_what_it_names() -> None:
    found = lamp_compile.compare(A, B, allow=["precision#tile", "precision@layers.1*#tau"])
    assert [c.where for c in found.changes] == [f"layers.{i}.attn" for i in (0, 2, 3, 4, 5, 6, 7, 8, 9)]
    assert len(found.allowed) == 15
    assert {rule for _, rule in found.allowed} == {"precision#tile", "precision@layers.1*#tau"}
    assert lamp_compile.compare(A, B, allow=["*"]).same
    assert lamp_compile.compare(A, B, allow=["precision"]).same


@pytest.mark.parametrize("rule", ["structure", "precision@layers.99*", "precision#floor", "precision@layers.0*#Tau"])
def test_a_rule_that_matches_nothing_is_an_error(rule: str) -> None:
    with pytest.raises(InputError, match="nothing matched the rule"):
        lamp_compile.compare(A, B, allow=["precision#tile", rule])
    with pytest.raises(InputError, match="nothing matched the rule"):
        lamp_compile.compare(A, A, allow=[rule])


@pytest.mark.parametrize("rule", ["", "tau", "precisions", "precision@", "precision#", "precision@#tau"])
def test_malformed_rules(rule: str) -> None:
    with pytest.raises(OptionError):
        lamp_compile.compare(A, B, allow=[rule])


def test_files_of_rules(tmp_path) -> None:
    path = tmp_path / "expected.txt"
    path.write_text("# the new tile\nprecision#tile\n\n  precision@layers.1*#tau  \n")
    assert [rule.text for rule in rules.read(path)] == ["precision#tile", "precision@layers.1*#tau"]
    path.write_text("precision#tile\nnonsense\n")
    with pytest.raises(InputError, match="no tier 'nonsense'") as caught:
        rules.read(path)
    assert caught.value.where.endswith("line 2")
    with pytest.raises(InputError, match="cannot read the rules"):
        rules.read(tmp_path / "missing")


@pytest.fixture
def found() -> Comparison:
    return lamp_compile.compare(A, B, allow=["precision@layers.1*"])


def test_text_has_a_limit(found: Comparison) -> None:
    text = reporters.render(found, "text", 2)
    assert "precision plan: 18 differences\n" in text
    assert "  layer 0 (layers.0.attn): tau 0.01 -> 0.02 (refines less)\n" in text
    assert "  and 16 more (--limit 0 shows all)\n" in text
    assert text.endswith("18 differences, 6 allowed differences\n")
    assert " more" not in reporters.render(found, "text", 0)


def test_json(found: Comparison) -> None:
    data = json.loads(reporters.render(found, "json", 1))
    assert data["same"] is False
    assert len(data["changes"]) == 18
    assert data["changes"][0] == {
        "tier": "precision", "where": "layers.0.attn", "subject": "tau", "before": "0.01", "after": "0.02",
        "text": "layer 0 (layers.0.attn): tau 0.01 -> 0.02 (refines less)",
    }  # fmt: skip
    assert {item["rule"] for item in data["allowed"]} == {"precision@layers.1*"}


def test_markdown_shows_text_as_it_is() -> None:
    change = Change("structure", "a_b*c", "<x>", "`Add` <script> | is new", "", "%add1 = Add(`x`)")
    text = reporters.render(Comparison((change,)), "markdown", 20)
    assert "a\\_b\\*c: \\`Add\\` \\<script\\> \\| is new" in text
    assert "  ```diff\n  + %add1 = Add(`x`)\n  ```" in text
    assert "| structure | 1 |" in text


def test_junit(found: Comparison) -> None:
    root = ElementTree.fromstring(reporters.render(found, "junit", 3))
    assert root.tag == "testsuites"
    cases = root.findall("testsuite/testcase")
    assert len(cases) == len(TIERS) == int(root.attrib["tests"])
    (failed,) = [case for case in cases if case.find("failure") is not None]
    assert failed.attrib["name"] == "precision plan"
    failure = failed.find("failure")
    assert failure is not None
    assert failure.text is not None
    assert failure.attrib["message"] == "18 differences"
    assert "and 15 more" in failure.text
    assert root.attrib["failures"] == "1"
    skipped = [case.attrib["name"] for case in cases if case.find("skipped") is not None]
    assert skipped == ["weights", "numbers"], "what was not compared has not passed"


def test_junit_is_xml_whatever_is_in_it() -> None:
    odd = Change("structure", "a\x00b", "s", "]]> & < \x1b \ufffe", "", "")
    ElementTree.fromstring(reporters.render(Comparison((odd,)), "junit", 0))


def test_sarif(found: Comparison) -> None:
    log = json.loads(reporters.render(found, "sarif", 0))
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    ids = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert ids == [f"lamp/{tier}" for tier in TIERS]
    assert len(run["results"]) == 24
    assert sum("suppressions" in result for result in run["results"]) == 6
    for result in run["results"]:
        assert ids[result["ruleIndex"]] == result["ruleId"]
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "B"
    prints = [result["partialFingerprints"]["lampChange/v1"] for result in run["results"]]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("name", reporters.NAMES)
def test_every_format_takes_no_difference(name: str) -> None:
    assert reporters.render(lamp_compile.compare(A, A), name, 20)


def test_formats() -> None:
    assert set(reporters.NAMES) == {"text", "json", "markdown", "junit", "sarif"}
