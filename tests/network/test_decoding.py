"""Decoding with a look-ahead network: what it predicts, when the exact look-ahead takes over, what follows a cache."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lamp_compile
from lamp_compile.errors import OptionError, PlanError
from lamp_compile.frontends.huggingface import route
from lamp_compile.quality import load
from lamp_compile.quality.network.row import served
from lamp_compile.runtime import guard, kernel_notes, kernels
from lamp_compile.runtime.kernels import cpu
from lamp_compile.runtime.network import audit
from tests.huggingface import reference as tiny
from tests.network.conftest import Forced, compiled, divergence

PROMPT, STEPS = 300, 40


@pytest.fixture(scope="module")
def truth(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(ids[:, : PROMPT + STEPS], use_cache=False).logits[0, PROMPT : PROMPT + STEPS]
    return torch.as_tensor(logits).log_softmax(-1)


@pytest.fixture
def exact_kl(model: Any, forced: Forced, truth: Tensor) -> Tensor:
    return divergence(truth, forced(compiled(model, None), PROMPT, STEPS)[0])


def test_the_packaged_network_decodes_as_well(
    model: Any, packaged: Path, forced: Forced, truth: Tensor, exact_kl: Tensor
) -> None:
    fast = compiled(model, packaged)
    names = served(fast.lamp.plan)
    assert names, "the packaged network serves no site"
    got, report = forced(fast, PROMPT, STEPS)
    for site in report:
        assert ("predicted_share" in site) == (site["site"] in names)
        if site["site"] in names:
            assert site["predicted_share"] > 0.9
            assert site["network_flags"] == []
    assert float(divergence(truth, got).mean()) < 2 * float(exact_kl.mean())
    notes = "\n".join(fast.lamp.report().notes)
    assert f"a look-ahead network predicts {', '.join(names)}" in notes
    assert "no kernel for" not in notes


def test_always_unimportant_is_found_out_and_the_error_stays_bounded(
    model: Any, lying: Callable[..., Path], forced: Forced, truth: Tensor, exact_kl: Tensor
) -> None:
    got, report = forced(compiled(model, lying(-30.0)), PROMPT, STEPS)
    assert all(site["dropped"] >= 1 for site in report)
    assert all(audit.WORDS[audit.MISSED] in site["network_flags"] for site in report)
    assert all(site["predicted_share"] < 0.6 for site in report), [site["predicted_share"] for site in report]
    kl = divergence(truth, got)
    # Once it is dropped the exact look-ahead decides; before, for some steps, the high plane alone answered. Believed
    # to the end, it would cost a hundred times as much.
    assert float(kl[audit.WINDOW :].mean()) < 4 * float(exact_kl[audit.WINDOW :].mean())
    assert float(kl.mean()) < 0.01, kl


def test_always_important_costs_a_window_and_says_so(
    model: Any, lying: Callable[..., Path], ids: Tensor, forced: Forced
) -> None:
    _, report = forced(compiled(model, lying(30.0)), 700, 30)
    plain = forced(compiled(model, None), 700, 30)[1]
    alarmed = [site for site in report if audit.WORDS[audit.LAVISH] in site["network_flags"]]
    # Where a tenth of the sub-tiles is hot; where most of them are, reading all costs less than LAVISH_LIMIT.
    assert alarmed
    for site, before in zip(report, plain, strict=True):
        if site in alarmed:
            assert site["refined_share"] < before["refined_share"] + audit.WINDOW / 30 + 0.05


def test_longer_than_it_was_trained_for_the_exact_look_ahead_decides(
    model: Any, lying: Callable[..., Path], forced: Forced, reference_only: None
) -> None:
    got, report = forced(compiled(model, lying(trained=PROMPT + 10)), PROMPT, 16)
    for site in report:
        assert site["predicted_share"] == pytest.approx(10 / 16)
        assert site["network_flags"] == [audit.WORDS[audit.TOO_LONG]]
    shorter = forced(compiled(model, lying(trained=1)), PROMPT, 16)[0]
    exact = forced(compiled(model, None), PROMPT, 16)[0]
    assert torch.equal(shorter, exact)
    assert not torch.equal(got, exact), "the first ten were predicted"


def test_the_guard_overrules_it(model: Any, packaged: Path, forced: Forced) -> None:
    _, report = forced(compiled(model, packaged, guard_budget=1e-6), PROMPT, 6)
    served_sites = [site for site in report if "predicted_share" in site]
    assert served_sites
    assert all(site["predicted_share"] <= 1 / 6 + 1e-6 and max(site["floor"]) >= 1 for site in served_sites)


def stepped(fast: Any, cache: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        rows = [
            fast(tokens[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(tokens.shape[1])
        ]
    return torch.cat(rows, dim=1)


def network_tensors(cache: Any) -> dict[str, Tensor]:
    return {
        f"{layer.name}.{name}": getattr(layer, name).clone()
        for layer in cache.layers
        for name in ("summary", "history", "trust")
        if name in layer.per_sequence
    }


def filled(fast: Any, ids: Tensor, rows: int, capacity: int = 512) -> Any:
    cache = fast.lamp.cache(capacity)
    with torch.no_grad():
        fast(ids[:, :rows], past_key_values=cache, use_cache=True)
    return cache


def test_state_follows_reorder_crop_reset_and_growth(model: Any, ids: Tensor, lying: Callable[..., Path]) -> None:
    fast = compiled(model, lying())
    two = torch.cat((ids[:, :160], ids[:, 200:360]))
    a, b = filled(fast, two, 150), filled(fast, two, 150)
    for cache in (a, b):
        stepped(fast, cache, two[:, 150:155])
    swap = torch.tensor([1, 0])
    b.reorder_cache(swap)
    assert torch.equal(stepped(fast, a, two[:, 155:158])[swap], stepped(fast, b, two[swap, 155:158]))
    for name, tensor in network_tensors(a).items():
        assert torch.equal(tensor[swap], network_tensors(b)[name]), name
        assert float(tensor.abs().sum()) > 0 or name.endswith("trust")

    # Taken back into an earlier sub-tile and written again: summaries are those of the keys that are there.
    cropped, straight = filled(fast, ids, 100), filled(fast, ids, 70)
    cropped.crop(70)
    for cache in (cropped, straight):
        stepped(fast, cache, ids[:, 70:90])
    for layer, other in zip(cropped.layers, straight.layers, strict=True):
        assert torch.equal(layer.summary[:, :, : 90 // 8], other.summary[:, :, : 90 // 8])

    cropped.reset()
    assert all(float(t.abs().sum()) == 0 for t in network_tensors(cropped).values())

    small, wide = filled(fast, ids, 120, 128), filled(fast, ids, 120, 512)
    got, wanted = (stepped(fast, cache, ids[:, 120:140]) for cache in (small, wide))
    assert small.capacity > 128
    assert torch.allclose(got, wanted, atol=1e-4)
    for name, tensor in network_tensors(small).items():
        whole = network_tensors(wide)[name]
        if not name.endswith("trust"):
            assert torch.allclose(tensor, whole[:, :, : tensor.shape[2]], atol=2e-3), name
    assert "network" in wide.memory()
    assert wide.nbytes == compiled_bytes(model, wide)


def compiled_bytes(model: Any, cache: Any) -> int:
    """Bytes of keys and values of the same cache without a network."""
    plain = compiled(model, None).lamp.cache(cache.capacity)
    for layer, other in zip(plain.layers, cache.layers, strict=True):
        layer.lazy_initialization(
            torch.zeros(other.batch_size, other.num_heads, 0, other.k_head_dim),
            torch.zeros(other.batch_size, other.num_heads, 0, other.v_head_dim),
        )
    return int(plain.nbytes)


@pytest.mark.parametrize("kernel", [True, False])
def test_a_graph_holds_the_prediction_as_nodes(
    kernel: bool, model: Any, ids: Tensor, packaged: Path, fresh_graphs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one operator where a kernel serves it, otherwise as those of the reference."""
    if kernel and cpu.why_not() is not None:
        pytest.skip(str(cpu.why_not()))
    if not kernel:
        monkeypatch.setattr(kernels, "why_not_predicted", lambda *args: "switched off here")
    fast = compiled(model, packaged)
    backend = lamp_compile.backend(plan=route.decode_plan(fast), controls=fast.lamp.controls, lower="eager")
    one, two = filled(fast, ids, 200), filled(fast, ids, 200)
    step: Any = torch.compile(fast.forward, backend=backend, fullgraph=True)
    for i in range(200, 204):
        with torch.no_grad():
            got = step(ids[:, i : i + 1], past_key_values=one, use_cache=True).logits
        assert torch.allclose(got, stepped(fast, two, ids[:, i : i + 1]), atol=1e-3)
    report = backend.reports[0]
    assert len(report.rewritten) == 4
    first = next(site for site in report.rewritten if site in served(fast.lamp.plan))
    parts = ("predict", "look_ahead", "arbitrate", "select", "attend", "guard", "audit")
    if kernel:
        assert "lamp.fused_predicted(" in report.after
        assert not any(f"lamp.{op}(" in report.after for op in parts)
        assert not any(note.startswith(kernel_notes.START) for note in report.notes)
    else:
        assert any("switched off here" in note for note in report.notes)
        order = [report.after.index(f"lamp.{op}(") for op in parts]
        assert first == report.rewritten[0]
        assert order == sorted(order)
    for name, tensor in network_tensors(two).items():
        assert torch.allclose(tensor, network_tensors(one)[name], atol=1e-3), name


