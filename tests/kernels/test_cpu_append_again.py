"""The short way into the core for rows that are stored step by step: it must store nothing else, and be taken for
nothing else."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lamp_compile.errors import CacheError, LampError
from lamp_compile.runtime import fused_ops as _fused  # noqa: F401 (registers torch.ops.lamp.append)
from lamp_compile.runtime import kernels
from lamp_compile.runtime.kernels import cpu
from lamp_compile.runtime.kernels.cpu import _again

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason="the core does not run here")
STORE: dict[str, Any] = dict(k_format="nested8", v_format="nested8", rotation="hadamard", site="test")


def made(seed: int = 0, balanced: bool = True, **changed: Any) -> dict[str, Any]:
    """Arguments of a call that stores one row in each of two sequences of planes for 96 keys."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(2, 2, 1, 64, generator=generator) for _ in range(2)]
    full = torch.zeros(2, 2, 96, 64)
    planes = torch.ops.lamp.quantize(full, full, None, **STORE, tile=32)
    balance = torch.rand(2, 64, generator=generator) + 0.5 if balanced else None
    given = {"k": rows[0], "v": rows[1], "planes": tuple(planes), "balance": balance}
    return given | {"positions": torch.tensor([5, 77]), "table": None} | changed


def store(call: dict[str, Any], **changed: Any) -> None:
    torch.ops.lamp.append(
        call["k"], call["v"], *call["planes"], call["balance"], call["positions"], call["table"], **STORE | changed
    )


def again(call: dict[str, Any]) -> bool:
    """By the short way alone."""
    return kernels.append_again(**call, rotation=STORE["rotation"])


def fresh(call: dict[str, Any]) -> dict[str, Any]:
    """The same over copies of the planes, which nothing is known of."""
    return call | {"planes": tuple(plane.clone() for plane in call["planes"])}


def same(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_repeated_call_stores_the_same(balanced, paged):
    table = torch.tensor([[1, 4, 2], [3, 0, 5]], dtype=torch.int32) if paged else None
    first = made(balanced=balanced, table=table)
    if paged:  # one pool for both
        first |= {"planes": tuple(plane[:1].repeat_interleave(2, 2) for plane in first["planes"])}
    assert not again(first)
    store(first)
    for seed in (1, 2):
        more = made(seed, table=None if table is None else table.flip(0)) | {
            "planes": first["planes"], "balance": first["balance"], "positions": torch.tensor([5 + seed, 95]),
        }  # fmt: skip
        other, before = fresh(more), tuple(plane.clone() for plane in first["planes"])
        assert again(more), "the short way was not taken"
        store(other)
        assert same(more["planes"], other["planes"])
        assert not same(more["planes"], before)


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "another dtype": lambda c: {"k": c["k"].bfloat16(), "v": c["v"].bfloat16()},
    "values of another dtype": lambda c: {"v": c["v"].bfloat16()},
    "other strides": lambda c: {"k": torch.cat((c["k"], c["k"]), 3)[..., :64]},
    "channels apart": lambda c: {"k": torch.stack((c["k"], c["k"]), 4)[..., 0]},
    "more rows": lambda c: {"k": c["k"].repeat(1, 1, 2, 1), "v": c["v"].repeat(1, 1, 2, 1)},
    "other planes": lambda c: {"planes": (*c["planes"][:5], c["planes"][5].clone())},
    "another balance": lambda c: {"balance": c["balance"] * 2},
    "no balance": lambda c: {"balance": None},
    "one position for all": lambda c: {"positions": torch.tensor([7])},
    "positions in 32 bits": lambda c: {"positions": c["positions"].int()},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_call_that_differs_is_checked_anew(name):
    first = made()
    store(first)
    changed = first | CHANGES[name](first)
    assert not again(changed)
    other = fresh(changed)
    store(changed)
    store(other)
    assert same(changed["planes"], other["planes"])


@pytest.mark.parametrize("place", range(7))
def test_memory_that_was_put_in_place_of_other_is_noticed(place):
    first = made()
    store(first)
    assert again(first)
    changed = (*first["planes"], first["balance"])[place]
    changed.data = changed.data.clone()
    assert not again(first)


def test_rows_beyond_the_planes_are_refused_as_ever():
    first = made()
    store(first)
    more = first | {"positions": torch.tensor([6, 96])}
    before = tuple(plane.clone() for plane in first["planes"])
    assert not again(more)
    with pytest.raises(CacheError, match="do not fit"):
        store(more)
    assert same(first["planes"], before)


def test_another_format_is_not_taken_for_it():
    first = made()
    store(first)
    with pytest.raises((LampError, RuntimeError)):
        store(first, k_format="int8")


def test_several_rows_are_not_kept():
    call = made(k=torch.randn(2, 2, 3, 64), v=torch.randn(2, 2, 3, 64), positions=torch.tensor([0, 9]))
    store(call)
    assert not again(call)


def test_nothing_is_kept_of_planes_that_are_gone():
    call = made()
    store(call)
    key = id(call["planes"][0])
    assert key in _again._stored
    del call
    gc.collect()
    assert key not in _again._stored
