"""Every spelling is claimed with the right fields, in both dialects, and computes what the original computes."""

from __future__ import annotations

import pytest
import torch

import lamp_compile
from lamp_compile.driver import rewrite
from lamp_compile.passes.capture import capture
from lamp_compile.passes.find_sites import find_sites
from tests.passes import captured
from tests.passes.spellings import SPELLINGS, Model, kv_inputs
from tests.tolerances import ARITHMETIC

EXACT = {"floor": 2, "query_bits": 0}
FIVE = {"quantize": 1, "look_ahead": 1, "select": 1, "attend": 1, "guard": 1}


@pytest.mark.parametrize("kind", captured.KINDS)
@pytest.mark.parametrize("name", SPELLINGS)
def test_site_has_its_fields(name: str, kind: str) -> None:
    spelling = SPELLINGS[name]
    seen = captured.found(kind, Model(spelling.run), *kv_inputs(spelling))
    assert not seen.refusals
    assert not seen.unclaimed
    (site,) = seen.sites
    assert (site.name, site.pattern) == ("attn", spelling.pattern)
    assert (site.kv_heads, site.head_dim, site.value_dim) == (
        spelling.wanted.get("kv_heads", spelling.kv_heads),
        16,
        16,
    )
    for field, value in spelling.wanted.items():
        assert getattr(site, field) == pytest.approx(value), field
    for field in ("mask", "bias", "sinks"):
        assert (getattr(site, field) is not None) == (field in spelling.nodes), field
    assert "spellings.py" in site.stack_trace


@pytest.mark.parametrize("name", SPELLINGS)
def test_dynamo_output_is_the_original_at_level_two(name: str) -> None:
    spelling = SPELLINGS[name]
    model, args = Model(spelling.run), kv_inputs(spelling)
    torch._dynamo.reset()
    backend = lamp_compile.backend(lower="eager", **EXACT)
    out = torch.compile(model, backend=backend, fullgraph=True)(*args)
    assert backend.reports[0].rewritten == ("attn",)
    close(out, model(*args))


@pytest.mark.parametrize("name", SPELLINGS)
def test_exported_output_is_the_original_at_level_two(name: str) -> None:
    spelling = SPELLINGS[name]
    model, args = Model(spelling.run), kv_inputs(spelling)
    made = rewrite(torch.export.export(model, args, strict=True), **EXACT)
    assert captured.lamp_counts(made.graph) == FIVE
    assert "softmax" not in str(made.graph)
    assert "scaled_dot_product" not in str(made.graph)
    with torch.no_grad():
        close(made.module()(*args), model(*args))


def close(out: torch.Tensor, wanted: torch.Tensor, relative: float = ARITHMETIC[torch.float32].relative) -> None:
    """Equal up to the order of float32 sums, or to ``relative``."""
    assert out.dtype == wanted.dtype
    assert out.shape == wanted.shape
    assert (out - wanted).norm() <= relative * wanted.norm()


@pytest.mark.parametrize("divided", [False, True])
def test_symbolic_scale_and_symbolic_heads(divided: bool) -> None:
    class Scaled(torch.nn.Module):
        factor = 4.0 if divided else 0.25

        def forward(self, q):
            scores = q @ q.mT
            return (scores / self.factor if divided else scores * self.factor).softmax(-1) @ q

    q = torch.randn(2, 4, 140, 16)
    graph = captured.dynamo_graph(Scaled(), q, dynamic=True)
    torch._dynamo.reset()
    backend = lamp_compile.backend(lower="eager", **EXACT)
    out = torch.compile(Scaled(), backend=backend, fullgraph=True, dynamic=True)(q)
    assert len(backend.reports[0].rewritten) == 1
    close(out, Scaled()(q))
    (site,) = find_sites(capture(graph)).sites
    assert (site.heads, site.head_dim) == (4, 16)
    assert isinstance(site.scale, torch.fx.Node)
