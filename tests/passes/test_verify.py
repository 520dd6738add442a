"""The check between the stages finds planted faults, and names the pass and the site."""

from __future__ import annotations

import pytest
import torch

from lamp_compile import options
from lamp_compile.driver import run_passes
from lamp_compile.errors import PassError
from lamp_compile.passes._nodes import OPS, lamp_nodes
from lamp_compile.passes.capture import capture
from lamp_compile.passes.find_sites import find_sites
from lamp_compile.passes.hot_tensors import HotTensors, Wires
from lamp_compile.passes.insert_guard import insert_guard
from lamp_compile.passes.insert_lookahead import insert_lookahead
from lamp_compile.passes.insert_selector import insert_selector
from lamp_compile.passes.make_plan import make_plan
from lamp_compile.passes.meet import meet
from lamp_compile.passes.patterns._dialect import aten
from lamp_compile.passes.state_host import host_for
from lamp_compile.passes.verify import Expected, verify
from tests.backends.modules import stack, tokens
from tests.passes.captured import dynamo_graph, lamp_counts

STEPS = ("meet", "insert_lookahead", "insert_selector", "insert_guard")


def after(stage):
    """(program, expectations, nodes of layers.1) once the passes up to this one have run."""
    program = capture(dynamo_graph(stack(), tokens(40)))
    found = find_sites(program)
    plan, sites = make_plan(found), list(found.sites)
    expected = [Expected.of(site) for site in sites]
    wires = Wires(host_for(program), HotTensors())
    meet(program, sites)
    for step in (insert_lookahead, insert_selector, insert_guard)[: STEPS.index(stage)]:
        step(program, sites, plan, wires)
    return program, expected, lamp_nodes(program.graph, "layers.1")


@pytest.mark.parametrize("stage", STEPS)
def test_a_good_graph_passes_after_every_stage(stage):
    program, expected, _ = after(stage)
    verify(program, stage, expected)
    program.module.recompile()
    counts = lamp_counts(program.graph)
    assert set(counts.values()) == {2}
    assert len(counts) == {"meet": 1, "insert_lookahead": 3, "insert_selector": 4, "insert_guard": 5}[stage]


def _attribute(op, name, value):
    def plant(program, nodes):
        nodes[op].update_kwarg(name, value)

    return plant


def _wrong_shape(program, nodes):
    out = next(user for user in nodes["attend"].users if user.args[1] == 0)
    out.meta["example_value"] = out.meta["example_value"][:, :2]


def _not_written_back(program, nodes):
    copies = [n for n in program.graph.nodes if n.target is aten.copy_.default and "layers_1_state" in n.args[0].name]
    program.graph.erase_node(copies[0])


def _constant_tau(program, nodes):
    nodes["select"].update_arg(1, 0.01)


def _two_states(program, nodes):
    other = lamp_nodes(program.graph, "layers.0")["select"]
    nodes["select"].update_arg(3, other.args[3])


def _bypassed(program, nodes):
    out = next(user for user in nodes["attend"].users if user.args[1] == 0)
    for user in list(out.users):
        if user.target is not OPS["guard"]:
            user.replace_input_with(out, nodes["attend"].args[0])


def _out_of_order(program, nodes):
    nodes["quantize"].append(nodes["select"])


FAULTS = {
    "unknown format": ("insert_guard", _attribute("attend", "k_format", "int3"), "int3"),
    "lost node": ("insert_guard", _attribute("guard", "site", "elsewhere"), "expected the nodes"),
    "wrong shape": ("insert_guard", _wrong_shape, "the output is"),
    "state not written back": ("insert_guard", _not_written_back, "not written back"),
    "tau is a constant": ("insert_selector", _constant_tau, "has no tau"),
    "two states": ("insert_guard", _two_states, "different state"),
    "reader of something else": ("insert_guard", _bypassed, "no longer reads"),
    "order": ("insert_guard", _out_of_order, "invalid graph"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name):
    stage, plant, words = FAULTS[name]
    program, expected, nodes = after(stage)
    plant(program, nodes)
    with pytest.raises(PassError, match=words) as caught:
        verify(program, stage, expected)
    assert stage in caught.value.where
    assert words == "invalid graph" or "layers.1" in caught.value.where


def test_the_old_root_may_not_stay():
    program = capture(dynamo_graph(stack(), tokens(40)))
    sites = find_sites(program).sites
    expected = [Expected.of(site) for site in sites]
    meet(program, sites[:1])
    with pytest.raises(PassError, match="expected the nodes attention") as caught:
        verify(program, "meet", expected)
    assert "layers.1" in caught.value.where


def test_the_argument_is_left_alone():
    graph = dynamo_graph(stack(), tokens(40))
    before = str(graph.graph)
    run_passes(capture(graph), options.Options(), HotTensors())
    assert str(graph.graph) == before
    assert isinstance(graph(*_placeholders(graph)), tuple)


def _placeholders(graph):
    return [_real(node) for node in graph.graph.nodes if node.op == "placeholder"]


def _real(node):
    fake = node.meta["example_value"]
    return torch.zeros(tuple(fake.shape), dtype=fake.dtype)
