"""Numbers that the README and the docs quote are those of the committed results."""

from tests.project import results_page


def test_quality_page_and_readme_quote_the_committed_results() -> None:
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page(), "run `make golden`"
    assert results_page.README.read_text(encoding="utf-8") == results_page.readme(), "run `make golden`"


def test_all_quality_targets_are_met() -> None:
    _, data = results_page.latest()
    assert len(data["targets"]) >= 12
    assert [item["target"] for item in data["targets"] if not item["met"]] == []


def test_results_say_where_they_come_from() -> None:
    for path in results_page.RESULTS.glob("*.json"):
        data = results_page.json.loads(path.read_text(encoding="utf-8"))
        assert data["device"], path
        assert data["versions"]["torch"], path
        assert data.get("rows") or data.get("runs"), path
