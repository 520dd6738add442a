"""Rotations are orthonormal for every head dimension; tiles and pages put every row where it belongs."""

import pytest
import torch

from lamp_compile.errors import OptionError
from lamp_compile.runtime import layout, rotation


@pytest.mark.parametrize("dim", rotation.HEAD_DIMS)
def test_hadamard_is_orthonormal_and_flat(dim: int) -> None:
    r = rotation.matrix(dim, "hadamard", torch.empty(0, dtype=torch.float64))
    assert r is not None
    torch.testing.assert_close(r @ r.T, torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(r.abs(), torch.full_like(r, dim**-0.5))


def test_unrotate_undoes_rotate() -> None:
    x = torch.randn(3, 96, dtype=torch.float64)
    torch.testing.assert_close(rotation.unrotate(rotation.rotate(x, "hadamard"), "hadamard"), x)
    assert rotation.rotate(x, "none") is x


@pytest.mark.parametrize("dim", [72, 100, 7])
def test_unsupported_head_dim_says_what_to_try(dim: int) -> None:
    with pytest.raises(OptionError, match=f"head_dim {dim}") as caught:
        rotation.rotate(torch.zeros(1, dim), "hadamard")
    assert "rotation='none'" in str(caught.value)


def test_a_mode_at_the_first_call_leaves_nothing_behind() -> None:
    rotation._ready.clear()
    rotation._matrix.cache_clear()
    with torch._subclasses.FakeTensorMode() as mode:
        assert rotation.rotate(mode.from_tensor(torch.zeros(1, 96)), "hadamard").shape == (1, 96)
    rotation._matrix.cache_clear()
    with torch.device("meta"):
        rotation.rotate(torch.zeros(1, 80, device="cpu"), "hadamard")
    for dim in (80, 96):
        x = torch.randn(2, dim)
        assert torch.allclose(rotation.unrotate(rotation.rotate(x, "hadamard"), "hadamard"), x, atol=1e-5)


def test_unknown_rotation() -> None:
    with pytest.raises(OptionError, match="unknown rotation"):
        rotation.rotate(torch.zeros(1, 64), "givens")


@pytest.mark.parametrize("tile", [32, 64, 128])
@pytest.mark.parametrize("keys", [1, 63, 64, 65, 300])
def test_tiles_hold_the_rows_in_order(tile: int, keys: int) -> None:
    x = torch.arange(2 * 3 * keys * 8).reshape(2, 3, keys, 8)
    for tiled, rows in (
        (layout.key_tiles(x, tile), layout.key_rows),
        (layout.value_tiles(x, tile), layout.value_rows),
    ):
        back = rows(tiled)
        assert back.shape[2] == layout.tiles_for(keys, tile) * tile
        assert torch.equal(back[:, :, :keys], x)
        assert not back[:, :, keys:].any()
    assert layout.value_tiles(x, tile).shape[-1] == tile
    assert torch.equal(layout.scale_tiles(x[..., 0], tile)[:, :, :keys], x[..., 0])


def test_appending_equals_storing_at_once() -> None:
    x = torch.randint(0, 255, (2, 3, 200, 8), dtype=torch.uint8)
    keys = torch.zeros(2, 3, 2, 128, 8, dtype=torch.uint8)
    values = torch.zeros(2, 3, 2, 8, 128, dtype=torch.uint8)
    scales = torch.zeros(2, 3, 256, dtype=torch.uint8)
    first = 0
    for n in (120, 1, 1, 78):  # across the border of a tile
        positions = torch.arange(first, first + n)
        layout.write_keys(keys, x[:, :, first : first + n], positions)
        layout.write_values(values, x[:, :, first : first + n], positions)
        layout.write_scales(scales, x[:, :, first : first + n, 0], positions)
        first += n
    assert torch.equal(keys, layout.key_tiles(x, 128))
    assert torch.equal(values, layout.value_tiles(x, 128))
    assert torch.equal(scales, layout.scale_tiles(x[..., 0], 128))


def test_pages_are_gathered_per_sequence() -> None:
    x = torch.randn(2, 3, 256, 8)
    tiled = layout.key_tiles(x, 64)  # four tiles a sequence
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    pool = tiled.permute(1, 0, 2, 3, 4).flatten(1, 2)[:, order][None]
    table = torch.empty(8, dtype=torch.int32)
    table[order] = torch.arange(8, dtype=torch.int32)
    table = table.view(2, 4)
    assert torch.equal(layout.gather_pages(pool, table), tiled)
    scales = (
        layout.scale_tiles(x[..., 0], 64)
        .unflatten(2, (-1, 64))
        .permute(1, 0, 2, 3)
        .flatten(1, 2)[:, order]
        .flatten(1)[None]
    )
    assert torch.equal(layout.gather_scales(scales, table, 64), layout.scale_tiles(x[..., 0], 64))
