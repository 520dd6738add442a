"""What stays as it is says why, and nothing else in the graph changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lamp_compile
from lamp_compile.driver import rewrite
from lamp_compile.errors import CaptureError, InputError, ModelError
from tests.passes import captured
from tests.passes.spellings import BIAS, Model, inputs


def weights_returned(q, k, v):
    weights = F.softmax(q @ k.mT * 0.25, -1)
    return (weights @ v).sum() + weights.amax()


def scores_used(q, k, v):
    scores = q @ k.mT
    return (scores.softmax(-1) @ v).sum() + scores.mean()


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def five_axes(q, k, v):
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])


REFUSED = {
    "head_dim 20": (sdpa, 20, "head_dim 20"),
    "weights used": (weights_returned, 16, "used elsewhere"),
    "scores used": (scores_used, 16, "used elsewhere"),
    "bias before scale": (lambda q, k, v: ((q @ k.mT + BIAS) * 0.5).softmax(-1) @ v, 16, "before scaling"),
    "tensor scale": (lambda q, k, v: (q @ k.mT * BIAS).softmax(-1) @ v, 16, "scaled by a tensor"),
    "caps differ": (lambda q, k, v: (torch.tanh(q @ k.mT / 5.0) * 4.0).softmax(-1) @ v, 16, "different numbers"),
    "weak fill": (lambda q, k, v: (q @ k.mT).masked_fill(BIAS > 0, -1.0).softmax(-1) @ v, 16, "does not hide"),
    "fill before cap": (
        lambda q, k, v: (torch.tanh((q @ k.mT).masked_fill(BIAS > 0, -1e9) / 5.0) * 5.0).softmax(-1) @ v,
        16,
        "before soft-capping",
    ),
    "where before cap": (
        lambda q, k, v: (torch.tanh(torch.where(BIAS > 0, q @ k.mT, -1e9) / 5.0) * 5.0).softmax(-1) @ v,
        16,
        "before soft-capping",
    ),
    "batch broadcasts": (lambda q, k, v: sdpa(q, k[:1], v[:1]), 16, "broadcasts over"),
    "axes": (five_axes, 16, "5 axes"),
}


@pytest.mark.parametrize("kind", captured.KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(name, kind):
    run, dim, reason = REFUSED[name]
    seen = captured.found(kind, Model(run), *inputs(4, dim=dim))
    assert not seen.sites
    (refusal,) = seen.refusals
    assert reason in refusal.reason
    assert (refusal.site, bool(refusal.pattern)) == ("attn", True)


@pytest.mark.parametrize("kind", captured.KINDS)
def test_router_softmax_is_unclaimed_and_the_graph_keeps_it(kind):
    program = captured.program(kind, Model(lambda q, k, v: q.softmax(-1) * v), *inputs(4))
    from lamp_compile.passes.find_sites import find_sites

    before = str(program.graph)
    seen = find_sites(program)
    assert not seen.sites
    assert not seen.refusals
    (unclaimed,) = seen.unclaimed
    assert "queries and keys" in unclaimed.reason
    assert str(program.graph) == before


def test_refused_site_runs_as_it_was():
    torch._dynamo.reset()
    model, args = Model(REFUSED["head_dim 20"][0]), inputs(4, dim=20)
    backend = lamp_compile.backend(lower="eager")
    out = torch.compile(model, backend=backend, fullgraph=True)(*args)
    assert backend.reports[0].rewritten == ()
    assert torch.equal(out, model(*args))


def test_empty_sequence_is_refused():
    q, k, v = inputs(4)
    seen = captured.found("export", Model(sdpa), q, k[:, :, :0], v[:, :, :0])
    assert "empty" in seen.refusals[0].reason


def test_training_mode_is_refused():
    q, k, v = inputs(4)
    model = Model(lambda q, k, v: F.dropout(F.softmax(q @ k.mT, -1), 0.1, training=True) @ v)
    with pytest.raises(ModelError, match="training mode") as caught:
        rewrite(torch.export.export(model, (q, k, v), strict=True))
    assert "eval()" in caught.value.fix


def test_nested_region_is_reported():
    class Nested(nn.Module):
        def forward(self, q, k, v):
            return region(q, k, v) + region(k, q, v)

    @torch.compiler.nested_compile_region
    def region(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    seen = captured.found("dynamo", Nested(), *inputs(4))
    assert seen.unclaimed
    assert "nested region" in seen.unclaimed[0].reason


def test_flex_attention_is_reported():
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = inputs(4)
    seen = captured.found("dynamo", Model(lambda q, k, v: flex_attention(q, k, v)), q, k, v)
    assert "flex_attention" in seen.unclaimed[0].reason


def test_decomposed_program_says_when_to_rewrite():
    model = Model(sdpa)
    program = torch.export.export(model, inputs(4), strict=True).run_decompositions()
    report = rewrite(program).graph_module.meta["lamp_report"]
    assert not report.rewritten
    assert report.unclaimed
    assert "run_decompositions" in report.unclaimed[0].fix


def test_wrong_programs():
    with pytest.raises(InputError, match="cannot rewrite a Linear"):
        rewrite(nn.Linear(2, 2))
    graph = torch.fx.symbolic_trace(Model(sdpa))
    with pytest.raises(InputError, match="does not know"):
        rewrite(graph)
    with pytest.raises(InputError, match="1 example inputs for 3"):
        rewrite(graph, example_inputs=(torch.zeros(1),))
    with pytest.raises(CaptureError, match="does not run"):
        rewrite(graph, example_inputs=(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(1)))
