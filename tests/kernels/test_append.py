"""Appending by kernel: the bytes that the reference stores, where it stores them, and nothing else."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from lamp_compile.errors import CacheError
from lamp_compile.runtime import fused_ops as _fused  # noqa: F401 (registers torch.ops.lamp.append)
from lamp_compile.runtime import kernels, rotation
from lamp_compile.runtime.kernels import cpu
from tests.kernels import calls
from tests.tolerances import KERNELS

PAGES, TILE = 4, 32


def rows(batch: int, kv_heads: int, count: int, dim: int, kind: str, balance: Tensor | None = None) -> Tensor:
    """Keys or values whose rounding is not in doubt."""
    x = torch.randn(batch, kv_heads, count, dim, dtype=torch.float64)
    x = calls.steady(x, (x.abs().amax(-1, keepdim=True) / 119).half().double())
    x = rotation.unrotate(x, kind)
    if balance is not None:
        x = x * balance.double().reshape(-1, kv_heads, 1, dim)
    return x.float()


def planes(batch: int, kv_heads: int, dim: int, value_dim: int, pages: int = PAGES, tile: int = TILE) -> list[Tensor]:
    """Full of other data, so that a row written where it should not be is seen."""
    lead = (batch, kv_heads, pages)
    shapes = [(*lead, tile, dim // 2)] * 2 + [(batch, kv_heads, pages * tile)]
    shapes += [(*lead, value_dim // 2, tile)] * 2 + [(batch, kv_heads, pages * tile)]
    bytes_of = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes]
    return [x if x.dim() == 5 else x.half() / 100 for x in bytes_of]


def append(k, v, stored, balance, positions, table, kind, device) -> list[Tensor]:
    """By kernel, on the CPU again; over planes by lanes a CPU's stores the same bytes."""

    def there(x: Tensor | None) -> Tensor | None:
        return (
            None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device.type).copy_(x)
        )

    moved = [there(x) for x in stored] if device.type != "cpu" else [x.clone() for x in stored]
    arguments = (there(k), there(v), tuple(moved), there(balance), there(positions), there(table), kind)
    if isinstance(device, calls.Native):
        cpu.append(*arguments)
        if calls.fit_lanes(stored):
            lanes = calls.planes_by_lanes([x.clone() for x in stored])
            cpu.append(there(k), there(v), lanes, *arguments[3:])
            assert all(map(torch.equal, *(map(calls.bits, x) for x in (calls.planes_by_lanes(moved), lanes))))
    else:
        from lamp_compile.runtime.kernels import append_rows

        append_rows.append(*arguments)
    return [x.cpu() for x in moved]


def by_reference(k, v, stored, balance, positions, table, kind) -> list[Tensor]:
    made = [x.clone() for x in stored]
    store(k, v, made, balance, positions, table, kind)
    return made


def store(k, v, stored, balance, positions, table, kind) -> None:
    """The reference's ``lamp::append``."""
    options = dict(k_format="nested8", v_format="nested8", rotation=kind, site="")
    with mock.patch.object(kernels, "why_not_device", return_value="switched off"), kernels.cpu.without_torch():
        torch.ops.lamp.append(k, v, *stored, balance, positions, table, **options)


def codes(high: Tensor, residual: Tensor) -> Tensor:
    """q of both nibbles, ``[2, ...]``."""

    def nibbles(x: Tensor) -> Tensor:
        return torch.stack(((x & 0xF0).view(torch.int8) >> 4, (x << 4).view(torch.int8) >> 4)).int()

    return 16 * nibbles(high) + nibbles(residual)


def compare(got: list[Tensor], wanted: list[Tensor], before: list[Tensor], exact: bool) -> None:
    """Byte for byte, or one step apart in a few places."""
    changed = sum(int((x != y).sum()) for x, y in zip(wanted, before, strict=True))
    assert changed > 0
    if exact:
        for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), index
        return
    for first in (0, 3):
        difference = codes(*got[first : first + 2]) - codes(*wanted[first : first + 2])
        assert int(difference.abs().max()) <= 1
        assert int((difference != 0).sum()) <= KERNELS["bytes"].bound * changed
        assert torch.equal(got[first + 2], wanted[first + 2])


def some_table() -> Tensor:
    table = torch.full((3, PAGES), -1, dtype=torch.int32)
    table[0, :2] = torch.tensor([3, 7])
    table[2] = torch.tensor([0, 1, 2, 5])
    return table


