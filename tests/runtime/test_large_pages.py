"""Planes of a cache on a CPU lie in large pages where the system has them."""

from __future__ import annotations

import mmap
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import lamp_compile
from lamp_compile.quality import load
from lamp_compile.runtime import allocation
from lamp_compile.runtime.cache_layers import PLANES

SMAPS = Path("/proc/self/smaps")


def flags_at(address: int) -> list[str]:
    """What the system notes of the memory at an address."""
    inside = False
    for line in SMAPS.read_text(encoding="utf-8").splitlines():
        first = line.split(" ", 1)[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.fixture
def asked(monkeypatch):
    """Advice that the system is given, and of which ranges, instead of giving it."""
    found: list[tuple[int, int, int]] = []

    def madvise(begin, size, advice):
        found.append((advice, begin, size))
        return 0

    monkeypatch.setattr(allocation, "_madvise", lambda: madvise)
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the memory map of Linux")
def test_large_tensors_are_marked():
    if not SMAPS.exists() or "VmFlags" not in SMAPS.read_text(encoding="utf-8"):
        pytest.skip("this system does not say how memory is marked")
    made = allocation.zeros({"plane": ((16 << 20,), torch.uint8)}, torch.device("cpu"))["plane"]
    other = torch.empty(16 << 20, dtype=torch.uint8)
    if not allocation.in_large_pages(other.data_ptr(), other.numel()):
        pytest.skip("this system has no large pages to ask for")
    assert "hg" in flags_at(made.data_ptr() + made.numel() // 2)
    assert made.count_nonzero() == 0


CPU = torch.device("cpu")
LAYER = {
    "plane": ((3, 5 << 19), torch.uint8),
    "scale": ((3, 1000), torch.float16),
    "nothing": ((3, 0, 5), torch.uint8),
    "odd": ((3, 5 << 18, 2), torch.float16),
    "counts": ((7,), torch.int64),
}


def test_a_layer_lies_in_one_row_of_large_pages(asked):
    made = allocation.zeros(LAYER, CPU)
    [(first, begin, size), (second, *again)] = asked
    assert (first, second) == (mmap.MADV_HUGEPAGE, mmap.MADV_DONTNEED)  # memory that was used before is given back
    assert again == [begin, size]
    assert begin % allocation.LARGE_PAGE == size % allocation.LARGE_PAGE == 0
    ends = [(x.data_ptr(), x.data_ptr() + x.nbytes) for x in made.values() if x.nbytes]
    assert min(ends)[0] == begin
    assert 0 <= max(end for _, end in ends) - (begin + size) < allocation.LARGE_PAGE
    for (_, end), (next_begin, _) in pairwise(sorted(ends)):
        assert end <= next_begin < end + allocation.LINE


def test_what_is_made_is_what_graphs_expect(asked):
    """Neither views nor offsets: compiled graphs are guarded by both, and every cache would be compiled for anew."""
    made = allocation.zeros(LAYER, CPU)
    for name, (shape, dtype) in LAYER.items():
        tensor = made[name]
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert tensor.storage_offset() == 0
        assert tensor._base is None
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.data_ptr() % allocation.LINE == 0
        tensor.fill_(1)  # which must be seen in no other
    assert all(bool((x == 1).all()) for x in made.values())
    assert len({x.untyped_storage().data_ptr() for x in made.values() if x.nbytes}) == len(made) - 1


def test_what_outlives_the_others_lies_apart(asked):
    made = allocation.zeros(LAYER, CPU, apart=("counts",))
    [(_, begin, size), _] = asked
    assert not begin <= made["counts"].data_ptr() < begin + size + allocation.LARGE_PAGE
    assert list(made) == list(LAYER)


def test_statistics_of_a_dead_cache_keep_no_planes(nano):
    """The ledger holds on to them until somebody reads."""
    if allocation._madvise() is None:
        pytest.skip("planes lie in a row only where there are large pages")
    model = load.load_model(nano)
    fast = lamp_compile.compile(model, mode="eager")
    cache = fast.lamp.cache(32768)
    fast(torch.zeros(1, 4, dtype=torch.int64), past_key_values=cache)
    for layer in cache.layers:
        planes = [getattr(layer, name) for name in PLANES]
        begin, end = min(x.data_ptr() for x in planes), max(x.data_ptr() + x.nbytes for x in planes)
        assert end - begin < sum(x.nbytes for x in planes) + len(planes) * allocation.LINE, "they are not in one row"
        assert begin % allocation.LARGE_PAGE == 0, "something smaller lies before them"
        assert not any(begin <= x.data_ptr() < end for x in (layer.state, layer.stats))


def test_one_of_them_keeps_the_memory(asked):
    scale = allocation.zeros(LAYER, CPU)["scale"]
    _others = [torch.ones(16 << 20, dtype=torch.uint8) for _ in range(3)]  # where it would be, were it free
    assert scale.count_nonzero() == 0


def test_small_ones_are_left_to_torch(asked):
    made = allocation.zeros({"a": ((3 << 20,), torch.uint8), "b": ((1 << 10,), torch.float16)}, CPU)
    assert asked == []
    assert made["a"].count_nonzero() == made["b"].count_nonzero() == 0


def test_what_is_refused_is_not_given_back(monkeypatch):
    given: list[int] = []
    monkeypatch.setattr(allocation, "_madvise", lambda: lambda begin, size, advice: given.append(advice) or -1)
    assert not allocation.in_large_pages(16 << 20, 16 << 20)
    assert given == [mmap.MADV_HUGEPAGE]


def test_nothing_is_asked_where_there_is_no_memory(asked):
    with torch._subclasses.FakeTensorMode():
        allocation.zeros(LAYER, CPU)
    allocation.zeros(LAYER, torch.device("meta"))
    assert asked == []


def test_systems_without_such_advice(monkeypatch):
    monkeypatch.setattr(allocation, "_madvise", lambda: None)
    assert not allocation.in_large_pages(16 << 20, 16 << 20)
    assert allocation.zeros(LAYER, CPU)["plane"].count_nonzero() == 0
