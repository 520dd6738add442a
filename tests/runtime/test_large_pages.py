"""Planes of a cache on a CPU lie in large pages where the system has them."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from lamp_compile.runtime import allocation

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
    middle = made.data_ptr() + made.numel() // 2
    if not allocation.in_large_pages(torch.empty(16 << 20, dtype=torch.uint8)):
        pytest.skip("this system has no large pages to ask for")
    assert "hg" in flags_at(middle)
    assert made.count_nonzero() == 0


def test_only_whole_pages_inside_are_asked_for(asked):
    made = allocation.zeros({"a": ((5 << 20,), torch.uint8), "small": ((1 << 20,), torch.float16)}, torch.device("cpu"))
    [(first, begin, size), (second, *again)] = asked
    assert (first, second) == (mmap.MADV_HUGEPAGE, mmap.MADV_DONTNEED)  # memory that was used before is given back
    assert again == [begin, size]
    assert begin % allocation.LARGE_PAGE == size % allocation.LARGE_PAGE == 0
    assert size > 0
    assert made["a"].data_ptr() <= begin
    assert begin + size <= made["a"].data_ptr() + made["a"].numel()


def test_large_planes_begin_where_a_page_does(asked):
    """Neither views nor offsets: compiled graphs are guarded by both, and every cache would be compiled for anew."""
    sizes = {"odd": ((3, 5 << 19, 2), torch.float16), "bytes": ((5 << 20,), torch.uint8)}
    for tensor in allocation.zeros(sizes, torch.device("cpu")).values():
        assert tensor.data_ptr() % allocation.LARGE_PAGE == 0
        assert tensor.storage_offset() == 0
        assert tensor._base is None
        assert tensor.is_contiguous()
        assert tensor.count_nonzero() == 0
    assert [size for advice, _, size in asked if advice == mmap.MADV_HUGEPAGE] == [30 << 20, 4 << 20]


def test_what_is_refused_is_not_given_back(monkeypatch):
    given: list[int] = []
    monkeypatch.setattr(allocation, "_madvise", lambda: lambda begin, size, advice: given.append(advice) or -1)
    assert not allocation.in_large_pages(torch.empty(16 << 20, dtype=torch.uint8))
    assert given == [mmap.MADV_HUGEPAGE]


def test_nothing_is_asked_where_there_is_no_memory(asked):
    with torch._subclasses.FakeTensorMode():
        allocation.zeros({"plane": ((16 << 20,), torch.uint8)}, torch.device("cpu"))
    allocation.zeros({"plane": ((16 << 20,), torch.uint8)}, torch.device("meta"))
    assert asked == []


def test_systems_without_such_advice(monkeypatch):
    monkeypatch.setattr(allocation, "_madvise", lambda: None)
    made = allocation.zeros({"plane": ((16 << 20,), torch.uint8)}, torch.device("cpu"))
    assert made["plane"].count_nonzero() == 0
