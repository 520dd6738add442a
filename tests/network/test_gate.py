"""The gate's arithmetic against plain loops, and the operator that summarises keys against pooling them at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lamp_compile.runtime import layout, reference
from lamp_compile.runtime.network import cost, gate
from lamp_compile.runtime.network import ops as _ops  # noqa: F401  (registers the operators)
from tests import tolerances

H, G, D, R, GROUP, SUBTILE = 4, 2, 16, 8, 8, 32
FLOAT32 = tolerances.ARITHMETIC[torch.float32].relative


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def made(seed: int = 0, **changes: Tensor) -> gate.Gate:
    generator = torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(s, generator=generator) * 0.3 for n, s in gate.shapes(H, G, D, R, 2).items()}
    weights["limit"], weights["margin"] = torch.full((G,), 8.0), torch.full((G,), 2.0)
    return gate.Gate(**{**weights, **changes})


def test_prediction_is_what_a_loop_over_groups_says() -> None:
    g, queries, tiles = made(), 3, 4
    projected = torch.randn(1, H, queries, R)
    summary = torch.randn(1, G, tiles * SUBTILE // GROUP, R)
    history = torch.rand(1, G, queries, tiles, 2)
    ends = [40, 70, 71]
    first = torch.arange(summary.shape[2]) * GROUP
    groups = (first < torch.tensor(ends)[:, None])[None, None]
    live = groups.reshape(1, 1, queries, tiles, -1).any(-1)
    said = gate.content(projected, summary, groups, tiles, 0.25)
    importance, mass = gate.predict(said, history, live, g.age[0], g.extra[0])
    for h in range(H):
        for i, end in enumerate(ends):
            newest, logs, energies = (end - 1) // SUBTILE, [], []
            for t in range(newest + 1):
                scores = [
                    0.25 * float(projected[0, h, i] @ summary[0, h // 2, t * 4 + m])
                    for m in range(4)
                    if (t * 4 + m) * GROUP < end
                ]
                octave = math.log2(1 + newest - t)
                low = int(octave)
                age = g.age[0, h]
                bias = float(age[low] * (1 - octave + low) + age[low + 1] * (octave - low))
                bias += float(g.extra[0, h, gate.SINK]) * (t == 0)
                for field, weight in ((0, gate.LAST), (1, gate.MEAN)):
                    bias += float(g.extra[0, h, weight]) * math.log(float(history[0, h // 2, i, t, field]) + gate.LEAST)
                logs.append(bias + math.log(sum(map(math.exp, scores))))
                energies.append(bias + math.log(sum(math.exp(2 * s) for s in scores)) / 2)
            total = math.log(sum(map(math.exp, logs)))
            wanted = [min(0.0, e + float(g.extra[0, h, gate.OFFSET]) - total) for e in energies]
            assert off(importance[0, h, i, : newest + 1], torch.tensor(wanted)) < FLOAT32
            assert off(mass[0, h, i, : newest + 1].exp().sum(), torch.tensor(1.0)) < FLOAT32
            assert (importance[0, h, i, newest + 1 :] == -torch.inf).all()


def test_history_of_many_rows_is_that_of_one_after_the_other() -> None:
    rows = torch.rand(2, G, 150, 5)
    rows[:, :, :10, 3:] = -1.0  # not live yet
    state = torch.rand(2, G, 5, 2)
    known, after = gate.histories(rows, state)
    step = state
    for i in range(rows.shape[2]):
        assert off(known[:, :, i], step) < FLOAT32
        _, step = gate.histories(rows[:, :, i : i + 1], step)
    assert off(after, step) < FLOAT32


def planes(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    stored = reference.quantize(keys, keys, None, "nested8", "nested8", "hadamard", tile=32)
    return stored.k_high, stored.k_residual, stored.k_scale


def summarised(keys: Tensor, g: gate.Gate, spans: list[tuple[int, int]]) -> Tensor:
    """Summaries after keys came in these spans (first, rows)."""
    six = planes(keys)
    summary = torch.zeros(keys.shape[0], G, keys.shape[2] // GROUP, R, dtype=torch.float16)
    for first, rows in spans:
        torch.ops.lamp.summarize(
            *six, summary, g.key, g.key_bias, torch.tensor([first]), None,
            rows=rows, group=GROUP, k_format="nested8", site="s",
        )  # fmt: skip
    return summary


def test_summaries_come_out_the_same_however_keys_come() -> None:
    keys, g = torch.randn(2, G, 96, D), made()
    at_once = summarised(keys, g, [(0, 96)])
    assert torch.equal(summarised(keys, g, [(i, 1) for i in range(96)]), at_once)
    assert torch.equal(summarised(keys, g, [(0, 41), (41, 1), (42, 54)]), at_once)
    stored = layout.key_rows(planes(keys)[0])
    assert stored.shape[2] == 96
    rotated = reference.rotation.rotate(keys, "hadamard").reshape(2, G, 12, GROUP, D).mean(3)
    wanted = rotated @ g.key + g.key_bias[:, None]
    assert off(at_once.float(), wanted) < tolerances.NETWORK["summaries"].relative
    partial = summarised(keys, g, [(0, 43)])
    three = reference.rotation.rotate(keys[:, :, 40:43], "hadamard").mean(2, keepdim=True)
    assert (
        off(partial[:, :, 5:6].float(), three @ g.key + g.key_bias[:, None]) < tolerances.NETWORK["summaries"].relative
    )
    assert (partial[:, :, 6:] == 0).all(), "groups that no key has come to"


def test_summaries_of_pages_are_those_of_sequences() -> None:
    keys, g = torch.randn(2, G, 96, D), made()
    wanted = summarised(keys, g, [(0, 70)])
    table = torch.tensor([[4, 0, 2], [1, 5, -1]], dtype=torch.int32)
    pool = [torch.zeros(1, G, 6, *x.shape[3:], dtype=x.dtype) for x in planes(keys)[:2]]
    scale = torch.zeros(1, G, 6, 32, dtype=torch.float16)
    for b in range(2):
        for index, page in enumerate(table[b].tolist()):
            if page >= 0:
                for target, source in zip(pool, planes(keys)[:2], strict=True):
                    target[0, :, page] = source[b, :, index]
                scale[0, :, page] = planes(keys)[2][b, :, index * 32 : index * 32 + 32]
    summary = torch.full((1, G, 24, R), 7.0, dtype=torch.float16)
    torch.ops.lamp.summarize(
        *pool, scale.flatten(2), summary, g.key, g.key_bias, torch.tensor([0, 0]), table,
        rows=70, group=GROUP, k_format="nested8", site="s",
    )  # fmt: skip
    got = summary.reshape(G, 6, 4, R)
    for b, pages in ((0, [4, 0, 2]), (1, [1, 5])):
        read = got[:, pages].reshape(G, -1, R)[:, :9]
        assert torch.equal(read[:, : len(pages) * 4], wanted[b, :, : min(9, len(pages) * 4)])
    assert (got[:, 3] == 7.0).all(), "a page of nobody"
    before = summary.clone()
    torch.ops.lamp.summarize(
        *pool, scale.flatten(2), summary, g.key, g.key_bias, torch.tensor([-1, -1]), table,
        rows=1, group=GROUP, k_format="nested8", site="s",
    )  # fmt: skip
    assert torch.equal(summary, before), "sequences outside the step"


@pytest.mark.parametrize("keys", [256, 1024, 4096])
def test_cost_is_counted_from_the_tensors_that_are_read(keys: int) -> None:
    shape = cost.Shape(H, G, D, D)
    found = cost.network([shape], keys, rank=R, group=GROUP, subtile=SUBTILE)
    g = made()
    summaries = G * keys // GROUP * R * 2
    weights = 2 * (g.query.numel() + g.key.numel())
    assert summaries + weights <= found.bytes <= 1.35 * (summaries + weights) + G * keys / SUBTILE * 16 + 600
    products = 2 * (g.query.numel() + g.key.numel() + H * keys // GROUP * R)
    assert found.operations >= products
    whole = cost.exact([shape], keys)
    assert found.operations < whole.operations / 2
    assert whole.bytes == G * keys * (D / 2 + 2)


def test_operators_refuse_what_does_not_belong_together() -> None:
    from lamp_compile.errors import InputError

    g = made()
    arguments: dict[str, Any] = dict(
        causal="", window=0, scale=None, softcap=0.0, keys=64, rotation="hadamard", query_bits=8, subtile=SUBTILE,
        room=64, pages=2, site="s",
    )  # fmt: skip
    q, summary, history = torch.randn(1, H, 1, D), torch.zeros(1, G, 8, R), torch.zeros(1, G, 2, 2)
    rest = (g.query_bias, g.age[0], g.extra[0], None, None, *[None] * 6)
    torch.ops.lamp.predict(q, summary, history, g.query, *rest, **arguments)
    with pytest.raises(InputError, match="do not belong together"):
        torch.ops.lamp.predict(q, summary[..., :4], history, g.query, *rest, **arguments)
    with pytest.raises(InputError, match="without what they saw"):
        torch.ops.lamp.predict(q.expand(1, H, 2, D), summary, history, g.query, *rest, **arguments)
    flat, at = torch.zeros(1, G, 64, D // 2, dtype=torch.uint8), torch.zeros(1, dtype=torch.long)
    with pytest.raises(InputError, match="k_high has 4 dimensions"):
        torch.ops.lamp.summarize(
            flat, flat, torch.zeros(1, G, 64).half(), summary, g.key, g.key_bias, at, None,
            rows=1, group=GROUP, k_format="nested8", site="s",
        )  # fmt: skip
