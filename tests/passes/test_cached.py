"""Sites over a cache: ``lamp::attention.cached`` is expanded into the five nodes around the cache's own tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lamp_compile
from lamp_compile.runtime import guard, kernels, layout
from tests.passes.captured import found, lamp_counts
from tests.passes.test_patterns import close

SETTINGS = {
    "causal": "", "window": 0, "scale": 0.25, "softcap": 0.0, "k_format": "nested8", "v_format": "nested8",
    "rotation": "hadamard", "rule": "energy", "query_bits": 8, "subtile": 32, "guard_window": 16, "guard_hold": 64,
    "hysteresis": 0.5, "site": "model.layers.7.self_attn",
}  # fmt: skip


class Decoder(nn.Module):
    """Holds the planes of 100 tokens as a cache layer would, and attends to them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        k, v = (torch.randn(2, 2, 100, 16, generator=generator) for _ in range(2))
        store = {"k_format": "nested8", "v_format": "nested8", "rotation": "hadamard"}
        planes = torch.ops.lamp.quantize(k, v, None, **store, tile=layout.TILE, site="")
        for index, plane in enumerate(planes):
            self.register_buffer(f"plane_{index}", plane)
        for name, value in (("tau", 1e9), ("floor", 0.0), ("budget", 1e9)):
            self.register_buffer(name, torch.full((2,), value))
        self.register_buffer("state", guard.new_state(2, 2))
        self.register_buffer("stats", guard.new_stats(2, 2))
        self.register_buffer("lengths", torch.tensor([100, 60]))

    def forward(self, q):
        planes = [getattr(self, f"plane_{index}") for index in range(6)]
        hot = (self.tau, self.floor, self.budget, self.state, self.stats)
        seen = (None, None, None, None, None, self.lengths, None)
        out, state, stats = torch.ops.lamp.attention.cached(q, *planes, *hot, *seen, keys=128, **SETTINGS)
        self.state.copy_(state)
        self.stats.copy_(stats)
        return out * 2.0


def query():
    return torch.randn(2, 4, 1, 16, generator=torch.Generator().manual_seed(2))


def test_site_over_a_cache():
    (site,) = found("dynamo", Decoder(), query()).sites
    assert (site.name, site.pattern, site.k, site.v) == ("model.layers.7.self_attn", "cached", None, None)
    assert (site.heads, site.kv_heads, site.head_dim, site.value_dim, site.scale) == (4, 2, 16, 16, 0.25)
    assert site.cache.settings["rule"] == "energy"
    assert site.cache.nodes["lengths"] is not None
    assert site.cache.nodes["block_table"] is None


def test_site_over_planes_by_lanes(monkeypatch):
    monkeypatch.setattr(kernels.cpu, "why_not", lambda: "switched off")
    model = Decoder()
    for name in ("plane_0", "plane_1", "plane_3", "plane_4"):
        setattr(model, name, layout.as_lanes(getattr(model, name)))
    (site,) = found("dynamo", model, query()).sites
    assert (site.kv_heads, site.head_dim, site.value_dim) == (2, 16, 16)


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_expanded_graph_computes_and_writes_the_same(lower):
    torch._dynamo.reset()
    plain, model = Decoder(), Decoder()
    backend = lamp_compile.backend(lower=lower)
    fast = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        close(fast(query()), plain(query()))
    assert backend.reports[0].rewritten == ("model.layers.7.self_attn",)
    assert "lamp.cached" in backend.reports[0].before
    assert "lamp.cached" not in backend.reports[0].after
    torch.testing.assert_close(model.state, plain.state)
    assert torch.equal(model.stats, plain.stats)
    assert model.stats[..., guard.STEPS].tolist() == [[3, 3], [3, 3]]
    before = fast(query())
    model.floor.fill_(1)
    assert not torch.equal(fast(query()), before)
    assert len(backend.reports) == 1


@pytest.mark.usefixtures("reference_only")
def test_four_nodes_replace_it_and_no_hot_tensor_is_added():
    graphs = []

    def keep(gm, inputs):
        from lamp_compile.driver import run_passes
        from lamp_compile.options import Options
        from lamp_compile.passes.capture import capture
        from lamp_compile.passes.hot_tensors import HotTensors

        program = capture(gm)
        host, _ = run_passes(program, Options(), HotTensors())
        graphs.append((program.graph, host.appended))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Decoder(), backend=keep, fullgraph=True)(query())
    ((graph, appended),) = graphs
    assert lamp_counts(graph) == {"look_ahead": 1, "select": 1, "attend": 1, "guard": 1}
    assert appended == []


def test_settings_of_the_cache_win_over_the_options():
    torch._dynamo.reset()
    backend = lamp_compile.backend(lower="eager", rule="mass", k_format="int8")
    torch.compile(Decoder(), backend=backend, fullgraph=True)(query())
    (row,) = backend.reports[0].plan.sites
    assert (row.rule, row.k_format) == ("energy", "nested8")
