"""The probe, the balance, and what explain says."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lamp_compile
from lamp_compile.frontends.huggingface import balance
from lamp_compile.frontends.huggingface.sites import probe
from lamp_compile.runtime import cache_argument
from tests.huggingface import reference

PAIRS = {"Llama": [8, 9], "Phi-3": [4, 5], "GPT-NeoX": [2, 3], "GPT-2": [0, 1]}
"""Partners of channels 0 and 1 at D 16: half-split, half of the channels rotary, a quarter of them, none."""


def probed(model: Any) -> Any:
    model.set_attn_implementation("lamp")
    return probe(model)


def outlier_twin(model: Any, factor: float, channels: Tensor) -> Any:
    """The same function in real numbers, with outlier key channels."""
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            k = attention.k_proj.weight.unflatten(0, (-1, attention.head_dim))
            q = attention.q_proj.weight.unflatten(0, (-1, attention.head_dim))
            k[:, channels] *= factor
            q[:, channels] /= factor
    return model


def test_probe_leaves_the_random_state_and_no_observer(model: Any) -> None:
    before = torch.random.get_rng_state()
    sites, refusals = probed(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert ([site.name for site in sites], refusals) == (["model.layers.0.self_attn", "model.layers.1.self_attn"], ())
    again, _ = probed(model)
    assert torch.equal(again[1].key_rms, sites[1].key_rms)
    site = sites[0]
    assert (site.heads, site.kv_heads, site.head_dim, site.value_dim, site.layer) == (4, 2, 16, 16, 0)


def test_probe_reads_the_queries_of_the_group(model: Any) -> None:
    """Scaling the queries of one kv head's group is seen at that head only."""
    before, _ = probed(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[32:] *= 3
    after, _ = probed(model)
    ratio = after[0].query_rms / before[0].query_rms
    torch.testing.assert_close(ratio, torch.tensor([[1.0], [3.0]]).expand(2, 16))


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_pairs(name: str) -> None:
    model = reference.build(name)
    sites, _ = probed(model)
    partner = balance._partners(sites[0].module, 16, model.config)
    assert partner[:2].tolist() == PAIRS[name]
    assert torch.equal(partner[partner], torch.arange(16)), "partners of each other"


def test_features() -> None:
    sites, _ = probed(reference.build("gpt-oss"))
    assert [site.features for site in sites] == [("cache", "mask", "window 8", "sinks"), ("cache", "mask", "sinks")]
    sites, _ = probed(reference.build("Gemma 2"))
    assert "softcap 50" in sites[0].features


def test_gain_is_what_balancing_saves() -> None:
    q, k = torch.rand(2, 16) + 0.1, torch.rand(2, 16) + 0.1
    k[:, 3] *= 40
    b = balance.factors(q, k)
    noise = (q.norm(dim=1) * k.norm(dim=1), (q * b).norm(dim=1) * (k / b).norm(dim=1))
    assert balance.gain(q, k) == pytest.approx(float((noise[0] / noise[1]).max()), rel=1e-5)
    assert balance.gain(torch.ones(1, 4), torch.ones(1, 4)) == pytest.approx(1.0)
    dead = balance.factors(torch.zeros(1, 4), torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    assert dead.isfinite().all()
    assert (dead > 0).all()


def test_auto_balances_outliers_and_only_them() -> None:
    plain = lamp_compile.compile(reference.build("Llama"), mode="eager").lamp.plan
    assert [row.balance for row in plain.sites] == [None, None]
    twin = outlier_twin(reference.build("Llama"), 30.0, torch.tensor([2, 10]))
    plan = lamp_compile.compile(twin, mode="eager").lamp.plan
    for row in plan.sites:
        assert row.balance is not None
        assert row.reason.startswith("balanced: score noise")
        for factors in row.balance:
            assert min(factors[2], factors[10]) > 5 * max(f for i, f in enumerate(factors) if i not in (2, 10))
    assert plan.provenance["calibration"] == "uncalibrated"
    assert plan.provenance["balance_from"] == "probe: 128 random tokens, seed 0"
    assert min(plan.provenance["balance_gain"].values()) > plan.provenance["balance_threshold"]
    never = lamp_compile.compile(twin, mode="eager", balance="never").lamp.plan
    assert [row.balance for row in never.sites] == [None, None]


def test_balance_repairs_the_twin(ids: Tensor) -> None:
    model = reference.build("Llama")
    wanted = reference.logits(model, ids)
    twin = outlier_twin(model, 30.0, torch.tensor([2, 10]))
    errors = {
        mode: reference.relative(reference.logits(lamp_compile.compile(twin, mode="eager", balance=mode), ids), wanted)
        for mode in ("auto", "never")
    }
    assert errors["auto"] < errors["never"] / 5


def test_trained_model_is_not_balanced_and_its_twin_is(nano: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(nano).eval()
    plan = lamp_compile.compile(model, mode="eager").lamp.plan
    assert max(plan.provenance["balance_gain"].values()) < 1.25
    assert all(row.balance is None for row in plan.sites)
    plan = lamp_compile.compile(outlier_twin(model, 30.0, torch.tensor([5, 37])), mode="eager").lamp.plan
    assert min(plan.provenance["balance_gain"].values()) > 2
    assert all(row.balance is not None for row in plan.sites)


@pytest.mark.parametrize(
    ("where", "nodes"),
    [
        ("cpu_kernels", ["fused_attention"]),
        ("reference_only", ["quantize", "look_ahead", "select", "attend", "guard"]),
    ],
)
def test_explain_decoder(where: str, nodes: list[str], model: Any, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(where)
    torch._dynamo.reset()
    report = lamp_compile.explain(model, tau=0.05)
    assert report.rewritten == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert report.plan.sites[0].tau == 0.05
    assert "cached(" in report.before
    assert re.findall(r"lamp\.(\w+)\(", report.after) == nodes
    assert any("compiles nothing" in note for note in report.notes)
    assert any("decoding gains nothing" in note for note in report.notes)
    assert not hasattr(model, "lamp")
    assert any("window" in note for note in lamp_compile.explain(reference.build("Gemma 3")).notes)


def test_explain_refusals() -> None:
    report = lamp_compile.explain(reference.build("DeepSeek-V3"))
    assert (len(report.refusals), report.rewritten) == (2, ())
    assert all("latent cache" in refusal.reason for refusal in report.refusals)
    assert "refused: model.layers.0.self_attn" in report.text()


def test_explain_module() -> None:
    torch._dynamo.reset()
    attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x = torch.randn(1, 20, 64)
    report = lamp_compile.explain(attention, {"query": x, "key": x, "value": x, "need_weights": False})
    assert len(report.rewritten) == 1
    assert report.sites[0].head_dim == 16


def test_key_changed_after_the_cache_is_refused(model: Any) -> None:
    """A layer that hands attention something else than its cache gave back cannot keep planes."""
    attention = model.model.layers[1].self_attn
    original = type(attention).forward

    def forward(hidden_states: Tensor, **kwargs: Any) -> Any:
        cache = kwargs.pop(cache_argument.NAME)

        def update(k: Tensor, v: Tensor, index: int, **more: Any) -> Any:
            keys, values = cache.update(k, v, index)
            return keys * 1.0, values

        return original(attention, hidden_states, **{cache_argument.NAME: SimpleNamespace(update=update)}, **kwargs)

    attention.forward = forward
    sites, refusals = probed(model)
    assert [site.reason == "" for site in sites] == [True, False]
    assert "keys changed after the cache" in refusals[0].reason
    fast = lamp_compile.compile(model, mode="eager")
    assert fast.lamp.report().rewritten == ("model.layers.0.self_attn",)
    assert [row.apply for row in fast.lamp.plan.sites] == [True, False]
