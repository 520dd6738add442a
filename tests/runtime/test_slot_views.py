"""A view that knows how long its slot becomes."""

from __future__ import annotations

import pytest
import torch

from lamp_compile.errors import CacheError, OptionError
from tests.runtime.test_slot_cache import _query, attend, rows, says, slots


def test_a_view_up_to_a_length_reads_no_length_and_lists_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = slots()
    slot = cache.admit(100)
    with says(CacheError, "pages for 128 tokens, not for 129"):
        cache.view(slot, upto=129)
    with says(OptionError, "upto is 0"):
        cache.view(slot, upto=0)
    view = cache.view(slot, upto=70)
    assert view.rows.block_table.shape[1] == 4, "three pages, rounded up to a power of two"
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda self: pytest.fail("a tensor was read"))
        view.update(*rows(70, 1), 0)
        found = attend(view, _query(1))
    assert cache.length(slot) == 70
    other = cache.admit(100)
    plain = cache.view(other)
    plain.update(*rows(70, 1), 0)
    assert torch.allclose(found, attend(plain, _query(1)), atol=1e-6)
