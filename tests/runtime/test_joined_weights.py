"""Parameters that lie in one tensor: moved without a second copy, found again when they were given other data."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lamp_compile.runtime import joined_weights
from lamp_compile.runtime.joined_weights import JoinedWeights, bring_together, look_at, together, why_not


def parameters(*rows: int) -> list[nn.Parameter]:
    """Random weights of 8 columns."""
    return [nn.Parameter(torch.randn(n, 8)) for n in rows]


def values(parts: list[nn.Parameter]) -> torch.Tensor:
    return torch.cat([part.detach() for part in parts]).clone()


@pytest.fixture
def parts() -> list[nn.Parameter]:
    found = parameters(8, 4, 4)
    bring_together(found)
    return found


@pytest.fixture
def joined(parts: list[nn.Parameter]) -> JoinedWeights:
    made = JoinedWeights()
    made.add([0, 1, 2], parts)
    return made


def test_the_objects_stay_and_nothing_is_held_twice() -> None:
    parts = parameters(8, 4, 4)
    before, wanted, ids = [StorageWeakRef(p.untyped_storage()) for p in parts], values(parts), [id(p) for p in parts]
    assert not together(parts)
    assert why_not(parts) is None
    bring_together(parts)
    assert together(parts)
    assert [id(p) for p in parts] == ids
    assert torch.equal(look_at(parts), wanted)
    assert all(ref.expired() for ref in before)
    assert [(p.untyped_storage().nbytes(), p.storage_offset()) for p in parts] == [(p.nbytes, 0) for p in parts]
    assert all(p.is_leaf and p.requires_grad and p._base is None for p in parts)


def test_what_lies_together_is_looked_at_where_it_is(parts: list[nn.Parameter]) -> None:
    place, whole = parts[0].data_ptr(), look_at(parts[:2])
    assert whole.data_ptr() == place
    assert whole.shape == (12, 8)
    with torch.no_grad():
        parts[1].fill_(3.0)
    assert whole[8:].eq(3).all()
    assert not together([parts[1], parts[0]])
    assert not together([parts[0], parts[2]])
    flat = torch.randn(8, 8)
    assert together([nn.Parameter(flat[:4]), nn.Parameter(flat[4:])]), "as whoever made it laid them"
    assert not together([look_at([nn.Parameter(flat[:4])]), look_at([nn.Parameter(flat[4:])])]), "neighbours by chance"


def test_the_joined_tensor_keeps_no_memory_alive(parts: list[nn.Parameter], joined: JoinedWeights) -> None:
    memory = StorageWeakRef(parts[0].untyped_storage())
    for part in parts:
        part.data = torch.zeros(part.shape)
    assert memory.expired(), "as model.to('cpu') must free the device's memory"
    assert joined.tensors(parts)[0].eq(0).all()


def made_in_inference_mode() -> nn.Parameter:
    with torch.inference_mode():
        return nn.Parameter(torch.randn(4, 8), requires_grad=False)


WHOLE = torch.randn(16, 8)
REFUSED = {
    "are parts of larger tensors": lambda: nn.Parameter(WHOLE[:4]),
    "share memory": lambda: nn.Parameter(WHOLE),
    "no plain parameters": lambda: torch.randn(4, 8),
    "no contiguous floats": lambda: nn.Parameter(torch.randn(8, 4).t()),
    "no contiguous floats, on the meta device": lambda: nn.Parameter(torch.randn(4, 8, device="meta")),
    "no multiple of 16 bytes": lambda: nn.Parameter(torch.randn(1, 3)),
    "are inference tensors": made_in_inference_mode,
}


@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("first", [True, False])
def test_what_cannot_be_moved_unnoticed_says_why(reason: str, first: bool) -> None:
    parts = [REFUSED[reason](), *parameters(4)]
    assert reason.split(",")[0] in str(why_not(parts if first else parts[::-1]))


def test_a_parameter_lies_in_one_place_only(parts: list[nn.Parameter]) -> None:
    assert "lie in another group" in str(why_not([parts[0], parts[2]]))
    assert "lie in another group" in str(why_not([parts[0], *parameters(4)]))
    assert why_not(parts) is None


def test_memory_shared_among_processes_stays() -> None:
    parts = parameters(4, 4)
    parts[1].data.share_memory_()
    assert "share memory" in str(why_not(parts))


def test_new_data_is_taken_in_and_lies_in_the_same_place(parts: list[nn.Parameter], joined: JoinedWeights) -> None:
    (whole,) = joined.tensors(parts)
    place = whole.data_ptr()
    parts[1].data = torch.full((4, 8), 7.0)
    (found,) = joined.tensors(parts)
    assert torch.equal(found, values(parts))
    assert found[8:12].eq(7).all()
    assert found.data_ptr() == parts[0].data_ptr() == place
    assert joined.tensors(parts)[0] is found, "and the next call finds nothing to do"


def test_another_parameter_in_its_place(parts: list[nn.Parameter], joined: JoinedWeights) -> None:
    parts[0] = nn.Parameter(torch.ones(8, 8))
    (found,) = joined.tensors(parts)
    assert torch.equal(found, values(parts))
    assert together(parts)


def test_a_backup_is_not_written_over(parts: list[nn.Parameter], joined: JoinedWeights) -> None:
    backup, before = parts[1].data, values(parts)
    parts[1].data = torch.full((4, 8), 7.0)
    with pytest.warns(UserWarning, match="at every call"):
        (found,) = joined.tensors(parts)
    place = found.data_ptr()
    assert torch.equal(found, values(parts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            parts[1].fill_(8.0)
        assert torch.equal(joined.tensors(parts)[0], values(parts)), "never stale"
        assert joined.tensors(parts)[0].data_ptr() == place, "CUDA graphs are bound to addresses"
        parts[1].data = backup
        del backup
        assert torch.equal(joined.tensors(parts)[0], before)
    assert joined.tensors(parts)[0].data_ptr() == parts[0].data_ptr()


def test_data_that_somebody_goes_on_changing(parts: list[nn.Parameter], joined: JoinedWeights) -> None:
    mine = torch.zeros(4, 8)
    parts[2].data = mine
    with pytest.warns(UserWarning, match="share memory"):
        joined.tensors(parts)
    mine.fill_(5.0)
    assert joined.tensors(parts)[0][12:].eq(5).all()
    del mine
    assert torch.equal(joined.tensors(parts)[0], values(parts))
    assert together(parts), "nobody else looks at it any more"


def test_parameters_that_change_places(parts: list[nn.Parameter], joined: JoinedWeights) -> None:
    wanted = values([parts[0], parts[2], parts[1]])
    parts[1].data, parts[2].data = parts[2].data, parts[1].data
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(joined.tensors(parts)[0], wanted)


def test_a_copy_has_memory_of_its_own(parts: list[nn.Parameter], joined: JoinedWeights) -> None:
    before, copies = values(parts), copy.deepcopy(parts)
    with torch.no_grad():
        copies[0].fill_(1.0)
    assert torch.equal(joined.tensors(copies)[0], values(copies))
    assert torch.equal(joined.tensors(parts)[0], before), "one graph serves both in turn"
    assert together(copies)
    assert copies[0].untyped_storage().nbytes() == copies[0].nbytes


def test_graphs_of_one_model_follow_each_other(parts: list[nn.Parameter], joined: JoinedWeights) -> None:
    other = JoinedWeights()
    other.add([0, 1], parts[:2])
    parts[1].data = torch.zeros(4, 8)
    for graph, taken in ((joined, parts), (other, parts[:2]), (joined, parts)):
        assert torch.equal(graph.tensors(taken)[0], values(taken))
    assert together(parts)


def test_no_room_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parameters(8, 4)
    places = [part.data_ptr() for part in parts]

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(joined_weights.torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError):
        bring_together(parts)
    assert [part.data_ptr() for part in parts] == places


def test_an_address_that_was_freed_means_nothing() -> None:
    first, second = parameters(4, 4)
    gone = StorageWeakRef(torch.empty(64).untyped_storage())
    assert gone.expired()
    joined_weights._homes[first] = joined_weights._Home(gone, first.data_ptr(), first.nbytes)
    assert why_not([first, second]) is None
