"""The four nodes of a site over a cache become one operator that writes the guard's state itself."""

from __future__ import annotations

import pytest
import torch

from lamp_compile.errors import PassError
from lamp_compile.passes._nodes import lamp_nodes
from lamp_compile.passes.capture import capture
from lamp_compile.passes.find_sites import find_sites
from lamp_compile.passes.fuse import COPIES, fuse
from lamp_compile.passes.hot_tensors import HotTensors, Wires
from lamp_compile.passes.insert_guard import insert_guard
from lamp_compile.passes.insert_lookahead import insert_lookahead
from lamp_compile.passes.insert_selector import insert_selector
from lamp_compile.passes.make_plan import make_plan
from lamp_compile.passes.meet import meet
from lamp_compile.passes.patterns._dialect import aten, bind
from lamp_compile.passes.state_host import host_for
from lamp_compile.passes.verify import Expected, verify
from lamp_compile.runtime import guard
from tests.backends.modules import stack, tokens
from tests.passes.captured import dynamo_graph, lamp_counts
from tests.passes.test_cached import SETTINGS, Decoder, query

SITE = SETTINGS["site"]


def expanded(model=None, x=None):
    """(program, its sites, what must not change) with the guard in place."""
    program = capture(dynamo_graph(model or Decoder(), query() if x is None else x))
    found = find_sites(program)
    plan, sites = make_plan(found), list(found.sites)
    expected, wires = [Expected.of(site) for site in sites], Wires(host_for(program), HotTensors())
    meet(program, sites)
    for step in (insert_lookahead, insert_selector, insert_guard):
        step(program, sites, plan, wires)
    verify(program, "insert_guard", expected)
    return program, sites, expected


def fused():
    program, sites, expected = expanded()
    assert fuse(program, sites, why_not=lambda *args: None) == {SITE: None}
    return program, expected, lamp_nodes(program.graph, SITE)["fused_attention"]


@pytest.mark.usefixtures("reference_only")
def test_without_kernels_nothing_is_fused_and_the_reason_is_given():
    program, sites, _ = expanded()
    before = str(program.graph)
    reasons = fuse(program, sites)
    assert list(reasons) == [SITE]
    assert "switched off" in reasons[SITE]
    assert str(program.graph) == before


@pytest.mark.usefixtures("cpu_kernels")
def test_on_a_cpu_with_kernels_it_is_fused():
    program, sites, _ = expanded()
    assert fuse(program, sites) == {SITE: None}
    assert lamp_counts(program.graph) == {"fused_attention": 1}


def test_one_operator_and_no_copies():
    program, sites, _ = expanded()
    assert sum(node.target in COPIES for node in program.graph.nodes) == 2
    fuse(program, sites, why_not=lambda *args: None)
    assert lamp_counts(program.graph) == {"fused_attention": 1}
    assert not [node for node in program.graph.nodes if node.target in COPIES]
    program.graph.lint()


def test_the_reason_is_asked_with_the_sites_own_tensors_and_options():
    asked = []
    program, sites, _ = expanded()
    fuse(program, sites, why_not=lambda *given: asked.append(given) or "not today")
    ((q, planes, state, options),) = asked
    assert tuple(q.shape) == (2, 4, 1, 16)
    assert [x.dim() for x in planes] == [5, 5, 3, 5, 5, 3]
    assert tuple(state.shape) == (2, 2, 4)
    assert {name: options[name] for name in SETTINGS} == SETTINGS
    assert lamp_counts(program.graph) == {"look_ahead": 1, "select": 1, "attend": 1, "guard": 1}


def test_every_argument_arrives():
    _, _, node = fused()
    bound = bind(node)
    assert {name: bound[name] for name in SETTINGS} == SETTINGS
    assert bound["keys"] == 128
    for name in ("q", "k_high", "v_scale", "tau", "floor", "budget", "state", "stats", "lengths"):
        assert isinstance(bound[name], torch.fx.Node), name
    for name in ("balance", "mask", "bias", "sinks", "start", "block_table"):
        assert bound[name] is None, name


def test_it_computes_the_same_and_writes_state_and_statistics(monkeypatch):
    monkeypatch.setattr("lamp_compile.driver.fuse", lambda program, sites: fuse(program, sites, lambda *args: None))
    from lamp_compile.driver import run_passes
    from lamp_compile.options import Options

    graphs = []

    def rewritten(module, inputs):
        program = capture(module)
        run_passes(program, Options(), HotTensors())
        graphs.append(program.graph)
        return program.module.forward

    plain, model = Decoder(), Decoder()
    torch._dynamo.reset()
    with torch.no_grad():
        fast = torch.compile(model, backend=rewritten, fullgraph=True)
        for _ in range(3):
            torch.testing.assert_close(fast(query()), plain(query()))
    (graph,) = graphs
    assert lamp_counts(graph) == {"fused_attention": 1}
    torch.testing.assert_close(model.state, plain.state)
    assert torch.equal(model.stats, plain.stats)
    assert model.stats[..., guard.STEPS].tolist() == [[3, 3], [3, 3]]
    assert model.state[..., guard.ERROR].gt(0).all()


def test_a_site_without_a_cache_stays_apart():
    program, sites, _ = expanded(stack(), tokens(40))
    reasons = fuse(program, sites, why_not=lambda *args: None)
    assert len(reasons) == 2
    assert all(reasons.values())
    assert lamp_counts(program.graph)["attend"] == 2


def test_a_good_graph_passes_verification():
    program, expected, _ = fused()
    verify(program, "fuse", expected)


def _constant_tau(program, node):
    node.update_arg(7, 0.01)


def _no_state(program, node):
    node.update_arg(10, None)


def _unknown_format(program, node):
    node.update_kwarg("v_format", "nested9")


def _gone(program, node):
    node.replace_all_uses_with(node.args[0])
    program.graph.erase_node(node)


def _wrong_shape(program, node):
    for key in ("val", "example_value"):
        if key in node.meta:
            node.meta[key] = node.meta[key][:, :2]


FAULTS = [_constant_tau, _no_state, _unknown_format, _gone, _wrong_shape]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__.strip("_"))
def test_planted_faults_are_refused(plant):
    program, expected, node = fused()
    plant(program, node)
    with pytest.raises(PassError) as caught:
        verify(program, "fuse", expected)
    assert f"pass fuse, site {SITE}" in str(caught.value)


def test_a_copy_that_reads_the_new_state_elsewhere_reads_the_state_itself():
    """What else used the guard's result gets the tensor that the operator has written."""
    program, sites, _ = expanded()
    nodes = lamp_nodes(program.graph, SITE)
    state = bind(nodes["guard"])["state"]
    copies = [node for node in program.graph.nodes if node.target in COPIES and node.args[0] is state]
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    with program.graph.inserting_before(output):
        more = program.graph.call_function(aten.add.Tensor, (copies[0].args[1], 1))
    output.args = ((*output.args[0], more),)
    fuse(program, sites, why_not=lambda *args: None)
    assert more.args[0] is state
    assert lamp_counts(program.graph) == {"fused_attention": 1}
