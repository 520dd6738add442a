"""Operators refuse what they cannot do, naming what, where and what to try."""

import pytest
import torch

from lamp_compile.errors import InputError, LampError
from lamp_compile.runtime import checks, ops  # noqa: F401 (registers torch.ops.lamp)


def attention(**changes):
    tensors = {
        "q": torch.randn(2, 4, 3, 64),
        "k": torch.randn(2, 2, 40, 64),
        "v": torch.randn(2, 2, 40, 64),
        "mask": None,
        "bias": None,
    }
    options = {name: changes.pop(name) for name in ("causal", "window") if name in changes}
    tensors.update({name: x(tensors[name]) if callable(x) else x for name, x in changes.items()})
    return torch.ops.lamp.attention(*tensors.values(), **options, site="model.layers.0.self_attn")


CASES = {
    "integers": (dict(q=lambda x: x.int()), "int32", "float32"),
    "integer keys": (dict(k=lambda x: x.long(), v=lambda x: x.long()), "int64", "bfloat16"),
    "three dimensions": (dict(q=lambda x: x[0]), "3 dimensions", "[batch, heads, length, channels]"),
    "empty sequence": (dict(k=lambda x: x[:, :, :0], v=lambda x: x[:, :, :0]), "empty", "one token"),
    "no query": (dict(q=lambda x: x[:, :, :0]), "empty", "one token"),
    "keys without values": (dict(v=lambda x: x[:, :, :30]), "differ", "[B, G, N, Dv]"),
    "another batch": (dict(q=lambda x: x[:1]), "batch 1", "batch"),
    "odd groups": (dict(q=lambda x: x[:, :3]), "3 query heads over 2", "groups"),
    "another head_dim": (dict(q=lambda x: x[..., :32]), "head_dim 32", "head_dim"),
    "head_dim not supported": (
        dict(q=torch.randn(2, 4, 3, 72), k=torch.randn(2, 2, 40, 72), v=torch.randn(2, 2, 40, 72)),
        "head_dim 72",
        "rotation='none'",
    ),
    "float mask": (dict(mask=torch.zeros(2, 1, 3, 40)), "mask is float32", "bias"),
    "boolean bias": (dict(bias=torch.ones(2, 1, 3, 40, dtype=torch.bool)), "bias is bool", "added"),
    "mask of another batch": (dict(mask=torch.ones(5, 1, 3, 40, dtype=torch.bool)), "does not broadcast", "ones"),
    "mask over fewer keys": (dict(mask=torch.ones(2, 1, 3, 20, dtype=torch.bool)), "covers 20 keys of 40", "per key"),
    "bias over fewer keys": (dict(bias=torch.zeros(2, 1, 3, 20)), "covers 20 keys of 40", "per key"),
    "bias over more keys": (dict(bias=torch.zeros(2, 1, 3, 60)), "covers 60 keys of 40", "per key"),
    "unknown causality": (dict(causal="left"), "'left'", "bottom_right"),
    "negative window": (dict(causal="bottom_right", window=-4), "window=-4", "0 for all"),
    "window without causality": (dict(window=8), "window=8", "causal"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_with_what_where_and_what_to_try(name: str) -> None:
    changes, what, fix = CASES[name]
    with pytest.raises(LampError) as caught:
        attention(**changes)
    assert what in caught.value.what
    assert caught.value.where
    assert fix in caught.value.fix


def test_tensors_on_two_devices() -> None:
    """Called directly: an operator with a meta tensor among its arguments never reaches its implementation."""
    with pytest.raises(InputError, match="mask is on meta, the query on cpu"):
        checks.one_device("layer", torch.zeros(1), mask=torch.zeros(1, device="meta"), bias=None)


def test_settings_of_another_number_of_heads() -> None:
    importance = torch.rand(1, 4, 1, 3)
    with pytest.raises(InputError, match="4 kv heads"):
        torch.ops.lamp.select(importance, torch.zeros(3), torch.zeros(4), None, None, exact=False, site="")


def test_all_masked_row_is_zero_and_its_neighbours_are_not() -> None:
    mask = torch.ones(2, 1, 3, 40, dtype=torch.bool)
    mask[1, 0, 1] = False
    out = attention(mask=mask)
    assert not out[1, :, 1].any()
    assert out[1, :, 0].abs().sum(-1).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_input_shows_in_the_output(bad: float) -> None:
    def spoil(x: torch.Tensor) -> torch.Tensor:
        x[0, 0, 1, 2] = bad
        return x

    for name in ("k", "v"):
        out = attention(**{name: spoil})
        assert not out[0, :2].isfinite().all()
        assert out[0, 2:].isfinite().all()
        assert out[1].isfinite().all()
