"""Where kernels apply, a model uses them in eager mode and in its graph; where a plan rules them out, the report says
so. The kernels themselves are stood in for by the reference, so that no GPU is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import lamp_compile
from lamp_compile.quality.engine import CompiledEngine
from lamp_compile.runtime import kernel_notes, kernels
from tests.huggingface.test_compiled import graphs, lowered_to_eager

pytestmark = pytest.mark.usefixtures("fresh_graphs", "one_thread")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Kernels apply on the CPU; how often each was called."""
    found: Counter[str] = Counter()

    def nowhere(kind: str) -> str:
        return "stood in for"

    store = {"k_format": "nested8", "v_format": "nested8", "site": ""}

    def append(k: Tensor, v: Tensor, planes: Any, balance: Any, positions: Tensor, table: Any, rotation: str) -> None:
        found["append"] += 1
        with monkeypatch.context() as real:
            real.setattr(kernels, "why_not_device", nowhere)
            torch.ops.lamp.append(k, v, *planes, balance, positions, table, **store, rotation=rotation)

    def attend(q: Tensor, planes: Any, hot: Any, balance: Any, seen: Any, options: Any) -> Tensor:
        found["attend"] += 1
        with monkeypatch.context() as real:
            real.setattr(kernels, "why_not_device", nowhere)
            out: Tensor = torch.ops.lamp.fused_attention(q, *planes, *hot, balance, *seen, **options)
        return out

    monkeypatch.setattr(kernels, "why_not_device", lambda kind: None)
    monkeypatch.setattr(kernels, "append", append)
    monkeypatch.setattr(kernels, "attend", attend)
    with kernels.cpu.without_torch():
        yield found


