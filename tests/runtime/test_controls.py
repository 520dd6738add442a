"""Hot settings: changed in place, per site and head, checked."""

import pytest

from lamp_compile.errors import OptionError
from lamp_compile.plan import SitePlan
from lamp_compile.runtime.controls import Controls


def two_sites() -> Controls:
    controls = Controls()
    controls.get_or_create(SitePlan(name="a", tau=(0.1, 0.2)), 2)
    controls.get_or_create(SitePlan(name="b", floor=1), 2)
    return controls


def test_start_at_the_plan_and_are_made_once() -> None:
    controls = two_sites()
    assert controls["a"].tau.tolist() == pytest.approx([0.1, 0.2])
    assert controls["b"].floor.tolist() == [1, 1]
    assert controls.get_or_create(SitePlan(name="a", tau=9.0), 2) is controls["a"]


def test_set_in_place() -> None:
    controls = two_sites()
    before = {name: controls[name].tau.data_ptr() for name in controls}
    controls.set(tau=0.5)
    controls.set(floor=[0, 2], sites="b")
    controls.set(budget=float("inf"), sites=["a"])
    assert controls["a"].tau.tolist() == controls["b"].tau.tolist() == [0.5, 0.5]
    assert controls["a"].floor.tolist() == [0, 0]
    assert controls["b"].floor.tolist() == [0, 2]
    assert controls["a"].budget.tolist() == [float("inf")] * 2
    assert before == {name: controls[name].tau.data_ptr() for name in controls}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(tau=-0.1), "-0.1"),
        (dict(tau=float("nan")), "nan"),
        (dict(tau=[0.1]), "1 values for 2 kv heads"),
        (dict(floor=3), "3.0"),
        (dict(tau=0.3, budget=0), "0.0"),
        (dict(tau=0.1, sites="c"), "unknown site 'c'"),
    ],
)
def test_impossible_settings_change_nothing(change: dict[str, object], says: str) -> None:
    controls = two_sites()
    with pytest.raises(OptionError, match=says):
        controls.set(**change)  # type: ignore[arg-type]
    assert controls["a"].tau.tolist() == pytest.approx([0.1, 0.2])


def test_a_plan_for_other_heads() -> None:
    with pytest.raises(OptionError, match="2 values for 4 kv heads"):
        Controls().get_or_create(SitePlan(name="a", tau=(0.1, 0.2)), 4)


def test_graphs_read_settings_where_they_lie() -> None:
    """Captured steps copy what has no fixed address at every replay, and see no change in the middle of one."""
    controls = Controls()
    made = controls.get_or_create(SitePlan("a"), 2)
    for tensor in (made.tau, made.floor, made.budget):
        assert getattr(tensor, "_dynamo_static_input_type", "") == "unguarded"