@pytest.fixture
def fresh_graphs() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_plan_names_the_file_beside_it(model: Any, packaged: Path, tmp_path: Path) -> None:
    plan = compiled(model, packaged).lamp.plan
    data = json.loads(plan.to_json())
    data["network"]["file"] = "mine.safetensors"
    (tmp_path / "plan.json").write_text(json.dumps(data))
    (tmp_path / "mine.safetensors").write_bytes(packaged.read_bytes())
    fast = lamp_compile.compile(model, mode="eager", plan=tmp_path / "plan.json")
    assert served(fast.lamp.plan) == served(plan)
    assert fast.lamp.spec.layers[0].network is not None or "model.layers.0.self_attn" not in served(plan)
    (tmp_path / "mine.safetensors").write_bytes(packaged.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(PlanError, match="not the one the plan was made with"):
        lamp_compile.compile(model, mode="eager", plan=tmp_path / "plan.json")


def test_other_models_formats_and_modules_are_refused(
    model: Any, packaged: Path, nano: Path, lying: Callable[..., Path]
) -> None:
    with pytest.raises(PlanError, match="was trained for"):
        compiled(tiny.build("Llama"), packaged)
    other = load.load_model(nano)
    with torch.no_grad():
        other.model.layers[2].self_attn.k_proj.weight.mul_(1.01)
    with pytest.raises(PlanError, match="other weights"):
        compiled(other, packaged)
    with pytest.raises(PlanError, match="in the basis none"):
        compiled(model, packaged, rotation="none")
    with pytest.raises(PlanError, match="decides on 16 keys"):
        compiled(model, packaged, subtile=16)
    with pytest.raises(PlanError, match="rule 'mass'"):
        compiled(model, packaged, rule="mass")
    with pytest.raises(OptionError, match="lookahead is a int"):
        lamp_compile.compile(model, lookahead=3)
    linear = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    with pytest.raises(OptionError, match="lookahead is for transformers decoders"):
        lamp_compile.compile(linear, lookahead=packaged)
    compiled(load.load_model(nano, dtype=torch.bfloat16), packaged)


def test_skipping_reads_fewer_sub_tiles_and_loses_little(
    model: Any, packaged: Path, ids: Tensor, truth: Tensor, exact_kl: Tensor
) -> None:
    plan = compiled(model, packaged).lamp.plan
    rows = [dataclasses.replace(row, skip=0.4) if row.name in served(plan) else row for row in plan.sites]
    live, kl = {}, {}
    for name, sites in (("all", plan.sites), ("skip", tuple(rows))):
        fast = lamp_compile.compile(model, mode="eager", plan=dataclasses.replace(plan, sites=sites))
        cache = filled(fast, ids, PROMPT)
        before = [layer.stats.clone() for layer in cache.layers]
        got = stepped(fast, cache, ids[:, PROMPT : PROMPT + STEPS])[0].log_softmax(-1)
        counted = [(layer.stats - old)[..., guard.LIVE] for layer, old in zip(cache.layers, before, strict=True)]
        live[name] = {layer.name: int(n.sum()) for layer, n in zip(cache.layers, counted, strict=True)}
        kl[name] = float(divergence(truth, got).mean())
    for site, count in live["all"].items():
        assert (live["skip"][site] < count) == (site in served(plan)), site
    assert kl["skip"] < 10 * float(exact_kl.mean())


def test_shadow_steps_change_nothing_that_it_keeps(model: Any, packaged: Path, ids: Tensor) -> None:
    """A step that is taken back is no step of its history, nor of the audit's turns."""
    made, kept = [], []
    for share in (0.0, 0.5):
        fast = compiled(model, packaged, shadow=share)
        cache, rows = fast.lamp.cache(PROMPT + 12), []
        with torch.no_grad():
            fast(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
            for i in range(PROMPT, PROMPT + 12):
                rows.append(fast(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, -1])
        made.append(torch.stack(rows))
        layers = [layer for layer in cache.layers if hasattr(layer, "trust")]
        kept.append([x for layer in layers for x in (layer.history, layer.trust)])
    assert kept[0]
    assert torch.equal(*made)
    assert all(map(torch.equal, *kept))
