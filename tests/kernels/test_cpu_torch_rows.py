"""Rows that torch has the core store: as by Python, where it takes them, and refused where they do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lamp_compile.errors import CacheError, InputError, LampError
from lamp_compile.runtime import fused_ops as _fused  # noqa: F401 (registers torch.ops.lamp.append)
from lamp_compile.runtime.kernels import cpu
from tests.kernels import calls
from tests.runtime import test_layout_lanes

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=f"{cpu.why_not()}")
STORE = ("nested8", "nested8", "hadamard", "test")


def rows(seed: int = 0, **changed: Any) -> dict[str, Any]:
    """Arguments of ``lamp::append``: one row for each of two sequences of planes for 96 keys."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, 2, 1, 64, generator=generator) for _ in range(2))
    full = torch.zeros(2, 2, 96, 64)
    formats = dict(zip(("k_format", "v_format", "rotation", "site"), STORE, strict=True))
    planes = tuple(torch.ops.lamp.quantize(full, full, None, **formats, tile=32))
    balance = torch.rand(2, 64, generator=generator) + 0.5
    given = {"k": k, "v": v, "planes": planes, "balance": balance, "positions": torch.tensor([5, 77]), "table": None}
    return given | changed


def store(call: dict[str, Any], settings: tuple[str, ...] = STORE) -> int:
    """How many calls the core took."""
    before = cpu.served()
    tensors = (call["k"], call["v"], *call["planes"], call["balance"], call["positions"], call["table"])
    torch.ops.lamp.append(*tensors, *settings)
    return cpu.served() - before


ROWS: dict[str, tuple[bool, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "as they are": (True, lambda c: {}),
    "bfloat16": (True, lambda c: {"k": c["k"].bfloat16(), "v": c["v"].bfloat16()}),
    "strides": (True, lambda c: {"k": torch.cat((c["k"], c["k"]), 3)[..., :64]}),
    "several": (True, lambda c: {"k": torch.randn(2, 2, 9, 64), "v": torch.randn(2, 2, 9, 64)}),
    "no balance": (True, lambda c: {"balance": None}),
    "one position": (True, lambda c: {"positions": torch.tensor([7])}),
    "positions in 32 bits": (True, lambda c: {"positions": c["positions"].int()}),
    "one sequence takes nothing": (True, lambda c: {"positions": torch.tensor([-1, 3])}),
    "values of another dtype": (False, lambda c: {"v": c["v"].bfloat16()}),
    "channels apart": (False, lambda c: {"k": torch.stack((c["k"], c["k"]), 4)[..., 0]}),
    "balance in float64": (False, lambda c: {"balance": c["balance"].double()}),
}


def stored(call: dict[str, Any], served: bool) -> None:
    """By the core, if it takes the call, what Python stores; planes by lanes hold the same."""
    by_python, lanes = copy.deepcopy(call), copy.deepcopy(call)
    lanes |= {"planes": calls.planes_by_lanes(lanes["planes"])}
    assert (store(call), store(lanes)) == (served, served)
    with cpu.without_torch():
        assert store(by_python) == 0
    assert all(map(torch.equal, call["planes"], by_python["planes"]))
    assert all(map(torch.equal, calls.planes_by_lanes(call["planes"]), lanes["planes"]))
    assert any(plane.any() for plane in call["planes"])


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_stored_as_by_python(name):
    served, change = ROWS[name]
    call = rows()
    stored(call | change(call), served)


def test_rows_go_to_pages():
    table = torch.tensor([[1, 4, 2], [3, 0, 5]], dtype=torch.int32)
    call = rows(table=table)
    stored(call | {"planes": tuple(plane[:1].repeat_interleave(2, 2) for plane in call["planes"])}, served=True)


WRONG = {
    **{name: partial(test_layout_lanes.wrong_planes, name) for name in test_layout_lanes.WRONG},
    "of one sequence": lambda call: tuple(x[:1] for x in calls.planes_by_lanes(call.planes)),
    "80 channels": lambda call: calls.planes_by_lanes(calls.make(dim=80).planes),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_for_planes_by_lanes_of_wrong_sizes_are_refused_in_the_same_words(name):
    call = rows(planes=WRONG[name](calls.make()))
    before = copy.deepcopy(call)
    with cpu.without_torch(), pytest.raises(InputError) as wanted:
        store(call)
    with pytest.raises(InputError) as found:
        store(call)
    assert str(found.value) == str(wanted.value)
    assert all(map(torch.equal, call["planes"], before["planes"]))


@pytest.mark.parametrize("lanes", [False, True], ids=["rows", "lanes"])
def test_rows_beyond_the_planes_are_refused(lanes):
    call = rows(positions=torch.tensor([6, 96]))
    call |= {"planes": calls.planes_by_lanes(call["planes"])} if lanes else {}
    before = [plane.clone() for plane in call["planes"]]
    with pytest.raises(CacheError, match="do not fit"):
        store(call)
    assert all(torch.equal(x, y) for x, y in zip(call["planes"], before, strict=True))


def test_rows_without_positions_are_refused():
    with pytest.raises(InputError, match="positions is None"):
        store(rows(positions=None))


def test_rows_for_a_table_of_pages_alone_are_refused():
    with pytest.raises(InputError, match=r"(?s)block table \(5,\).*try: .*int32 \[B, pages\]"):
        store(rows(table=torch.arange(5, dtype=torch.int32)))


def test_rows_in_another_format_are_not_taken_for_it():
    with pytest.raises((LampError, RuntimeError)):
        store(rows(), ("int8", *STORE[1:]))


def test_scripts_know_the_operators():
    """They find them by what ``torch.ops`` calls."""

    @torch.jit.script
    def stored(
        k: Tensor, v: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor, at: Tensor
    ) -> None:
        torch.ops.lamp.append(k, v, a, b, c, d, e, f, None, at, None, "nested8", "nested8", "hadamard", "")

    call, before = rows(balance=None), cpu.served()
    other = copy.deepcopy(call)
    stored(call["k"], call["v"], *call["planes"], call["positions"])
    assert cpu.served() == before + 1
    store(other)
    assert all(torch.equal(x, y) for x, y in zip(call["planes"], other["planes"], strict=True))