AT = torch.tensor
CASES = {
    **{f"dim {d}": {"dim": d} for d in (16, 64, 80, 96, 128, 192, 256)},
    "value dim": {"dim": 192, "value_dim": 64},
    "wider values": {"dim": 64, "value_dim": 128},
    "nowhere": {"positions": AT([5, -1, 60])},
    "many rows": {"count": 40, "positions": AT([3])},
    "many rows, places of their own": {"count": 19, "positions": AT([0, 33, 100])},
    "int32 positions": {"positions": AT([5, 9, 60], dtype=torch.int32)},
    "no rotation": {"kind": "none"},
    "no rotation, balance": {"kind": "none", "balance": AT(2.0) + torch.arange(128).reshape(2, 64) / 50},
    "balance": {"balance": AT(0.5) + torch.arange(128).reshape(2, 64) / 50},
    "balance per sequence": {"balance": AT(0.5) + torch.arange(384).reshape(3, 2, 64) / 100, "count": 18},
    "one balance for all sequences": {"balance": AT(0.5) + torch.arange(128).reshape(1, 2, 64) / 50},
    "pages": {"table": some_table(), "count": 2, "positions": AT([62, 5, 31])},
    "pages that are not there": {"table": some_table(), "count": 40, "positions": AT([30, 5, 100])},
    "tile 128": {"tile": 128, "pages": 1, "positions": AT([127, 0, 64])},
}  # fmt: skip


def inputs(
    dim=64, value_dim=None, count=1, positions=None, kind="hadamard", balance=None, table=None, tile=TILE,
    pages=PAGES,
):  # fmt: skip
    positions = torch.tensor([5, 17, 60]) if positions is None else positions
    k, v = rows(3, 2, count, dim, kind, balance), rows(3, 2, count, value_dim or dim, kind)
    batch, pages = (1, 12) if table is not None else (3, pages)
    return k, v, planes(batch, 2, dim, value_dim or dim, pages, tile), balance, positions, table, kind


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_the_reference(name, device):
    arguments = inputs(**CASES[name])
    compare(append(*arguments, device), by_reference(*arguments), arguments[2], exact=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [80, 128])
def test_rows_as_a_projection_leaves_them(dtype, dim, device):
    """Any rounding, ``[B, n, G, D]`` in memory; then channels apart."""
    stored, positions = planes(2, 2, dim, dim), torch.tensor([3, 40])
    k, v = (torch.randn(2, 21, 2, dim).to(dtype).transpose(1, 2) for _ in range(2))
    wanted = by_reference(k, v, stored, None, positions, None, "hadamard")
    compare(append(k, v, stored, None, positions, None, "hadamard", device), wanted, stored, exact=False)
    k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (k, v))
    compare(append(k, v, stored, None, positions, None, "hadamard", device), wanted, stored, exact=False)


def test_rows_beyond_the_capacity_go_nowhere(device):
    """On a CPU they are refused. A kernel on a GPU cannot raise, and must not write into the next head."""
    k, v, stored, *rest = inputs(count=10, positions=torch.tensor([122, 500, 0]))
    if isinstance(device, calls.Native):
        for planes in (tuple(stored), calls.planes_by_lanes(stored)):
            made = tuple(x.clone() for x in planes)
            with pytest.raises(CacheError, match=r"(?s)for 128 keys.*nothing was written"):
                cpu.append(k, v, made, *rest)
            assert all(map(torch.equal, made, planes))
        return
    got = append(k, v, stored, *rest, device)
    fits = [(0, slice(0, 6), 122), (2, slice(0, 10), 0)]
    wanted = [x.clone() for x in stored]
    for b, tokens, first in fits:
        part = [x[b : b + 1] for x in wanted]
        store(k[b : b + 1, :, tokens], v[b : b + 1, :, tokens], part, None, torch.tensor([first]), None, "hadamard")
    compare(got, wanted, stored, exact=True)


@pytest.mark.parametrize("kind", ["hadamard", "none"])
@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_says_so_in_its_scale(spoilt, kind, device):
    k, v, stored, *rest = inputs(count=18, positions=torch.tensor([0, 30, 64]), kind=kind)
    wanted = by_reference(k, v, stored, *rest[:-1], kind)
    k[1, 0, 3, 7], v[2, 1, 17, 0] = spoilt, spoilt
    got = append(k, v, stored, *rest, device)
    for scale, place in ((got[2], (1, 0, 33)), (got[5], (2, 1, 81))):
        assert not scale[place].isfinite()
        assert int((~scale.isfinite()).sum()) == 1
    for index, place in ((2, (1, 0, 33)), (5, (2, 1, 81))):
        got[index][place] = wanted[index][place]
    got[0][1, 0, 1, 1], got[1][1, 0, 1, 1] = wanted[0][1, 0, 1, 1], wanted[1][1, 0, 1, 1]
    got[3][2, 1, 2, :, 17], got[4][2, 1, 2, :, 17] = wanted[3][2, 1, 2, :, 17], wanted[4][2, 1, 2, :, 17]
    compare(got, wanted, stored, exact=True)


@pytest.mark.parametrize("kind", ["hadamard", "none"])
@pytest.mark.parametrize("size", [0.0, 1e-7, 2e-5, 1e-3, 1e5])
def test_rows_of_any_size(size, kind, device):
    """Zeros, scales that vanish in float16, scales that are denormal there, and large ones."""
    arguments = inputs(kind=kind, count=3)
    k, v = (x * size for x in arguments[:2])
    got, wanted = append(k, v, *arguments[2:], device), by_reference(k, v, *arguments[2:])
    compare(got, wanted, arguments[2], exact=size in (0.0, 1e-7))
    assert got[2][0, 0, 5].eq(0) == (size < 1e-6)