def tokens_and_statistics(fast: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    cache = fast.lamp.cache()
    tokens = fast.generate(ids, past_key_values=cache, **options)
    return tokens, torch.stack([layer.stats for layer in cache.layers])


def plain(model: Any, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """By the reference."""
    with without_kernels():
        return tokens_and_statistics(lamp_compile.compile(model, mode="eager"), ids, **options)


@contextmanager
def without_kernels() -> Iterator[None]:
    with mock.patch.object(kernels, "why_not_device", return_value="switched off"), kernels.cpu.without_torch():
        yield


def test_eager_mode_calls_the_kernels(model: Any, ids: Tensor, greedy: dict[str, Any], request: Any) -> None:
    wanted = plain(model, ids, **greedy)
    calls = request.getfixturevalue("calls")
    fast = lamp_compile.compile(model, mode="eager")
    assert not calls, "the probe has no planes"
    tokens, statistics = tokens_and_statistics(fast, ids, **greedy)
    assert torch.equal(tokens, wanted[0])
    assert torch.equal(statistics, wanted[1])
    expected = model.config.num_hidden_layers * greedy["max_new_tokens"]
    assert calls == {"append": expected, "attend": expected}


def test_the_graph_is_one_and_fused(model: Any, ids: Tensor, greedy: dict[str, Any], request: Any) -> None:
    """Asking whether kernels apply breaks no graph, and traces to nothing."""
    wanted = plain(model, ids, **greedy)
    calls = request.getfixturevalue("calls")
    fast = lowered_to_eager(model)
    tokens, statistics = tokens_and_statistics(fast, ids, **greedy)
    assert torch.equal(tokens, wanted[0])
    assert torch.equal(statistics, wanted[1])
    assert graphs() == (1, 0)
    after = fast.lamp.report().after
    assert "lamp.fused_attention" in after
    assert not any(name in after for name in ("look_ahead", "quantize", "guard(", "attention.cached"))
    expected = model.config.num_hidden_layers * greedy["max_new_tokens"]
    assert calls == {"append": expected, "attend": expected}


@pytest.mark.usefixtures("cpu_kernels")
def test_on_a_cpu_eager_mode_and_the_graph_run_the_same_kernels(
    model: Any, ids: Tensor, greedy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing stands in here: the compiled core, one graph, the same tokens and counts. Torch calls the core itself: no
    call goes by Python."""
    for name in ("append", "attend"):
        monkeypatch.setattr(kernels.cpu, name, lambda *args, **kwargs: pytest.fail("by Python"))
    calls = 2 * model.config.num_hidden_layers * greedy["max_new_tokens"]
    eager = lamp_compile.compile(model, mode="eager")
    before = kernels.cpu.served()
    wanted = tokens_and_statistics(eager, ids, **greedy)
    assert kernels.cpu.served() == before + calls
    fast = lowered_to_eager(model)
    before = kernels.cpu.served()
    tokens, statistics = tokens_and_statistics(fast, ids, **greedy)
    assert kernels.cpu.served() == before + calls
    assert graphs() == (1, 0)
    assert "lamp.fused_attention" in fast.lamp.report().after
    assert torch.equal(tokens, wanted[0])
    assert torch.equal(statistics, wanted[1])


def test_slots_call_the_kernels(model: Any, request: Any) -> None:
    prompts = [[5, 6, 7], list(range(3, 40)), [9] * 12]
    options = {"max_new_tokens": 5, "streams": 2, "eos_token_id": None}
    many = lambda fast: dict(fast.lamp.generate_many(prompts, **options))  # noqa: E731
    with without_kernels():
        wanted = many(lamp_compile.compile(model, mode="eager"))
    calls = request.getfixturevalue("calls")
    found = many(lamp_compile.compile(model, mode="eager"))
    assert all(torch.equal(found[index], wanted[index]) for index in range(len(prompts)))
    assert calls["append"] == calls["attend"] > 5 * model.config.num_hidden_layers


def test_quality_is_measured_by_the_reference(model: Any, ids: Tensor, calls: Counter[str]) -> None:
    """In the kernels the rows of a forward share decisions, which would measure more refinement than decoding has."""
    fast = lamp_compile.compile(model, mode="eager")
    CompiledEngine(fast).run(ids, fast.lamp.plan)
    assert set(calls) == {"append"}
    fast(ids, past_key_values=fast.lamp.cache())
    assert calls["attend"] == model.config.num_hidden_layers


def noted(fast: Any) -> list[str]:
    return [note for note in fast.lamp.report().notes if note.startswith(kernel_notes.START)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "mass"}, "rule 'mass' needs all sub-tiles in order"),
        ({"query_bits": 16}, "query_bits 16"),
        ({"k_format": "int8"}, "this is int8 and nested8"),
        ({"subtile": 16}, "subtile 16"),
    ],
)
def test_a_plan_that_rules_kernels_out_is_noted(
    model: Any, ids: Tensor, calls: Counter[str], options: dict[str, Any], says: str
) -> None:
    fast = lamp_compile.compile(model, mode="eager", **options)
    (note,) = noted(fast)
    assert says in note
    assert all(site.name in note for site in fast.lamp.report().sites)
    fast.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert not calls["attend"]


def test_one_line_per_reason(model: Any, calls: Counter[str]) -> None:
    plan = lamp_compile.compile(model, mode="eager").lamp.plan
    rows = plan.to_json().replace('"rule": "energy"', '"rule": "mass"', 1)
    fast = lamp_compile.compile(model, mode="eager", plan=lamp_compile.Plan.from_json(rows))
    (note,) = noted(fast)
    first, second = (site.name for site in plan.sites)
    assert first in note
    assert second not in note


@pytest.mark.usefixtures("calls")
def test_nothing_is_noted_where_kernels_run(model: Any) -> None:
    assert not noted(lamp_compile.compile(model, mode="eager"))


def test_without_kernels_it_is_said_that_the_reference_is_slow(model: Any) -> None:
    with without_kernels():
        (note,) = noted(lamp_compile.compile(model, mode="eager"))
    assert "switched off; the reference runs there, slowly" in note


def test_graphs_note_it_too(model: Any, ids: Tensor, greedy: dict[str, Any], calls: Counter[str]) -> None:
    fast = lowered_to_eager(model, rule="mass")
    fast.generate(ids, **greedy)
    (report,) = fast.lamp.backend.reports
    assert [note for note in report.notes if note.startswith(kernel_notes.START)] == noted(fast)
    assert len(noted(fast)) == 1


def test_a_graph_without_a_cache_notes_that_kernels_need_one(calls: Counter[str]) -> None:
    layer = torch.nn.TransformerEncoderLayer(d_model=64, nhead=4, batch_first=True).eval()
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(1, 40, 64),))
    notes = lamp_compile.rewrite(program).graph_module.meta["lamp_report"].notes
    assert sum(kernel_notes.NO_CACHE in note for note in notes) == 1
    assert not calls


@pytest.mark.parametrize("tile", [32, 64, 128])
def test_plans_and_planes_of_any_tile(model: Any, ids: Tensor, greedy: dict[str, Any], tile: int) -> None:
    """A plan of 0.1.0 says tile 128; it loads, runs, and its tokens are those of the default."""
    wanted = tokens_and_statistics(lamp_compile.compile(model, mode="eager"), ids, **greedy)
    plan = lamp_compile.compile(model, mode="eager").lamp.plan
    old = plan.to_json().replace('"tile": 32', f'"tile": {tile}')
    fast = lamp_compile.compile(model, mode="eager", plan=lamp_compile.Plan.from_json(old))
    assert {row.tile for row in fast.lamp.plan.sites} == {tile}
    tokens, statistics = tokens_and_statistics(fast, ids, **greedy)
    assert torch.equal(tokens, wanted[0])
    assert torch.equal(statistics, wanted[1])
